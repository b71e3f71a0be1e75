"""The README's figures from the committed results, each with a digest of what it shows inside the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any, NamedTuple

import demo_seeds
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from ops import OURS
from PIL import Image

RESULTS = Path(__file__).parent / "results"
PLAIN = ("torch eager", "column loop", "sort and multinomial", "gather and SDPA")  # what others are relative to
COLOURS = {OURS: "#d1495b", "TRL": "#30638e", "TRL chunked": "#30638e", "transformers": "#8d99ae",
           "torch chunked": "#8d99ae", "torch compile": "#8d99ae", "Liger": "#edae49", "Liger chunked": "#edae49",
           "Liger with a copy": "#edae49", "cut cross entropy": "#66a182", "flash attn": "#7b506f"}  # fmt: skip
OTHER = "#b0b0b0"
LEAST = 1e-3  # smaller bars end there
DIGEST = "ppomax-results"
CAPTION: dict[str, Any] = {"fontsize": 8, "color": "#555555"}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white"}


class Plot(NamedTuple):
    data: Any  # JSON
    draw: Callable[[Any], Figure]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()


def plots() -> dict[Path, Plot]:
    """By the file that each goes to; those whose results are there."""
    result = measured("demo_seeds")
    data = {"seeds": result["seeds"], "where": where(result["environment"])}
    found = {RESULTS / "demo_seeds.png": Plot(data, demo)}
    for name in ("kernels_h200", "kernels_cpu"):
        if (RESULTS / f"{name}.json").exists():
            found[RESULTS / f"{name}.png"] = Plot(kernels_data(measured(name)), kernels)
    found[RESULTS / "engine_cpu.png"] = Plot(engine_data(), engine)
    return found


def save(path: Path, plot: Plot) -> None:
    with mpl.rc_context(STYLE):
        plot.draw(plot.data).savefig(path, dpi=120, metadata={DIGEST: plot.digest})


def is_current(path: Path, plot: Plot) -> bool:
    """Whether the file shows these results."""
    return path.exists() and Image.open(path).info.get(DIGEST) == plot.digest


def measured(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def where(environment: dict[str, Any], device: str = "cpu") -> str:
    machine = f"{environment['cpu']}, {environment['threads']} thread" if device == "cpu" else device
    return f"{machine}, torch {environment['torch']}, {environment['date']}"


def demo(data: dict[str, Any]) -> Figure:
    figure = demo_seeds.figure(data["seeds"])
    figure.supxlabel(f"held-out prompts; {data['where']}", **CAPTION)
    return figure


def kernels_data(report: dict[str, Any]) -> dict[str, Any]:
    """Each operation's times and memory relative to the plain way, by provider."""
    rows = []
    for op in report["ops"]:
        right = {name: p for name, p in op["providers"].items() if "ms" in p}
        plain = next((name for name in PLAIN if name in right), None)
        if plain is not None and OURS in right:
            base = right.pop(plain)
            rows.append({
                "label": f"{op['op']}\n{op['shape']}",
                "time": {name: p["ms"] / base["ms"] for name, p in right.items()},
                "memory": {name: held(p) / held(base) for name, p in right.items()},
            })  # fmt: skip
    return {"rows": rows, "where": where(report["environment"], report["device"])}


def held(provider: dict[str, Any]) -> int:
    """Peak bytes; resident memory is not known more closely than some pages."""
    return max(provider["peak_bytes"], 1 << 16)


def kernels(data: dict[str, Any]) -> Figure:
    """Bars from 1 to each provider's time, and to its memory, over those of the plain way: to the left is better."""
    rows = data["rows"]
    lines = sum(len(row["time"]) + 0.8 for row in rows)
    figure = Figure(figsize=(10, 1.2 + 0.2 * lines), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    for ax, kind in ((time, "time"), (memory, "memory")):
        grouped_bars(ax, [(row["label"], row[kind]) for row in rows])
        ax.set_title(f"{kind}, plain PyTorch = 1", fontsize=10)
    names = dict.fromkeys(name for row in rows for name in row["time"])
    handles = [Patch(color=COLOURS.get(name, OTHER), label=name) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=7, frameon=False)
    figure.supxlabel(f"left of 1 is less; {data['where']}", **CAPTION)
    return figure


def grouped_bars(ax: Axes, rows: Sequence[tuple[str, dict[str, float]]]) -> None:
    """A group a row, first at the top; logarithmic around 1."""
    place, ticks = 0.0, []
    for _, bars in rows:
        ticks.append(place + (len(bars) - 1) / 2)
        for i, (name, value) in enumerate(bars.items()):
            end, side = max(value, LEAST), 1 if value >= 1 else -1
            ax.barh(place + i, end - 1, 0.85, left=1, color=COLOURS.get(name, OTHER))
            ax.annotate(f"{value:.2g}", (end, place + i), (2 * side, 0), textcoords="offset points", va="center",
                        ha="left" if side > 0 else "right", fontsize=7)  # fmt: skip
        place += len(bars) + 0.8
    ax.axvline(1, color="black", lw=0.8)
    ax.set(xscale="log", yticks=ticks, yticklabels=[label for label, _ in rows])
    ax.tick_params(axis="y", labelsize=7, length=0)
    ax.set_ylim(place - 0.8, -0.8)
    low, high = ax.get_xlim()
    ax.set_xlim(low / 2, high * 2)


def engine_data() -> dict[str, Any]:
    rollout, trl = measured("rollout_cpu"), measured("vs_trl")
    cases = {
        name: {
            "seconds": {engine: median(case["seconds"][engine]) for engine in ("ppomax", "trl")},
            "MiB": {engine: case["peak_above_models"][engine] / 2**20 for engine in ("ppomax", "trl")},
        }
        for name, case in trl["cases"].items()
    }
    return {"rollouts": rollout["tokens_per_second"], "cases": cases,
            "where": [where(rollout["environment"]), where(trl["environment"])]}  # fmt: skip


def engine(data: dict[str, Any]) -> Figure:
    """Rollouts beside `generate`, and iterations beside TRL's trainer: seconds and memory."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    rollouts, seconds, memory = figure.subplots(1, 3, width_ratios=(1, 2, 2))
    names = list(data["rollouts"])
    bars = rollouts.bar(names, data["rollouts"].values(), 0.6, color=[COLOURS[name] for name in names])
    rollouts.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    rollouts.set_title("rollouts, tokens a second", fontsize=10)
    for ax, unit, title in ((seconds, "seconds", "an iteration, seconds"),
                            (memory, "MiB", "peak above the models, MiB")):  # fmt: skip
        for i, (engine, label) in enumerate((("ppomax", OURS), ("trl", "TRL"))):
            values = [case[unit][engine] for case in data["cases"].values()]
            places = [place + 0.4 * i for place in range(len(values))]
            bars = ax.bar(places, values, 0.38, color=COLOURS[label], label=label)
            ax.bar_label(bars, [f"{x:.3g}" if x < 100 else f"{x:,.0f}" for x in values], fontsize=8)
        ax.set_xticks([place + 0.2 for place in range(len(values))], [fill(name, 11) for name in data["cases"]])
        ax.set_title(title, fontsize=10)
    seconds.legend(frameon=False)
    for ax in (rollouts, seconds, memory):
        ax.tick_params(axis="x", labelsize=8, length=0)
    figure.supxlabel("; ".join(dict.fromkeys(data["where"])), **CAPTION)
    return figure
