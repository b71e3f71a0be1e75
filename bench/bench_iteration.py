"""One PPO iteration, phase by phase, on models of random weights: seconds, tokens/s, FLOP/s, memory, and the plan's.

    python bench/bench_iteration.py [--json bench/results/iteration_cpu.json]
    python bench/bench_iteration.py --device cuda --phases rollout       # then score, update: each under 10 minutes
    python bench/bench_iteration.py --device cuda --phases decode --running 64 128 256

On a GPU the shape is the 8.0B reference with 128 prompts of 1024 + 1024 tokens, on a CPU (--small elsewhere) a tiny
one. Phases that are left out get made-up rollouts, log-probs and values. `update` is of policy and critic. No response
ends early. An iteration is run once before it is measured.

Rows are spans of time without what is inside them, so that they add up; what none of them covers is "not explained".
FLOPs are those that a phase cannot do without, as `ppomax plan` counts them: what checkpointing computes again is not
among them. The floor of decoding is one read of the weights and of the running sequences' keys and values a step.
--profile adds the operators inside each span, from a further iteration under torch.profiler.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import records
import torch
from environment import environment
from ppomax.engine.attention import ATTENTION
from ppomax.engine.batch import Prompt, Rollout, cumulative
from ppomax.engine.config import PPOConfig, RolloutConfig
from ppomax.engine.footprint import Lengths, Shapes
from ppomax.engine.hardware import chip_of
from ppomax.engine.kv_cache import blocks_for
from ppomax.engine.memory import plan
from ppomax.engine.models import CausalModel, Placement, ScalarModel
from ppomax.engine.plan import reference_shape
from ppomax.engine.ppo import PPO, Experience
from ppomax.engine.presets import preset
from ppomax.engine.rewards import ModelReward
from ppomax.engine.rollout import RolloutEngine
from ppomax.engine.scoring import Scored
from ppomax.kernels.api import shaped_gae
from rich.console import Console
from rich.table import Table
from spans import Spans, Through, profiled, synchronize
from timing import cpu_peak
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

PHASES = ("rollout", "score", "update")
MOST_NOT_EXPLAINED = 0.05  # of the time; the command fails where it is more
GROUP = {  # rows of the table: where their time is counted
    "prefill": "rollout", "decode": "rollout", "logits": "rollout", "sampling": "rollout", "manager": "rollout",
    "rollout, host": "rollout", "score policy": "score", "score reference": "score", "score critic": "score",
    "score reward": "score", "packing": "score", "advantages, host": "score", "update policy": "update policy",
    "policy optimizer": "update policy", "update critic": "update critic", "critic optimizer": "update critic",
    "not explained": "not explained",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is run."""

    shape: LlamaConfig
    config: PPOConfig
    lengths: Lengths

    @property
    def prompts(self) -> int:
        return self.config.rollouts_per_iteration

    @property
    def tokens(self) -> int:
        return self.prompts * self.lengths.sequence


def reference_setting(prompts: int = 128) -> Setting:
    """8.0B parameters, all four models on one GPU."""
    lean = {f"{model}_optim.{field}": value for model in ("policy", "critic")
            for field, value in (("moments", "8bit"), ("offload", True))}  # fmt: skip
    config = preset(
        "ppo-max", rollouts_per_iteration=prompts, minibatch_size=min(32, prompts), ptx_coef=0.0,
        critic_pretrain_iterations=0,
        **{"rollout.max_response": 1024, "rollout.max_running": 128, "rollout.sleep": True, "rollout.kv_memory": 0.5},
        **lean,
    )  # fmt: skip
    return Setting(reference_shape(), config, Lengths(1024, 1024))


def small_setting(prompts: int = 32, prompt: int = 64, response: int = 64, width: int = 256) -> Setting:
    shape = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=prompt + response,
    )  # fmt: skip
    config = preset(
        "ppo-max", rollouts_per_iteration=prompts, minibatch_size=max(prompts // 4, 1), ptx_coef=0.0,
        critic_pretrain_iterations=0, max_sequence=prompt + response, micro_batch_tokens=2048,
        **{"rollout.max_response": response, "rollout.max_running": prompts, "runtime.checkpointing": "none"},
    )  # fmt: skip
    return Setting(shape, config, Lengths(prompt, response))


def random_model(kind: Any, shape: LlamaConfig, placement: Placement) -> Any:
    """Made on its device: no copy of the weights anywhere else."""
    config = type(shape).from_dict({**shape.to_dict(), "num_labels": 1, "pad_token_id": 0})
    config._attn_implementation = ATTENTION
    before = torch.get_default_dtype()
    torch.set_default_dtype(placement.dtype)
    try:
        with torch.device(placement.device):
            return kind(config)
    finally:
        torch.set_default_dtype(before)


def build(setting: Setting, device: torch.device) -> PPO:
    config, shape = setting.config, setting.shape
    placement = Placement.of(replace(config.runtime, device=str(device)))
    policy, reference = (CausalModel(random_model(LlamaForCausalLM, shape, placement), placement) for _ in range(2))
    critic, reward = (
        ScalarModel(random_model(LlamaForSequenceClassification, shape, placement), placement) for _ in range(2)
    )
    drawn = np.random.default_rng(0).integers(2, shape.vocab_size, (setting.prompts, setting.lengths.prompt))
    judge = ModelReward(reward, config.micro_batch_tokens)
    return PPO(config, policy, reference, critic, judge, [Prompt([], tokens) for tokens in drawn.tolist()], ())


def watch(ppo: PPO, spans: Spans) -> list[int]:
    """Put spans around the parts of an iteration; as `watch_sampling` returns."""
    reward = ppo.reward
    for owner, method, name in (
        (ppo, "collect", "rollout, host"), (ppo, "plan", "packing"), (ppo, "shape", "advantages, host"),
        (ppo, "update_policy", "update policy"), (ppo, "update_critic", "update critic"),
        (ppo.policy_optimizer, "step", "policy optimizer"), (ppo.critic_optimizer, "step", "critic optimizer"),
        (ppo.policy, "logprobs", "score policy"), (ppo.reference, "logprobs", "score reference"),
        (ppo.critic, "values", "score critic"),
    ):  # fmt: skip
        spans.around(owner, method, name)

    def judged(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> torch.Tensor:
        with spans("score reward"):
            return reward(prompts, rollouts)

    ppo.reward = judged
    return watch_sampling(ppo.engine, spans)


def watch_sampling(engine: RolloutEngine, spans: Spans) -> list[int]:
    """Put spans around the parts of sampling. The list gets, with each decode step, the cached tokens that it reads."""
    contexts: list[int] = []
    manager = Through(engine.cache.manager)
    engine.cache.manager = manager  # type: ignore[assignment]

    def step_name(step: Any) -> str:
        if step.num_decodes < step.num_members:
            return "prefill"
        contexts.append(int(engine.cache.host.seq_lens[: step.num_members].sum()))
        return "decode"

    for owner, method, name in (
        (manager, "plan", "manager"), (manager, "step", "manager"), (manager, "submit", "manager"),
        (engine, "_draw", "sampling"), (engine.policy, "logits", "logits"), (engine.decoder, "hidden", step_name),
    ):  # fmt: skip
        spans.around(owner, method, name)
    return contexts


def run_phases(ppo: PPO, setting: Setting, phases: Sequence[str]) -> None:
    """An iteration, or parts of one on made-up rollouts and scores."""
    if set(phases) == set(PHASES):
        ppo.iterate()
        return
    if "rollout" in phases:
        ppo.collect()
    if phases == ["rollout"]:
        return
    prompts, rollouts = ppo.prompts, made_up_rollouts(setting)
    minibatches = ppo.plan(rollouts, 0)
    experience = ppo.shape(list(prompts), rollouts, minibatches) if "score" in phases else None
    if "update" in phases:
        experience = experience or made_up_experience(ppo, rollouts)
        for minibatch in minibatches:
            ppo.update_policy(minibatch, experience)
            ppo.update_critic(minibatch, experience)


def made_up_rollouts(setting: Setting) -> list[Rollout]:
    lengths, vocab = setting.lengths, setting.shape.vocab_size
    drawn = np.random.default_rng(1).integers(2, vocab, (setting.prompts, lengths.sequence)).tolist()
    likely = torch.full((lengths.response,), -float(np.log(vocab)))
    split, versions = lengths.prompt, [0] * lengths.response
    return [Rollout(tokens[:split], tokens[split:], likely, False, versions) for tokens in drawn]


def made_up_experience(ppo: PPO, rollouts: list[Rollout]) -> Experience:
    device, rows = ppo.policy.device, len(rollouts)
    logprobs = torch.cat([rollout.logprobs for rollout in rollouts]).to(device)
    values, scores = torch.randn_like(logprobs), torch.randn(rows, device=device)
    ends = cumulative([len(rollout.response) for rollout in rollouts], device)
    shaped = shaped_gae(scores, logprobs, logprobs, values, ends, kl_coef=ppo.config.kl_coef)
    return Experience(
        prompts=list(ppo.prompts), rollouts=rollouts, scores=scores, shaped_scores=scores, judged=None,
        scored=Scored(logprobs, None, logprobs, values, torch.zeros(rows, device=device)), shaped=shaped,
        advantages=shaped.advantages, recorded=logprobs, fresh=torch.ones_like(logprobs, dtype=torch.bool),
        old_logprobs=logprobs, importance_weights=None,
    )  # fmt: skip


def measure(
    setting: Setting,
    device: torch.device,
    phases: Sequence[str] = PHASES,
    *,
    iterations: int = 1,
    warm_up: bool = True,
    profile: bool = False,
) -> dict[str, Any]:
    """Medians over the iterations; raises ValueError for an unknown phase."""
    if unknown := [phase for phase in phases if phase not in PHASES]:
        raise ValueError(f"phases {', '.join(unknown)}: expected some of {', '.join(PHASES)}")
    torch.manual_seed(0)
    phases = [phase for phase in PHASES if phase in phases]
    ppo = build(setting, device)
    if warm_up:
        run_phases(ppo, setting, phases)
    undisturbed, peak_bytes = seconds_and_peak(lambda: run_phases(ppo, setting, phases), device)
    spans = Spans(device)
    contexts = watch(ppo, spans)
    runs = [_spanned(ppo, setting, phases, spans) for _ in range(iterations)]
    rows = {name: median(run.get(name, 0.0) for run in runs) for name in GROUP if any(name in run for run in runs)}
    groups: dict[str, float] = {}
    for name, seconds in rows.items():
        groups[GROUP[name]] = groups.get(GROUP[name], 0.0) + seconds
    wall, rate = sum(rows.values()), chip_of(device).flops
    planned = against_plan(setting, device, groups)
    needed = sum(group["flops"] * group["seconds"] for group in planned.values() if group["flops"] and group["seconds"])
    result = {
        "environment": environment(),
        "device": device.type,
        "setting": {
            "parameters": sum(p.numel() for p in ppo.policy.parameters()), "prompts": setting.prompts,
            "prompt": setting.lengths.prompt, "response": setting.lengths.response, "phases": phases,
        },
        "seconds": undisturbed,
        "seconds_with_spans": wall,
        "seconds_per_prompt": undisturbed / setting.prompts,
        "tokens_per_second": setting.tokens / undisturbed,
        "peak_bytes": peak_bytes,
        "rows": rows,
        "not_explained": rows.get("not explained", 0.0) / wall,
        "groups": planned,
        "flops": needed / undisturbed,
        "mfu": None if rate is None else needed / undisturbed / rate,
        "samples_ms": {f"iteration, {name}": {"ppomax": [1e3 * run[name] for run in runs]}
                       for name in rows if all(run.get(name, 0.0) > 0 for run in runs)},
    }  # fmt: skip
    if "rollout" in phases:
        result["decode"] = decode_figures(ppo.engine, spans, contexts)
    if profile:
        result["operators"] = profiled(lambda: _spanned(ppo, setting, phases, spans), spans)
    return result


def _spanned(ppo: PPO, setting: Setting, phases: Sequence[str], spans: Spans) -> dict[str, float]:
    """Seconds of each span in one iteration; that of `not explained` is what no other covers."""
    before = dict(spans.seconds)
    with spans("not explained"):
        run_phases(ppo, setting, phases)
    return {name: seconds - before.get(name, 0.0) for name, seconds in spans.seconds.items()}


def against_plan(
    setting: Setting, device: torch.device, groups: dict[str, float]
) -> dict[str, dict[str, float | None]]:
    """Of each group of rows: seconds, needed FLOP/s, their share of the chip's dense bf16 rate, the plan's seconds."""
    chip = chip_of(device)
    planned = plan(
        setting.config, Shapes.of(setting.shape, setting.shape, setting.shape), chip, lengths=setting.lengths
    )
    out: dict[str, dict[str, float | None]] = {}
    for name, seconds in groups.items():
        phase = next((phase for phase in planned.phases if phase.name == name), None)
        rate = phase.work.needed / seconds if phase else None
        out[name] = {
            "seconds": seconds,
            "flops": rate,
            "mfu": rate / chip.flops if rate and chip.flops else None,
            "planned_seconds": phase.seconds if phase else None,
            "planned_peak": phase.peak if phase else None,
        }
    return out


def seconds_and_peak(function: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Of one call. The peak is what tensors take on a GPU, and on a CPU what the process takes more than before."""
    elapsed = 0.0

    def timed() -> None:
        nonlocal elapsed
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        elapsed = time.perf_counter() - started

    if device.type != "cuda":
        peak = cpu_peak(timed)
        return elapsed, peak
    torch.cuda.reset_peak_memory_stats(device)
    timed()
    return elapsed, torch.cuda.max_memory_allocated(device)


def decode_figures(engine: RolloutEngine, spans: Spans, contexts: list[int]) -> dict[str, float | None]:
    """Seconds of a decode step with its draw, and the least that reading weights, keys and values takes."""
    policy, shape = engine.policy, engine.policy.config
    seconds = sum(spans.seconds[name] for name in ("decode", "logits", "sampling", "manager")) / len(contexts)
    table, head = policy.model.get_input_embeddings().weight, policy.head["weight"]
    weights = sum(p.nbytes for p in policy.parameters() if p is head or p is not table)
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * head_dim * policy.model.dtype.itemsize
    traffic = weights + per_token * sum(contexts) / len(contexts)
    bandwidth = chip_of(engine.device).bandwidth
    floor = None if bandwidth is None else traffic / bandwidth
    return {
        "steps": len(contexts),
        "seconds_per_step": seconds,
        "bytes_per_step": traffic,
        "floor_per_step": floor,
        "of_floor": None if floor is None else floor / seconds,
    }


def measure_decode(setting: Setting, device: torch.device, running: int, steps: int = 64) -> dict[str, Any]:
    """So many decode steps of `running` sequences that all begin with a whole prompt."""
    gc.collect()  # the engine of another size: spans hold what they are around
    torch.manual_seed(0)
    placement = Placement.of(replace(setting.config.runtime, device=str(device)))
    policy = CausalModel(random_model(LlamaForCausalLM, setting.shape, placement), placement)
    prompt = setting.lengths.prompt
    config = RolloutConfig(max_response=steps, max_running=running)
    per_sequence = blocks_for(prompt + steps, config.block_size) + 1  # one to spare, or not all run at once
    config = replace(config, kv_blocks=1 + running * per_sequence)
    engine = RolloutEngine(policy, config, (), prompt)
    prompts = np.random.default_rng(0).integers(2, setting.shape.vocab_size, (running, prompt)).tolist()
    engine.generate(prompts, range(running))
    engine.forget()
    spans = Spans(device)
    contexts = watch_sampling(engine, spans)
    with spans("rollout, host"):
        engine.generate(prompts, range(running))
    figures = decode_figures(engine, spans, contexts)
    per_step = figures["seconds_per_step"]
    assert per_step is not None
    return {"running": running, "prompt": prompt, "tokens_per_second": running / per_step, **figures}


def show(result: dict[str, Any]) -> None:
    setting, console = result["setting"], Console()
    shape = f"{setting['prompts']} prompts of {setting['prompt']} + {setting['response']} tokens"
    table = Table("", "seconds", "share", title=f"{', '.join(setting['phases'])}: {shape}")
    for name, seconds in result["rows"].items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / result['seconds_with_spans']:.1%}")
    console.print(table)
    table = Table("", "seconds", "planned", "TFLOP/s", "of the chip's")
    for name, row in result["groups"].items():
        table.add_row(
            name, f"{row['seconds']:.3f}", *(
                "-" if row[key] is None else format(row[key] * factor, form)
                for key, factor, form in (("planned_seconds", 1, ".3f"), ("flops", 1e-12, ".3f"), ("mfu", 1, ".1%"))
            )
        )  # fmt: skip
    console.print(table)
    mfu = "" if result["mfu"] is None else f" ({result['mfu']:.1%} of the chip's)"
    print(
        f"undisturbed: {result['seconds']:.2f} s, {result['tokens_per_second']:,.0f} tokens/s, "
        f"{result['seconds_per_prompt']:.3f} s a prompt, "
        f"{1e-12 * result['flops']:.3f} TFLOP/s{mfu}, peak {result['peak_bytes'] / 2**20:,.0f} MiB; "
        f"not explained {result['not_explained']:.1%}"
    )
    if "decode" in result:
        show_decode([{"running": setting["prompts"], **result["decode"]}])
    for span, kinds in result.get("operators", {}).items():
        parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in kinds.items())
        print(f"{span}: {parts}")


def show_decode(sizes: list[dict[str, Any]]) -> None:
    for row in sizes:
        share = "" if row["of_floor"] is None else f", {row['of_floor']:.0%} of what the bandwidth allows"
        print(
            f"decode, at most {row['running']} sequences: {1e3 * row['seconds_per_step']:.2f} ms a step, "
            f"{row['bytes_per_step'] / 2**30:.2f} GiB{share}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="the CPU's shape on any device")
    parser.add_argument("--phases", nargs="+", choices=(*PHASES, "decode"), default=PHASES)
    parser.add_argument("--prompts", type=int, help="in an iteration")
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--running", type=int, nargs="+", default=[64, 128, 256], help="of --phases decode")
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    make = small_setting if arguments.small or device.type == "cpu" else reference_setting
    setting = make(**({"prompts": arguments.prompts} if arguments.prompts else {}))
    if "decode" in arguments.phases:
        sizes = [measure_decode(setting, device, running) for running in arguments.running]
        result: dict[str, Any] = {"environment": environment(), "device": device.type, "decode_sizes": sizes}
        show_decode(sizes)
    else:
        options = {name: getattr(arguments, name) for name in ("iterations", "warm_up", "profile")}
        result = measure(setting, device, arguments.phases, **options)
        show(result)
    if arguments.json:
        records.write(arguments.json, result)
    if result.get("not_explained", 0.0) > MOST_NOT_EXPLAINED:
        raise SystemExit(
            f"{result['not_explained']:.1%} of the time lies in no part: more than {MOST_NOT_EXPLAINED:.0%}"
        )


if __name__ == "__main__":
    main()
