"""What people look at: curves, tables and samples of finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from .checkpoint import atomic_file
from .errors import InputError
from .evaluation import Answers, Evaluation
from .metrics import read_metrics
from .templates import Template

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One set of axes: what it shows, and the metric of a held-out measurement to prefer where there is one."""

    title: str
    metric: str
    held_out: str | None = None
    log: bool = False


PANELS = (
    Panel("reward", "reward/score_mean", "eval/score_mean"),
    Panel("judge's score (not optimised)", "reward/judge_mean", "eval/judge_mean"),
    Panel("KL to the reference, nats per response", "kl/ref_per_response", "eval/kl/ref_per_response"),
    Panel("response length, tokens", "response/length_mean", "eval/response/length_mean"),
    Panel("perplexity under the policy", "ppl/policy", "eval/ppl/policy"),
    Panel("perplexity under the reference", "ppl/reference", "eval/ppl/reference"),
    Panel("policy loss", "policy/loss"),
    Panel("value loss", "critic/loss", log=True),
)


def plot_curves(runs: Mapping[str, Path], path: Path) -> None:
    """Draw the PPO curves of run folders (name -> folder) into one PNG.

    Thin lines are the training batches; points are the held-out prompts, where the run measured them.
    Raises InputError where no run has finished a PPO iteration, or the name is not one of a PNG.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: expected a name that ends in .png")
    records = {
        name: [record for record in read_metrics(folder / "metrics.jsonl") if record["stage"] == "ppo"]
        for name, folder in runs.items()
    }
    panels = [panel for panel in PANELS if any(panel.metric in record for run in records.values() for record in run)]
    if not panels:
        raise InputError(f"{', '.join(map(str, runs.values())) or 'report'}: expected runs of PPO, found no iteration")
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, layout="constrained")
    for panel, ax in zip(panels, axes.flat, strict=False):
        _draw(ax, panel, records)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    axes.flat[0].legend(fontsize=8)
    with atomic_file(path) as draft:
        figure.savefig(draft, dpi=110, format="png")
    plt.close(figure)


def _draw(ax: Axes, panel: Panel, records: Mapping[str, Records]) -> None:
    for index, (name, run) in enumerate(records.items()):
        color = f"C{index}"
        ax.plot(*_series(run, panel.metric), color=color, lw=1, label=name)
        if panel.held_out and (points := _series(run, panel.held_out))[0]:
            ax.plot(*points, "o", color=color, ms=3, label=f"{name}, held-out prompts")
    ax.set_title(panel.title, fontsize=9)
    ax.set_xlabel("PPO iteration", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3)
    if panel.log:
        ax.set_yscale("log")


def _series(records: Records, metric: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[metric]) for record in records if metric in record]
    return [step for step, _ in points], [value for _, value in points]


ROWS = (
    ("KL to the baseline, nats per response", "kl/ref_per_response", "{:.2f}"),
    ("KL to the baseline, nats per token", "kl/ref", "{:.4f}"),
    ("perplexity under itself", "ppl/policy", "{:.3f}"),
    ("perplexity under the baseline", "ppl/reference", "{:.3f}"),
    ("response length, tokens", "response/length_mean", "{:.1f}"),
    ("cut off at the limit", "response/cut_off", "{:.1%}"),
)


def evaluation_rows(baseline: str, evaluations: Mapping[str, Evaluation]) -> list[list[str]]:
    """The comparison as rows of cells, header first: the baseline, then each policy."""
    names, sides = _sides(baseline, evaluations)
    rows = [["", *names]]
    for judge in sides[0].scores:
        rows.append([f"{judge}, mean", *(f"{side.scores[judge].mean():.3f}" for side in sides)])
        rows.append([f"{judge}, gain and 95 % interval", "", *(_gain(e, judge) for e in evaluations.values())])
        rows.append([f"{judge}, win / tie / lose", "", *(_win_rate(e, judge) for e in evaluations.values())])
    summaries = [side.summary() for side in sides]
    rows += [[label, *(form.format(summary[name]) for summary in summaries)] for label, name, form in ROWS]
    return rows


def _sides(baseline: str, evaluations: Mapping[str, Evaluation]) -> tuple[list[str], list[Answers]]:
    """The columns of a table: the baseline, then each policy."""
    any_evaluation = next(iter(evaluations.values()))
    return [baseline, *evaluations], [any_evaluation.baseline, *(e.policy for e in evaluations.values())]


def _gain(evaluation: Evaluation, judge: str) -> str:
    mean, half = evaluation.gain(judge)
    return f"{mean:+.3f} ± {half:.3f}"


def _win_rate(evaluation: Evaluation, judge: str) -> str:
    rate = evaluation.win_rate(judge)
    return f"{rate.win:.0%} / {rate.tie:.0%} / {rate.lose:.0%}"


def terminal_table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """Rows of cells, header first, for the terminal."""
    table = Table(*rows[0], title=title)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, header first, as Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def samples_rows(
    baseline: str, evaluations: Mapping[str, Evaluation], template: Template, count: int
) -> list[list[str]]:
    """The first `count` prompts with every side's answer and its scores, as rows of cells, header first."""
    names, sides = _sides(baseline, evaluations)
    rows = [["prompt", *names]]
    for index, prompt in enumerate(sides[0].prompts[:count]):
        answers = (_answer(side, index, template) for side in sides)
        rows.append([_cell(prompt.messages[-1]["content"]), *answers])
    return rows


def _answer(side: Answers, index: int, template: Template) -> str:
    scores = ", ".join(f"{judge} {scores[index]:.2f}" for judge, scores in side.scores.items())
    return f"{_cell(template.decode(side.rollouts[index].response))} ({scores})"


def _cell(text: str) -> str:
    return " ".join(text.split())


def show_evaluation(
    baseline: str,
    evaluations: Mapping[str, Evaluation],
    template: Template,
    samples: int,
    out: Path | None,
    figure: str = "",
) -> None:
    """Print the comparison and the first answers; write both as Markdown where `out` says where.

    `figure`: an image beside `out` to show in it.
    """
    rows = evaluation_rows(baseline, evaluations)
    shown = samples_rows(baseline, evaluations, template, samples)
    title = f"{len(next(iter(evaluations.values())).baseline.prompts)} held-out prompts, one answer each"
    console = Console()
    console.print(terminal_table(title, rows))
    if samples:
        console.print(terminal_table("answers (scores)", shown))
    if out is not None:
        with atomic_file(out) as draft:
            image = f"\n![curves]({figure})\n" if figure else ""
            text = f"{title}\n\n{markdown_table(rows)}\n{markdown_table(shown)}{image}"
            draft.write_text(text, encoding="utf-8")
