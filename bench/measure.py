"""An operation's providers beside each other: errors first, then times and memory of those that are right.

Samples of all providers alternate. The floor is the longer of bytes / 4.3 TB/s (each input read once, each output
written once) and FLOPs / 790 TFLOP/s, the copy bandwidth and the bf16 matrix rate that an H200 was seen to reach.
Peak memory is beside the inputs: torch's allocator on a GPU, resident memory on a CPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple, TypeAlias

import torch
from ops import OURS, Absent, Inputs, Op, Results, bound, copied
from timing import cpu_peak, cpu_times, cuda_peak, cuda_times

CEILINGS = {"bytes_per_second": 4.3e12, "flops_per_second": 790e12}  # of an H200
CEILINGS_OF = "H200"
SLOW = 2.0  # seconds: beside the time and memory of such a call, what a first one sets up is little

Entry: TypeAlias = dict[str, Any]
Samples: TypeAlias = dict[str, list[float]]  # milliseconds by provider


class Plan(NamedTuple):
    """How to measure. `known`: on a chip whose ceilings are known, at the reference shapes."""

    device: str
    samples: int = 30
    seconds: float = 5.0  # on a CPU: fewer samples where they would take longer, but Op.least
    known: bool = False


def is_known(device: str, quick: bool) -> bool:
    return device == "cuda" and not quick and CEILINGS_OF in torch.cuda.get_device_name()


def measured(op: Op, plan: Plan) -> tuple[Entry, Samples]:
    """(the operation's entry in a result file, the samples behind its figures)."""
    torch.manual_seed(0)
    inputs = op.inputs()
    entries = correctness(op, inputs, first_call if plan.device == "cpu" else call)
    right = [name for name, entry in entries.items() if entry.keys().isdisjoint({"failed", "skipped"})]
    functions = {name: bound(op.providers[name], inputs) for name in right}
    if plan.device == "cuda":
        samples = cuda_times(functions, plan.samples)
        peaks = {name: cuda_peak(function) for name, function in functions.items()}
    else:  # each has run once: that was its warm-up, or where all are slow a round of samples
        first = {name: entries[name].pop("first_ms", None) for name in right}
        peaks = {name: entries[name].pop("peak_bytes", None) or cpu_peak(functions[name]) for name in right}
        done = int(None not in first.values())
        samples = cpu_times(functions, plan.samples - done, least=op.least - done, seconds=plan.seconds)
        if done:
            samples = {name: [first[name], *samples[name]] for name in right}
    floor = floor_ms(op) if plan.known else None
    for name in right:
        entries[name] |= figures(op, samples[name], floor) | {"peak_bytes": peaks[name]}
    entry = {"op": op.name, "shape": op.shape, "tolerance": op.tolerance, "floor_ms": floor, "providers": entries}
    return entry, samples


def call(run: Callable[[], Results]) -> tuple[Results, Entry]:
    return run(), {}


def first_call(run: Callable[[], Results]) -> tuple[Results, Entry]:
    """(results, milliseconds and peak memory of a call so slow that another one for these would be a waste)."""
    results: list[Any] = []
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        started = time.perf_counter()
        results.extend(run())
        seconds = time.perf_counter() - started

    peak = cpu_peak(timed)
    return results, {"first_ms": 1e3 * seconds, "peak_bytes": peak} if seconds > SLOW else {}


def correctness(op: Op, inputs: Inputs, calling: Callable[..., tuple[Results, Entry]] = call) -> dict[str, Entry]:
    """Each provider's error on inputs of its own, and what `calling` finds besides. "failed" says why it is not timed,
    "skipped" why it cannot be."""
    try:
        judged = op.judge(**inputs)
    except Exception as failure:
        return {name: {"failed": f"no exact result: {_first_line(failure)}"} for name in op.providers}
    entries: dict[str, Entry] = {}
    for name, provider in op.providers.items():
        if isinstance(provider, Absent):
            entries[name] = {"skipped": provider.reason}
            continue
        try:
            results, found = calling(bound(provider, copied(inputs)))
        except Exception as failure:  # out of memory, a peer that does not run here: the others are still of interest
            entries[name] = {"failed": _first_line(failure)}
            continue
        error = judged(results)
        entries[name] = {"error": error, **found} if error <= op.tolerance else {"error": error, "failed": "wrong"}
        del results
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    return entries


def _first_line(failure: Exception) -> str:
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"


def floor_ms(op: Op) -> float:
    return max(op.bytes / CEILINGS["bytes_per_second"], op.flops / CEILINGS["flops_per_second"]) * 1e3


def figures(op: Op, times: Sequence[float], floor_ms: float | None) -> Entry:
    low, middle, high = quantiles(times, n=4)
    result: Entry = {"ms": median(times), "quartiles_ms": [low, high], "samples": len(times)}
    if op.flops:
        result["tflops"] = op.flops / middle / 1e9
    else:
        result["gb_per_second"] = op.bytes / middle / 1e6
    return result if floor_ms is None else result | {"of_floor": floor_ms / middle}


def gates(ops: Sequence[Op], entries: Sequence[Entry]) -> dict[str, Entry]:
    """What ours is held to on an H200: {operation: {"ms", "limit_ms", "pass"}}."""
    ours = {entry["op"]: entry["providers"][OURS].get("ms") for entry in entries}
    limits = {op.name: op.gate_ms for op in ops if op.gate_ms is not None}
    for op in ops:
        if op.gate_of is not None and ours.get(op.gate_of[0]) is not None:
            limits[op.name] = op.gate_of[1] * ours[op.gate_of[0]]
    return {
        name: {"ms": ours[name], "limit_ms": limit, "pass": ours[name] is not None and ours[name] <= limit}
        for name, limit in limits.items()
        if name in ours
    }
