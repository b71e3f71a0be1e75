"""Every operation beside other ways to compute it: milliseconds, bandwidth or FLOP/s, share of the floor, peak memory.

    python bench/bench_kernels.py [--device cuda|cpu] [--json FILE] [--only NAME ...] [--samples 30] [--quick] [--check]

On a GPU at the reference shapes, against torch eager, torch.compile and what is installed of Liger, TRL,
cut-cross-entropy and flash-attn; on a CPU at smaller shapes, with one thread, some eight minutes. Each provider is
first held against float64, and one whose error exceeds the operation's tolerance is not timed. Samples of all providers
alternate; on a GPU L2 is flushed before each. Figures are medians, and the file keeps the samples for `compare.py`.
Floors, and the gates that our kernels are held to, are stated on an H200 alone (`measure.py`).

`pytest bench --benchmark-only` runs the same cases, and the manager, rollouts and an iteration beside them, in less
time (without the largest vocabulary on a CPU).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import records
import suites
import torch
from environment import environment, peers
from measure import CEILINGS, Entry, Plan, correctness, gates, is_known, measured
from ops import OURS, Op
from rich.console import Console
from rich.table import Table
from timing import settle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after each operation")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="operations whose name contains these")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=5.0, help="on a CPU, fewer samples than would take longer")
    parser.add_argument("--quick", action="store_true", help="small shapes; no floor, no gates")
    parser.add_argument("--check", action="store_true", help="ours at odd sizes against float64; nothing is timed")
    arguments = parser.parse_args()
    if arguments.samples < 2:
        parser.error("--samples: at least 2")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench/bench_kernels.py --device cuda: torch sees no GPU here")
    settle()
    if arguments.check:
        sys.exit(check(suites.small(arguments.device)))
    ops = suites.of(arguments.device, quick=arguments.quick, full=not arguments.quick)
    plan = Plan(arguments.device, arguments.samples, arguments.seconds, is_known(arguments.device, arguments.quick))
    report = run([op for op in ops if any(part in op.name for part in arguments.only)], plan, arguments.json)
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


def run(ops: Sequence[Op], plan: Plan, path: Path | None) -> dict[str, Any]:
    """{"environment", "peers", "device", "ceilings" or None, "ops": one entry an operation, "gates", "samples_ms"},
    also into the file."""
    ceilings = CEILINGS if plan.known else None
    report: dict[str, Any] = {"environment": environment(), "peers": peers(), "device": device_name(plan.device),
                              "ceilings": ceilings, "ops": [], "gates": {}, "samples_ms": {}}  # fmt: skip
    for op in ops:
        entry, report["samples_ms"][op.title] = measured(op, plan)
        report["ops"].append(entry)
        if plan.known:
            report["gates"] = gates(ops, report["ops"])
        if path is not None:
            records.write(path, report)
    return report


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


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


def _cells(entry: Entry) -> list[str]:
    error = f"{entry['error']:.1e}" if "error" in entry else ""
    if "skipped" in entry:
        return [f"[dim]{entry['skipped'][:60]}[/]", "", "", "", ""]
    if "failed" in entry:
        return [f"[red]{entry['failed'][:60]}[/]", "", "", "", error]
    rate = f"{entry['tflops']:.3g} TFLOP/s" if "tflops" in entry else f"{entry['gb_per_second']:.4g} GB/s"
    share = f"{entry['of_floor']:.0%}" if "of_floor" in entry else ""
    return [f"{entry['ms']:.4g}", rate, share, f"{entry['peak_bytes'] / 1e6:.4g}", error]


if __name__ == "__main__":
    main()
