"""The README's table of the operations' speed, from the results of `bench_kernels.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import suites
from measure import floor_ms
from ops import OURS

RESULTS = Path(__file__).parent / "results"
GPU, CPU = RESULTS / "kernels_h200.json", RESULTS / "kernels_cpu.json"
UNMEASURED = "unmeasured on a GPU"


def table() -> str:
    """Markdown: the reference shapes on an H200 with their floors, then a CPU's."""
    lines = ["| operation | shape | floor, H200 | ppomax | others | where |", "|---|---|---|---|---|---|"]
    gpu, cpu = (json.loads(path.read_text()) if path.exists() else None for path in (GPU, CPU))
    known = {(op["op"], op["shape"]): op for op in gpu["ops"]} if gpu else {}
    for op in suites.reference("meta"):
        entry = known.get((op.name, op.shape))
        cells = _cells(entry) if entry else (UNMEASURED, "")
        lines.append(_line(op.name, op.shape, f"{floor_ms(op):.3g} ms", *cells, "H200"))
    for entry in cpu["ops"] if cpu else []:
        lines.append(_line(entry["op"], entry["shape"], "", *_cells(entry), "CPU"))
    notes = [_note(report) for report in (gpu, cpu) if report]
    return "\n".join([*lines, "", *notes, *(_picture(path) for path in (GPU, CPU) if path.exists())])


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(entry: dict[str, Any]) -> tuple[str, str]:
    """(ours, the others), each time and memory."""
    figures = {name: _figure(provider) for name, provider in entry["providers"].items() if "skipped" not in provider}
    ours = figures.pop(OURS)
    return ours, "<br>".join(f"{name}: {figure}" for name, figure in figures.items())


def _figure(provider: dict[str, Any]) -> str:
    if "ms" not in provider:
        return provider["failed"].split(":")[0]
    return f"{provider['ms']:.3g} ms, {provider['peak_bytes'] / 1e6:.3g} MB"


def _picture(path: Path) -> str:
    return f"\n![time and memory of each provider over the plain way's](bench/results/{path.stem}.png)"


def _note(report: dict[str, Any]) -> str:
    where = report["environment"]
    machine = f"{where['cpu']}, {where['threads']} thread" if report["device"] == "cpu" else report["device"]
    samples = [p["samples"] for op in report["ops"] for p in op["providers"].values() if "samples" in p]
    others = "".join(f", {name} {version}" for name, version in report.get("peers", {}).items())
    return (
        f"Medians of {min(samples)} to {max(samples)} alternating samples and peak memory beside the inputs; "
        f"{machine}, torch {where['torch']}{others}, {where['date']}."
    )
