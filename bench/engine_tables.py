"""The README's tables of the engine's speed, from the results of `bench_rollout.py`, `bench_kv_manager.py`,
`vs_trl.py` and `bench_adapters.py`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def measured(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def rollouts_table() -> str:
    result = measured("rollout_cpu")
    rates, seconds = result["tokens_per_second"], result["seconds"]
    lines = ["| | tokens/s | seconds |", "|---|---|---|"]
    for name, label in (("ppomax", "ppomax"), ("transformers", "`generate` of transformers, batches of 32")):
        lines.append(f"| {label} | {rates[name]:,.0f} | {median(seconds[name]):.1f} |")
    work = (
        f"{result['prompts']} prompts, {result['slots']} slots, {result['tokens']:,} tokens in responses of 8 to "
        f"{result['longest']} (log-normal, scripted ends), a Llama of H 256, 4 layers, V 4096: "
        f"**{result['speedup']:.1f} times** as fast."
    )
    return "\n".join([*lines, "", f"{work} {_where(result['environment'])}", "", _manager()])


def _manager() -> str:
    """What the C++ manager costs a step."""
    result = measured("kv_manager")
    steps = [f"{r['microseconds']['decode']['median']:.0f} at {r['sequences']}" for r in result["results"]]
    return (
        f"The manager takes {', '.join(steps)} sequences, microseconds per decode step (median; eviction and "
        f"copy-on-write included; `bench/bench_kv_manager.py`). {_where(result['environment'])}"
    )


def trl_table() -> str:
    result = measured("vs_trl")
    lines = [
        "| one iteration | ppomax | TRL 1.12 | times as fast | memory above the models, of TRL's |",
        "|---|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        ours, theirs = (median(case["seconds"][engine]) for engine in ("ppomax", "trl"))
        memory = case["peak_above_models"]
        share = f"{case['memory_ratio']:.2f} ({memory['ppomax'] / MIB:.0f} of {memory['trl'] / MIB:.0f} MiB)"
        lines.append(f"| {name} | {ours:.2f} s | {theirs:.2f} s | **{case['speedup']:.1f}** | {share} |")
    picture = "![rollouts and iterations beside transformers and TRL](bench/results/engine_cpu.png)"
    return "\n".join([*lines, "", _where(result["environment"]), "", picture])


def iteration_table() -> str:
    """Where the time of an iteration goes, by `bench_iteration.py`."""
    result = measured("iteration_cpu")
    setting, whole = result["setting"], result["seconds_with_spans"]
    lines = ["| part of an iteration | seconds | share |", "|---|---|---|"]
    for name, seconds in result["rows"].items():
        if seconds >= 0.0005 * whole:
            lines.append(f"| {name} | {seconds:.3f} | {seconds / whole:.1%} |")
    note = (
        f"{setting['prompts']} prompts of {setting['prompt']} + {setting['response']} tokens, four Llamas of H 256, "
        f"4 layers, V 4096: {result['tokens_per_second']:,.0f} tokens/s. {_where(result['environment'])}"
    )
    return "\n".join([*lines, "", note])


def communication_table() -> str:
    """What travels, by the model of `bench_communication.py`."""
    result = measured("communication")
    lines = [
        "| GPUs | processes that share a copy | sent by each in an iteration, GB | seconds | of the compute's time |",
        "|---|---|---|---|---|",
    ]
    for row in result["model"]:
        lines.append(
            f"| {row['gpus']} | {row['shard_size']} | {row['sent_GB']:.0f} | {row['seconds']:.1f} | "
            f"{row['share_of_target']:.0%} |"
        )
    counted = sum(row["bytes"] for row in result["rows"]) / 1e6
    gap = max(abs(row["bytes"] - row["predicted"]) for row in result["rows"] if row["predicted"] is not None)
    note = (
        f"A **model**, nothing of this table was measured. Its formula, for the {counted:.0f} MB that 2 processes of a "
        f"tiny model exchange in an iteration, is off by {gap:.0f} bytes. {_where(result['environment'])}"
    )
    return "\n".join([*lines, "", note])


def adapters_table() -> str:
    lines = ["| trainer | function | before, ms | with ours, ms | peak memory, of before |", "|---|---|---|---|---|"]
    result = measured("adapters_cpu")
    for trainer, report in result.items():
        for name, figures in report["functions"].items():
            ms, peak = figures["ms"], figures["peak_bytes"]
            share = peak["ppomax"] / max(peak["peer"], 1)
            lines.append(f"| {trainer} | `{name}` | {ms['peer']:.0f} | {ms['ppomax']:.0f} | {share:.2f} |")
    return "\n".join([*lines, "", f"{_where(next(iter(result.values()))['environment'])} Unmeasured on a GPU."])


def _where(environment: dict[str, Any]) -> str:
    return (
        f"{environment['cpu']}, {environment['threads']} thread, torch {environment['torch']}, {environment['date']}."
    )
