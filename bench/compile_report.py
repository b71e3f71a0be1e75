"""What the Triton kernels become on GPUs that need not be there: compiled ahead of time, their machine code read.

    python bench/compile_report.py [--chips sm_80 sm_90 sm_100 ...] [--only NAME ...] [--json FILE] [--jobs 2]

Every operation is called at its reference shapes on tensors without memory, and each kernel that it would launch is
compiled for each chip as the JIT would there: registers, local memory (spills), shared memory (red where the chip has
less), the width of global accesses, matrix instructions. A second table holds the bytes that the operation moves and
the FLOPs of torch's matrix products in it against the least possible. Bytes: of each launch the tensors that it loads
and those that it stores, each once; of each torch operation its inputs and results. Nothing here is a measurement of
time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as `launch` asks; versions of Triton differ in the default

import torch
import triton
from compiled import Resources, compile_launch, is_narrow, specialised, traffic, wide_share
from counting import TorchWork
from environment import environment
from ops import OURS, Op
from ppomax.kernels.gpu.launch import MULTIPROCESSORS, Launch, recording
from rich.console import Console
from rich.table import Table
from suites import configured

# Beside having no spills, kernels are held to moving at least 90 % of their bytes in 16-byte accesses ("wide"), those
# of MATMUL to matrix instructions instead ("matrix"), attention to both. Those that work on a few values a row, or on
# values that the data choose (a draw, elements in the order of an index), are held to nothing more.
MATMUL = {"linear_statistics"}
ATTENTION = {"paged_attention"}
SMALL = {"logprobs_merge", "linear_merge", "ppo_finish", "whiten_merge", "paged_attention_merge",
         "sample_draw"}  # fmt: skip


def held_to(launch: Launch) -> list[str]:
    name = launch.kernel.__name__
    indexed = launch.arguments.get("order_ptr") is not None
    wide = [] if name in MATMUL | SMALL or indexed else ["wide"]
    halves = any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in launch.arguments.values())
    return [*wide, "matrix"] if name in MATMUL or (name in ATTENTION and halves) else wide


CHIPS = ["sm_80", "sm_90", "sm_100"]
# KiB of shared memory that a program can have: CUDA C++ Programming Guide, technical specifications per capability
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}


class Recorded(NamedTuple):
    """An operation on a chip: its launches by the key of the kernel they need, and what torch does between them."""

    op: Op
    provider: str
    chip: str
    launches: list[tuple[str, Launch]]
    configurations: list[tuple[str, dict[str, int]]]
    torch: TorchWork


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=CHIPS, choices=list(MULTIPROCESSORS))
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="operations whose name contains these")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes that compile")
    arguments = parser.parse_args()
    refuse_the_interpreter()
    ops = [op for op in configured("meta") if any(part in op.name for part in arguments.only)]
    report = make_report(ops, arguments.chips, arguments.jobs)
    show(report)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if report["failed"]:
        sys.exit("\n".join(f"{name}: {why}" for name, why in report["failed"].items()))


def refuse_the_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise SystemExit("TRITON_INTERPRET is set: such a process interprets kernels and compiles none; unset it")


def make_report(ops: Sequence[Op], chips: Sequence[str], jobs: int) -> dict[str, Any]:
    """{"environment", "triton", "kernels": one entry a compiled kernel, "ops": one an operation and chip,
    "configurations": those of configs.json that were launched with, "failed": {kernel and chip: why}}."""
    recorded = [record(op, name, chip) for chip in chips for op in ops for name in op.providers if OURS in name]
    units = {key: (launch, each.chip) for each in recorded for key, launch in each.launches}
    results = dict(zip(units, compile_all(list(units.values()), jobs), strict=True))
    found = {key: result for key, result in results.items() if isinstance(result, Resources)}
    failed = {key: result for key, result in results.items() if isinstance(result, str)}
    first = {key: each.op for each in reversed(recorded) for key, _ in each.launches}
    return {
        "environment": environment(),
        "triton": triton.__version__,
        "kernels": [kernel_entry(first[key], units[key][1], units[key][0], found[key]) for key in found],
        "ops": [op_entry(each, found) for each in recorded if all(key in found for key, _ in each.launches)],
        "configurations": configurations(recorded),
        "failed": {f"{units[key][0].kernel.__name__} on {units[key][1]}": why for key, why in failed.items()},
    }


def record(op: Op, provider: str, chip: str) -> Recorded:
    """`op` has its inputs on "meta"."""
    inputs = op.inputs()
    with recording(chip) as launches, TorchWork() as work:
        op.providers[provider](**inputs)
    keyed = [(specialised(launch, chip).key, launch) for launch in launches]
    return Recorded(op, provider, chip, keyed, launches.configurations, work)


_units: list[tuple[Launch, str]] = []  # in the compiling processes, which inherit it: kernels cannot be pickled


def _hold(units: list[tuple[Launch, str]]) -> None:
    _units[:] = units


def _compile(index: int) -> Resources | str:
    launch, chip = _units[index]
    try:
        return compile_launch(launch, chip)
    except Exception as error:  # the other kernels are still of interest
        return "".join(traceback.format_exception(error))[-2000:]


def compile_all(units: list[tuple[Launch, str]], jobs: int) -> list[Resources | str]:
    """What each unit became, or why it did not compile."""
    with ProcessPoolExecutor(jobs, get_context("fork"), initializer=_hold, initargs=(units,)) as pool:
        return list(pool.map(_compile, range(len(units))))


def kernel_entry(op: Op, chip: str, launch: Launch, found: Resources) -> dict[str, Any]:
    name = launch.kernel.__name__
    constants = {p.name: launch.arguments.get(p.name) for p in launch.kernel.params if p.is_constexpr}
    narrow = {access.argument for access in found.accesses if is_narrow(launch, access)}
    return {
        "kernel": name,
        "held_to": held_to(launch),
        "op": op.name,
        "shape": op.shape,
        "chip": chip,
        "shared_fits": found.shared <= SHARED_KIB[chip] * 1024,
        **launch.options,
        "constants": constants,
        **{field: value for field, value in found._asdict().items() if field != "accesses"},
        "wide_share": wide_share(launch, found),
        "narrow": sorted(narrow),
    }


def op_entry(recorded: Recorded, found: dict[str, Resources]) -> dict[str, Any]:
    op = recorded.op
    moved = sum(traffic(launch, found[key]) for key, launch in recorded.launches)
    return {
        "op": op.name,
        "provider": recorded.provider,
        "shape": op.shape,
        "chip": recorded.chip,
        "launches": len(recorded.launches),
        "triton_bytes": moved,
        "torch_bytes": recorded.torch.bytes,
        "floor_bytes": op.bytes,
        "flops": recorded.torch.flops,
        "floor_flops": op.flops,
    }


def configurations(recorded: Sequence[Recorded]) -> list[dict[str, Any]]:
    entries = [{"chip": each.chip, "name": name, **config} for each in recorded for name, config in each.configurations]
    return [entry for i, entry in enumerate(entries) if entry not in entries[:i]]


def show(report: dict[str, Any]) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=170)
    kernels = Table("kernel", "chip", "warps/stages", "registers", "local", "shared", "widest", "in 16 B", "narrow",
                    "matrix", title=f"Triton {report['triton']}")  # fmt: skip
    for k in report["kernels"]:
        kernels.add_row(
            _label(k), k["chip"], f"{k['num_warps']}/{k['num_stages']}", str(k["registers"]),
            f"[red]{k['local']}[/]" if k["local"] else "0",
            str(k["shared"]) if k["shared_fits"] else f"[red]{k['shared']}[/]",
            "bulk" if k["bulk"] else str(k["widest"]),
            f"{k['wide_share']:.1%}", " ".join(k["narrow"]), " ".join(k["matrix"]),
        )  # fmt: skip
    console.print(kernels)
    ops = Table(
        "operation", "", "shape", "chip", "launches", "GB in Triton", "in torch", "of floor", "TFLOP", "of floor"
    )
    for o in report["ops"]:
        moved = o["triton_bytes"] + o["torch_bytes"]
        flops = (f"{o['flops'] / 1e12:.3g}", f"{o['flops'] / o['floor_flops']:.2f}") if o["floor_flops"] else ("", "")
        ops.add_row(
            o["op"], o["provider"], o["shape"], o["chip"], str(o["launches"]), f"{o['triton_bytes'] / 1e9:.4g}",
            f"{o['torch_bytes'] / 1e9:.4g}", f"{moved / o['floor_bytes']:.2f}", *flops,
        )  # fmt: skip
    console.print(ops)


def _label(kernel: dict[str, Any]) -> str:
    blocks = (f"{name[6:] if name.startswith('BLOCK_') else name}={value}"
              for name, value in kernel["constants"].items() if isinstance(value, int))  # fmt: skip
    return f"{kernel['kernel']} {' '.join(blocks)}"


if __name__ == "__main__":
    main()
