"""Every operation beside other ways to compute it: milliseconds, bandwidth or FLOP/s, share of the floor, peak memory.

    python bench/bench_kernels.py [--device cuda|cpu] [--json FILE] [--only NAME ...] [--samples 30] [--quick] [--check]

On a GPU at the reference shapes, against torch eager, torch.compile and what is installed of Liger, TRL,
cut-cross-entropy and flash-attn; on a CPU at smaller shapes, with one thread. Each provider is first held against
float64, and one whose error exceeds the operation's tolerance is not timed. Samples of all providers alternate; on a
GPU L2 is flushed before each. Figures are medians.

The floor is the longer of bytes / 4.3 TB/s (each input read once, each output written once) and FLOPs / 790 TFLOP/s,
the copy bandwidth and the bf16 matrix rate that an H200 was seen to reach. It is stated on an H200 alone, and so are
the gates that our kernels are held to. Peak memory is beside the inputs: torch's allocator on a GPU, resident memory
on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import suites
import torch
from environment import environment
from ops import OURS, Inputs, Op, bound, copied
from rich.console import Console
from rich.table import Table
from timing import cpu_peak, cpu_times, cuda_peak, cuda_times

CEILINGS = {"bytes_per_second": 4.3e12, "flops_per_second": 790e12}  # of an H200
CEILINGS_OF = "H200"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after each operation")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="operations whose name contains these")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60.0, help="on a CPU, fewer samples than would take longer")
    parser.add_argument("--quick", action="store_true", help="small shapes; no floor, no gates")
    parser.add_argument("--check", action="store_true", help="ours at odd sizes against float64; nothing is timed")
    arguments = parser.parse_args()
    if arguments.samples < 2:
        parser.error("--samples: at least 2")
    on_gpu, quick = arguments.device == "cuda", arguments.quick
    if on_gpu and not torch.cuda.is_available():
        sys.exit("bench/bench_kernels.py --device cuda: torch sees no GPU here")
    torch.set_num_threads(1)
    if arguments.check:
        sys.exit(check(suites.small(arguments.device)))
    ops = suites.reference("cuda", quick=quick) if on_gpu else suites.cpu(quick=quick)
    report = run([op for op in ops if any(part in op.name for part in arguments.only)], arguments)
    show(report)
    wrong = [op["op"] for op in report["ops"] if "failed" in op["providers"][OURS]]
    if wrong:
        sys.exit(f"ours failed in: {', '.join(wrong)}")


def check(ops: Sequence[Op]) -> int:
    """1 where an operation of ours is wrong, 0 else."""
    failures = 0
    for op in ops:
        torch.manual_seed(0)
        ours = {name: provider for name, provider in op.providers.items() if OURS in name}
        for name, entry in correctness(op._replace(providers=ours), op.inputs()).items():
            failures += "failed" in entry
            print(f"{entry.get('failed', 'ok')}: {op.name}, {op.shape}, {name}, error {entry.get('error')}")
    return int(failures > 0)


def run(ops: Sequence[Op], arguments: argparse.Namespace) -> dict[str, Any]:
    """{"environment", "device", "ceilings" or None, "ops": one entry an operation, "gates"}, also into the file."""
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    known = CEILINGS_OF in device and not arguments.quick
    ceilings = CEILINGS if known else None
    report: dict[str, Any] = {"environment": environment(), "device": device, "ceilings": ceilings, "ops": []}
    for op in ops:
        report["ops"].append(measured(op, arguments, known))
        report["gates"] = gates(ops, report["ops"]) if known else {}
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def measured(op: Op, arguments: argparse.Namespace, known: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = op.inputs()
    entries = correctness(op, inputs)
    functions = {name: bound(op.providers[name], inputs) for name, entry in entries.items() if "failed" not in entry}
    if arguments.device == "cuda":
        times, peak = cuda_times(functions, arguments.samples), cuda_peak
    else:
        times, peak = cpu_times(functions, arguments.samples, seconds=arguments.seconds), cpu_peak
    floor = floor_ms(op) if known else None
    for name, function in functions.items():
        entries[name] |= figures(op, times[name], floor) | {"peak_bytes": peak(function)}
    return {"op": op.name, "shape": op.shape, "tolerance": op.tolerance, "floor_ms": floor, "providers": entries}


def floor_ms(op: Op) -> float:
    return max(op.bytes / CEILINGS["bytes_per_second"], op.flops / CEILINGS["flops_per_second"]) * 1e3


def correctness(op: Op, inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Each provider's error on inputs of its own; "failed" says why it is not timed."""
    entries: dict[str, dict[str, Any]] = {}
    try:
        judged = op.judge(**inputs)
    except Exception as failure:
        return {name: {"failed": f"no exact result: {_first_line(failure)}"} for name in op.providers}
    for name, provider in op.providers.items():
        try:
            error = judged(provider(**copied(inputs)))
        except Exception as failure:  # out of memory, a peer that does not run here: the others are still of interest
            entries[name] = {"failed": _first_line(failure)}
            continue
        entries[name] = {"error": error} if error <= op.tolerance else {"error": error, "failed": "wrong"}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return entries


def _first_line(failure: Exception) -> str:
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"


def figures(op: Op, times: Sequence[float], floor_ms: float | None) -> dict[str, Any]:
    low, middle, high = quantiles(times, n=4)
    result: dict[str, Any] = {"ms": median(times), "quartiles_ms": [low, high], "samples": len(times)}
    if op.flops:
        result["tflops"] = op.flops / middle / 1e9
    else:
        result["gb_per_second"] = op.bytes / middle / 1e6
    return result if floor_ms is None else result | {"of_floor": floor_ms / middle}


def gates(ops: Sequence[Op], entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
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


def show(report: dict[str, Any]) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=150)
    table = Table("operation", "provider", "ms", "rate", "of floor", "peak MB", "error", title=report["device"])
    for op in report["ops"]:
        floor = "" if op["floor_ms"] is None else f"\nfloor {op['floor_ms']:.3f} ms"
        for i, (name, entry) in enumerate(op["providers"].items()):
            label = f"{op['op']}\n{op['shape']}{floor}" if i == 0 else ""
            table.add_row(label, name, *_cells(entry), end_section=i == len(op["providers"]) - 1)
    console.print(table)
    for name, gate in report["gates"].items():
        verdict = "[green]pass[/]" if gate["pass"] else "[red]FAIL[/]"
        console.print(f"{verdict} {name}: {gate['ms']} ms, at most {gate['limit_ms']:.3f}")


def _cells(entry: dict[str, Any]) -> list[str]:
    error = f"{entry['error']:.1e}" if "error" in entry else ""
    if "failed" in entry:
        return [f"[red]{entry['failed'][:60]}[/]", "", "", "", error]
    rate = f"{entry['tflops']:.3g} TFLOP/s" if "tflops" in entry else f"{entry['gb_per_second']:.4g} GB/s"
    share = f"{entry['of_floor']:.0%}" if "of_floor" in entry else ""
    return [f"{entry['ms']:.4g}", rate, share, f"{entry['peak_bytes'] / 1e6:.4g}", error]


if __name__ == "__main__":
    main()
