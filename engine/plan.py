"""`ppomax plan`: the tables of a plan, from a model folder or the reference shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, LlamaConfig

from .config import PPOConfig
from .errors import InputError, first_line
from .fake_models import Shapes
from .footprint import Lengths
from .hardware import GIB, MIB, chip
from .memory import CUDA_RESERVE, DISK_RATE, PHASES, Plan, plan
from .remedies import Remedy, remedies

REFERENCE = "7b-shape"


def reference_shape() -> LlamaConfig:
    """The shape that figures for "7B" are of: grouped-query attention, 8.0 billion parameters."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def read_shape(model: str | Path) -> Any:
    """The transformers configuration of a model folder, or of `7b-shape`; InputError where there is none."""
    if str(model) == REFERENCE:
        return reference_shape()
    if not (Path(model) / "config.json").is_file():
        state = "holds no config.json" if Path(model).is_dir() else "no such folder"
        raise InputError(f"{model}: {state}, expected a Hugging Face model folder or {REFERENCE}")
    try:
        return AutoConfig.from_pretrained(str(model), local_files_only=True)
    except Exception as error:
        raise InputError(f"{model}/config.json: {first_line(error)}") from None


def plan_command(
    config: PPOConfig,
    model: str,
    gpu: str,
    *,
    gpus: int = 1,
    reward: str | None = None,
    critic: str | None = None,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    out: Path | None = None,
) -> Plan:
    """Make a plan and print it; `out`: write it as JSON too.

    Args:
        reward: folder, `function`, or None: a reward model of the policy's shape.
        critic: folder; None: the reward model's shape, or the policy's where the reward is a function.
        prompt_tokens, response_tokens: of every sequence; the configuration's limits are set to them. None: its limits.
    """
    device, policy = chip(gpu), read_shape(model)
    judge = None if reward == "function" else read_shape(reward or model)
    lengths = Lengths(
        config.max_prompt if prompt_tokens is None else prompt_tokens,
        config.rollout.max_response if response_tokens is None else response_tokens,
    )
    config = _with_limits(config, lengths)
    shapes = Shapes.of(policy, read_shape(critic) if critic else judge, judge)
    console = Console()
    with Console(stderr=True).status("running one step of each phase on tensors without contents"):
        made = plan(config, shapes, device, lengths=lengths, gpus=gpus)
    show(made, console)
    changes: list[Remedy] = []
    if not made.fits:
        with Console(stderr=True).status("looking for what makes it fit"):
            changes = list(remedies(made, shapes))
        show_remedies(made, changes, console)
    if out:
        found = [{"flags": r.flags, "saved": r.saved, "peak": r.plan.peak, "fits": r.plan.fits} for r in changes]
        out.write_text(json.dumps({**made.to_dict(), "remedies": found}, indent=1) + "\n", encoding="utf-8")
    return made


def _with_limits(config: PPOConfig, lengths: Lengths) -> PPOConfig:
    for name, value in vars(lengths).items():
        if value < 1:
            raise InputError(f"{name} tokens = {value}: expected at least 1")
    rollout = replace(config.rollout, max_response=lengths.response)
    return replace(config, rollout=rollout, max_sequence=lengths.sequence)


def show(made: Plan, console: Console) -> None:
    """Print all of a plan."""
    models = ", ".join(f"{name} {_count(count)}" for name, count in made.parameters.items())
    unit = unit_of(made)
    console.print(
        f"[bold]{made.gpus} x {made.chip.name}[/] ({made.chip.source})\n"
        f"{models}, {made.dtype}; sequences of {made.lengths.prompt} + {made.lengths.response} tokens",
        highlight=False,
    )
    console.print(memory_table(made))
    verdict = "[green]fits[/]" if made.fits else "[red]does not fit[/]"
    peak, there = made.peak / unit.bytes, made.chip.memory / unit.bytes
    console.print(f"peak {peak:,.1f} of {there:,.1f} {unit.name}: {verdict}", highlight=False)
    console.print(batch_table(made))
    console.print(time_table(made))
    for line in _notes(made):
        console.print(line, highlight=False)


def memory_table(made: Plan) -> Table:
    """Components by phases, of one process."""
    unit = unit_of(made)
    table = Table(title=f"Memory of a process at the peak of each phase, {unit.name}", title_justify="left")
    for name in ("", *PHASES, "host"):
        table.add_column(name, justify="right" if name else "left")
    waiting = {c.name: c.bytes for c in made.components if c.on_host}
    names = dict.fromkeys(c.name for c in made.components)
    names |= dict.fromkeys(part for phase in made.phases for part in phase.resident)
    for name in names:
        sizes = [phase.resident.get(name) for phase in made.phases] + [waiting.get(name)]
        if any(size and size >= 0.05 * unit.bytes for size in sizes):
            table.add_row(name, *("-" if size is None else f"{size / unit.bytes:,.1f}" for size in sizes))
    table.add_section()
    peaks = [*(phase.peak for phase in made.phases), made.host]
    table.add_row("peak", *(f"{peak / unit.bytes:,.1f}" for peak in peaks), style="bold")
    return table


def batch_table(made: Plan) -> Table:
    batches, config = made.batches, made.config
    table = Table(title="Batches of an iteration", title_justify="left")
    for name in ("", "global", "a process"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_row("rollouts", str(batches.rollouts), str(batches.process_rollouts))
    table.add_row("minibatch", str(config.minibatch_size), str(batches.process_minibatch))
    table.add_row("optimizer steps (policy, critic)", str(batches.optimizer_steps), "the same")
    micro = f"{batches.micro_batches} of {batches.micro_batch} sequences"
    table.add_row("micro-batches of a minibatch", "", micro)
    table.add_row("tokens of a micro-batch", "", f"{batches.micro_batch_tokens:,}")
    if batches.ptx_micro_batches:
        table.add_row("micro-batches of PPO-ptx", "", str(batches.ptx_micro_batches))
    table.add_row("sequences decoded at a time", "", str(batches.running))
    table.add_row("tokens in the KV cache", "", f"{made.kv_tokens:,}")
    return table


def time_table(made: Plan) -> Table:
    """Work and predicted time of each phase, of one process."""
    table = Table(title="Work of a process in an iteration, and a model of its time", title_justify="left")
    several = ("GB in",) if made.gpus > 1 else ()
    for name in ("", "PFLOP", "needed", "TB", *several, "seconds", "tokens/s", "MFU"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for phase in made.phases:
        work, seconds = phase.work, phase.seconds
        speed, share = "-", "-"
        if seconds and made.chip.flops:
            speed, share = f"{work.tokens / seconds:,.0f}", f"{work.needed / seconds / made.chip.flops:.0%}"
        figures = [work.flops / 1e15, work.needed / 1e15, work.traffic / 1e12]
        figures += [phase.communication / 1e9] if several else []
        table.add_row(phase.name, *(f"{x:.2f}" for x in figures), _seconds(seconds), speed, share)
    return table


def _notes(made: Plan) -> list[str]:
    lines, unit = [], unit_of(made)
    if made.seconds is not None and made.mfu is not None and made.tokens_per_second is not None:
        lines.append(
            f"an iteration: {made.seconds:.1f} s, {made.seconds / made.batches.rollouts:.2f} s a response, "
            f"{made.tokens_per_second:,.0f} tokens/s, {made.mfu:.0%} of the chip's rate goes into needed FLOPs"
        )
        lines.append(
            "Times are a MODEL, nothing of them was measured: an operation takes the longer of FLOPs / rate and "
            "bytes / bandwidth, and communication hides behind them. needed: without what is computed again; TB: read "
            "and written; MFU: needed FLOPs by what the chip's rate allows"
            + ("; GB in: from other processes." if made.gpus > 1 else ".")
        )
    else:
        lines.append("No ceilings of this device are known: no times.")
    if made.loading > made.peak:
        lines.append(
            f"each process loads all models whole before they are sharded: {made.loading / unit.bytes:,.1f} {unit.name}"
        )
    checkpoint = made.checkpoint
    lines.append(
        f"checkpoint: {checkpoint.bytes / unit.bytes:,.1f} {unit.name}, {checkpoint.seconds:.0f} s at "
        f"{DISK_RATE / 1e9:g} GB/s; the policy's weights alone {checkpoint.policy / unit.bytes:,.1f} {unit.name}"
    )
    if made.config.runtime.compile or made.config.runtime.liger:
        lines.append("Layers are planned as eager PyTorch runs them: compiled ones and Liger's take less.")
    if made.chip.is_gpu:
        lines.append(
            f"CUDA reserve ({CUDA_RESERVE / GIB:g} GiB) is a constant, fragmentation is not modelled"
            + ("; sharding is a model." if made.gpus > 1 else ".")
        )
    return lines


def show_remedies(made: Plan, changes: list[Remedy], console: Console) -> None:
    unit = unit_of(made)
    table = Table(title="What to change, one after another", title_justify="left")
    for name in ("flags", f"{unit.name} less", "peak", "seconds", ""):
        table.add_column(name, justify="left" if name == "flags" else "right")
    for remedy in changes:
        after = remedy.plan
        sizes = (f"{size / unit.bytes:,.1f}" for size in (remedy.saved, after.peak))
        table.add_row(remedy.flags, *sizes, _seconds(after.seconds), "fits" if after.fits else "")
    console.print(table)
    if not changes or not changes[-1].plan.fits:
        console.print("No change known here makes it fit.", highlight=False)


class Unit(NamedTuple):
    """Of memory."""

    name: str
    bytes: int


def unit_of(made: Plan) -> Unit:
    """What a plan's sizes are shown in."""
    return Unit("GiB", GIB) if made.peak >= GIB else Unit("MiB", MIB)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.2f}M"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"
