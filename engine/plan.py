"""`ppomax plan`: the tables of a plan, from a model folder or the reference shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, LlamaConfig

from .communication import USUAL, Machines
from .config import PPOConfig
from .errors import InputError, first_line
from .fake_models import Shapes
from .footprint import Lengths
from .hardware import GIB, MIB, chip
from .memory import CUDA_RESERVE, DISK_RATE, PHASES, Phase, Plan, plan
from .remedies import Remedy, remedies

REFERENCE = "7b-shape"
TIGHT = 0.05
"""Share of a device's memory below which what is free may be lost between the allocator's blocks"""


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
    machines: Machines = USUAL,
    reward: str | None = None,
    critic: str | None = None,
    judge: str | None = None,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    out: Path | None = None,
) -> Plan:
    """Make a plan and print it; `out`: write it as JSON too.

    Args:
        reward: folder, `function`, or None: a reward model of the policy's shape.
        critic: folder; None: the reward model's shape, or the policy's where the reward is a function.
        judge: folder, or `function` or None, which take nothing, like the folder of the reward model.
        prompt_tokens, response_tokens: of every sequence; the configuration's limits are set to them. None: its limits.
    """
    device, policy = chip(gpu), read_shape(model)
    scored = None if reward == "function" else read_shape(reward or model)
    judged = None if judge in (None, "function") or _same_folder(judge, reward) else read_shape(judge)
    lengths = Lengths(
        config.max_prompt if prompt_tokens is None else prompt_tokens,
        config.rollout.max_response if response_tokens is None else response_tokens,
    )
    config = _with_limits(config, lengths)
    shapes = Shapes.of(policy, read_shape(critic) if critic else scored, scored, judged)
    console = Console()
    with Console(stderr=True).status("running one step of each phase on tensors without contents"):
        made = plan(config, shapes, device, lengths=lengths, gpus=gpus, machines=machines)
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


def _same_folder(one: str, other: str | None) -> bool:
    return other is not None and REFERENCE not in (one, other) and Path(one).resolve() == Path(other).resolve()


def _with_limits(config: PPOConfig, lengths: Lengths) -> PPOConfig:
    for name, value in vars(lengths).items():
        if value < 1:
            raise InputError(f"{name} tokens = {value}: expected at least 1")
    rollout = replace(config.rollout, max_response=lengths.response)
    return replace(config, rollout=rollout, max_sequence=lengths.sequence)


def show(made: Plan, console: Console) -> None:
    """Print all of a plan."""
    models = ", ".join(f"{name} {_count(count)}" for name, count in made.parameters.items())
    machines = -(-made.gpus // made.machines.gpus)
    where = f" in {machines} machines" if machines > 1 else ""
    console.print(
        f"[bold]{made.gpus} x {made.chip.name}{where}[/] ({made.chip.source})\n"
        f"{models}, {made.dtype}; sequences of {made.lengths.prompt} + {made.lengths.response} tokens",
        highlight=False,
    )
    console.print(memory_table(made))
    unit, color = unit_of(made), "green" if made.fits else "red"
    peak, there = made.most / unit.bytes, made.chip.memory / unit.bytes
    console.print(f"peak {peak:,.1f} of {there:,.1f} {unit.name}: [{color}]{verdict(made)}[/]", highlight=False)
    console.print(batch_table(made))
    console.print(time_table(made))
    for line in _notes(made):
        console.print(line, highlight=False)


def verdict(made: Plan) -> str:
    """Whether it fits, and by how much."""
    unit = unit_of(made)
    spare = f"{abs(made.spare) / unit.bytes:,.1f} {unit.name}"
    if not made.fits:
        return f"does not fit, {spare} too many"
    return f"fits, {spare} to spare" + (", LITTLE: fragmentation is not modelled" if is_tight(made) else "")


def is_tight(made: Plan) -> bool:
    """It fits, by less than what the allocator may not be able to use."""
    return made.fits and made.spare < TIGHT * made.chip.memory


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
    table.add_row("peak", *(f"{peak / unit.bytes:,.1f}" if peak else "-" for peak in peaks), style="bold")
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
    if "reward" in made.parameters:
        table.add_row("micro-batches of the reward model", "", str(batches.reward_micro_batches))
    if batches.ptx_micro_batches:
        table.add_row("micro-batches of PPO-ptx", "", str(batches.ptx_micro_batches))
    table.add_row("sequences decoded at a time", "", str(batches.running))
    table.add_row("tokens in the KV cache", "", f"{made.kv_tokens:,}")
    return table


def time_table(made: Plan) -> Table:
    """Work and predicted time by phases, of one process."""
    table = Table(title="Work of a process in an iteration, and a model of its time", title_justify="left")
    for name in ("", *PHASES, "iteration"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    phases = made.phases
    sums = {
        "PFLOP": [phase.work.flops / 1e15 for phase in phases],
        "needed": [phase.work.needed / 1e15 for phase in phases],
        "TB": [phase.work.traffic / 1e12 for phase in phases],
    }
    if made.gpus > 1:
        sums["GB received"] = [phase.communication / 1e9 for phase in phases]
    if made.gpus > made.machines.gpus:
        sums["by network"] = [phase.network / 1e9 for phase in phases]
    for name, figures in sums.items():
        table.add_row(name, *map(_figure, figures), _figure(sum(figures)))
    table.add_section()
    table.add_row("seconds", *(_seconds(phase.seconds) for phase in phases), _seconds(made.seconds), style="bold")
    table.add_row("bound by", *(phase.bound or "-" for phase in phases), "")
    table.add_row("tokens/s", *(_rate(phase) for phase in phases), "")
    table.add_row("MFU", *(_share(made, phase) for phase in phases), "-" if made.mfu is None else f"{made.mfu:.0%}")
    return table


def _rate(phase: Phase) -> str:
    if not phase.seconds:
        return "-"
    speed = phase.work.tokens / phase.seconds
    return f"{speed:,.0f}" if speed < 1e6 else f"{speed / 1e3:,.0f}k"


def _share(made: Plan, phase: Phase) -> str:
    if not phase.seconds or not made.chip.flops:
        return "-"
    return f"{phase.work.needed / phase.seconds / made.chip.flops:.0%}"


def _notes(made: Plan) -> list[str]:
    lines, unit, checkpoint = _time_notes(made), unit_of(made), made.checkpoint
    if made.arriving:
        lines.append(
            "gathered: weights that are whole for a moment, where they are sharded or offloaded, and their gradients "
            f"in float32. Loading takes {made.loading / unit.bytes:,.1f} {unit.name}: a process's parts, and one layer "
            "(or what is outside the layers) after another whole."
        )
    if made.host and made.gpus > 1:
        there = min(made.gpus, made.machines.gpus)
        lines.append(
            f"host memory: {made.host / unit.bytes:,.1f} {unit.name} a process, "
            f"{there * made.host / unit.bytes:,.1f} a machine"
        )
    together = ", of all processes together" if made.gpus > 1 else ""
    lines.append(
        f"checkpoint{together}: {checkpoint.bytes / unit.bytes:,.1f} {unit.name}, {checkpoint.seconds:.0f} s at "
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


def _time_notes(made: Plan) -> list[str]:
    chip = made.chip
    if made.seconds is None or made.mfu is None or made.tokens_per_second is None:
        return ["No ceilings of this device are known: no times."]
    peak, rate, bandwidth = (x or 0.0 for x in (chip.flops, chip.rate, chip.bandwidth))
    link, host = (x or 0.0 for x in (chip.link, chip.host_link))
    speed = f"{made.tokens_per_second:,.0f} tokens/s" + (" of all processes" if made.gpus > 1 else "")
    lines = [
        f"an iteration: {made.seconds:.1f} s, {made.seconds / made.batches.rollouts:.2f} s a response, {speed}, MFU "
        f"{made.mfu:.0%}",
        "Times are a MODEL, nothing of them was measured: an operation takes the longer of FLOPs / "
        f"{rate / 1e12:,.0f} TFLOP/s and bytes / {bandwidth / 1e12:.2f} TB/s. needed: PFLOP without what is "
        "computed again; TB: read and written; tokens/s: through a model, prompts included; MFU: needed FLOPs, of the "
        f"vendor's peak of {peak / 1e12:,.0f} TFLOP/s.",
    ]
    links = [f"host (its memory, {host / 1e9:g} GB/s)"] if made.host else []
    if made.gpus > 1:
        links.insert(0, f"links (to GPUs of the machine, {link / 1e9:g} GB/s; GB received: from all other GPUs)")
    if made.gpus > made.machines.gpus:
        network = made.machines.network
        whose = "an ASSUMPTION" if network == USUAL.network else "as stated"
        links.append(f"network (to other machines, {network / 1e9:g} GB/s a GPU, {whose})")
    if links:
        hide = "Communication hides behind computation, or that behind it (before rollouts they add up)"
        lines.append(f"{hide}; bound by: GPU (products and memory), {', '.join(links)}.")
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
    last = changes[-1].plan if changes else made
    if not last.fits:
        console.print("No change known here makes it fit.", highlight=False)
        return
    host = f"; {last.host / unit.bytes:,.1f} {unit.name} of host memory a process" if last.host else ""
    console.print(f"with all of these: {verdict(last)}{host}", highlight=False)


class Unit(NamedTuple):
    """Of memory."""

    name: str
    bytes: int


def unit_of(made: Plan) -> Unit:
    """What a plan's sizes are shown in."""
    return Unit("GiB", GIB) if made.peak >= GIB else Unit("MiB", MIB)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.2f}M"


def _figure(value: float) -> str:
    return f"{value:.2f}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"
