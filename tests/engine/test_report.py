"""Curves, tables and samples: the numbers that people read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from ppomax.engine import report
from ppomax.engine.batch import Prompt, Rollout
from ppomax.engine.errors import InputError
from ppomax.engine.evaluation import Answers, Evaluation
from ppomax.engine.report import evaluation_rows, markdown_table, plot_curves, samples_rows, show_evaluation
from ppomax.engine.templates import Template

PNG = b"\x89PNG\r\n\x1a\n"


# Curves


def write_run(folder: Path, steps: range, held_out: tuple[int, ...] = (), **metrics: float) -> Path:
    """A run whose metrics are their value times the step, with a record of critic pre-training before."""
    rows: list[dict[str, Any]] = [{"stage": "critic", "step": 1, "reward/score_mean": 99.0}]
    for step in steps:
        row = {"stage": "ppo", "step": step, **{name.replace("__", "/"): v * step for name, v in metrics.items()}}
        rows.append({**row, **({"eval/score_mean": 10.0 * step} if step in held_out else {})})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn."""
    drawn: list[Figure] = []
    close = plt.close
    monkeypatch.setattr(report.plt, "close", lambda figure: drawn.append(figure) or close(figure))
    return drawn


def panels(figure: Figure) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Title -> label -> points, of the axes that are shown."""
    return {
        ax.get_title(): {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
        for ax in figure.axes
        if ax.get_visible()
    }


def test_curves(tmp_path: Path, figures: list[Figure]) -> None:
    runs = {
        "ppo-max": write_run(tmp_path / "a", range(1, 4), (2,), reward__score_mean=1.0, critic__loss=0.5),
        "vanilla": write_run(tmp_path / "b", range(1, 3), reward__score_mean=2.0, kl__ref_per_response=3.0),
    }
    plot_curves(runs, tmp_path / "deep" / "curves.png")
    assert (tmp_path / "deep" / "curves.png").read_bytes().startswith(PNG)
    (figure,) = figures
    drawn = panels(figure)
    assert list(drawn) == ["reward", "KL to the reference, nats per response", "value loss"]
    assert drawn["reward"] == {
        "ppo-max": ([1, 2, 3], [1.0, 2.0, 3.0]),
        "ppo-max, held-out prompts": ([2], [20.0]),
        "vanilla": ([1, 2], [2.0, 4.0]),
    }
    assert drawn["KL to the reference, nats per response"]["vanilla"] == ([1, 2], [3.0, 6.0])
    assert drawn["value loss"]["ppo-max"] == ([1, 2, 3], [0.5, 1.0, 1.5])
    colours = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert colours["ppo-max"] == colours["ppo-max, held-out prompts"] != colours["vanilla"]
    assert not plt.get_fignums()


def test_nothing_to_draw(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", range(0))
    with pytest.raises(InputError, match=f"{run}: expected runs of PPO, found no iteration"):
        plot_curves({"a": run}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


# Tables


def side(template: Template, texts: list[str], scores: list[float], nll: float, ref_nll: float) -> Answers:
    encode = template.tokenizer.encode
    responses = [encode(text) for text in texts]
    count = sum(map(len, responses))
    return Answers(
        prompts=[Prompt([{"role": "user", "content": f"question\n{i}"}], [5]) for i in range(len(texts))],
        rollouts=[
            Rollout([5], tokens, torch.zeros(len(tokens)), i > 0, [0] * len(tokens))
            for i, tokens in enumerate(responses)
        ],
        scores={"gold": torch.tensor(scores), "length|2": torch.tensor([float(len(text)) for text in texts])},
        logprobs=torch.full((count,), -nll),
        ref_logprobs=torch.full((count,), -ref_nll),
    )


@pytest.fixture
def template(tokenizer: Any) -> Template:
    return Template(tokenizer)


@pytest.fixture
def evaluations(template: Template) -> dict[str, Evaluation]:
    texts = ["abc", "ab", "abcd", "a"]
    baseline = side(template, texts, [0.0, 1.0, 2.0, 3.0], 1.0, 1.0)
    better = side(template, texts, [1.0, 2.0, 3.0, 3.0], 0.5, 0.75)
    worse = side(template, texts, [-4.0, 1.0, 1.0, 3.0], 2.0, 1.0)
    return {"better": Evaluation(better, baseline, 0.0), "worse": Evaluation(worse, baseline, 0.0)}


def test_the_comparison(evaluations: dict[str, Evaluation]) -> None:
    rows = evaluation_rows("SFT", evaluations)
    assert rows[0] == ["", "SFT", "better", "worse"]
    tokens = sum(len(r.response) for r in evaluations["better"].baseline.rollouts)
    assert {row[0]: row[1:] for row in rows[1:]} == {
        "gold, mean": ["1.500", "2.250", "0.250"],
        # Differences 1 1 1 0 and -4 0 -1 0: deviations 0.5 and 1.893; 1.96 / sqrt(4) of them.
        "gold, gain and 95 % interval": ["", "+0.750 ± 0.490", "-1.250 ± 1.855"],
        "gold, win / tie / lose": ["", "75% / 25% / 0%", "0% / 50% / 50%"],
        "length|2, mean": ["2.500", "2.500", "2.500"],
        "length|2, gain and 95 % interval": ["", "+0.000 ± 0.000", "+0.000 ± 0.000"],
        "length|2, win / tie / lose": ["", "0% / 100% / 0%", "0% / 100% / 0%"],
        "KL to the baseline, nats per response": ["0.00", f"{0.25 * tokens / 4:.2f}", f"{-tokens / 4:.2f}"],
        "KL to the baseline, nats per token": ["0.0000", "0.2500", "-1.0000"],
        "perplexity under itself": ["2.718", "1.649", "7.389"],
        "perplexity under the baseline": ["2.718", "2.117", "2.718"],
        "response length, tokens": [f"{tokens / 4:.1f}"] * 3,
        "cut off at the limit": ["25.0%"] * 3,
    }


def test_samples(evaluations: dict[str, Evaluation], template: Template) -> None:
    rows = samples_rows("SFT", evaluations, template, 2)
    assert rows == [
        ["prompt", "SFT", "better", "worse"],
        ["question 0", *(f"abc (gold {score}, length|2 3.00)" for score in ("0.00", "1.00", "-4.00"))],
        ["question 1", *(f"ab (gold {score}, length|2 2.00)" for score in ("1.00", "2.00", "1.00"))],
    ]


def test_markdown() -> None:
    text = markdown_table([["", "a|b"], ["x", "1"], ["y", "2"]])
    assert text == "|  | a\\|b |\n|---|---|\n| x | 1 |\n| y | 2 |\n"


def test_what_is_shown_and_written(
    evaluations: dict[str, Evaluation], template: Template, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    show_evaluation("SFT", evaluations, template, 2, tmp_path / "report.md")
    shown = capsys.readouterr().out
    for text in ("4 held-out prompts, one answer each", "gold, mean", "2.250", "question 0"):
        assert text in shown
    title, comparison, samples = (tmp_path / "report.md").read_text().split("\n\n", 1)[0], *tables(tmp_path)
    assert title == "4 held-out prompts, one answer each"
    assert comparison + "\n" == markdown_table(evaluation_rows("SFT", evaluations))
    assert samples == markdown_table(samples_rows("SFT", evaluations, template, 2))


def tables(folder: Path) -> list[str]:
    return (folder / "report.md").read_text().split("\n\n", 1)[1].split("\n\n")


def test_without_samples_and_file(
    evaluations: dict[str, Evaluation], template: Template, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    show_evaluation("SFT", evaluations, template, 0, None)
    shown = capsys.readouterr().out
    assert "gold, mean" in shown
    assert "question" not in shown
    assert not any(tmp_path.iterdir())


# The commands


def test_report_draws_runs(tmp_path: Path, ppomax: Callable, figures: list[Figure]) -> None:
    runs = [write_run(tmp_path / name / "run", range(1, 3), reward__score_mean=1.0) for name in ("a", "b")]
    for run in runs:
        (run / "run.toml").write_text("")
    outcome = ppomax("report", *runs, "--out", tmp_path / "curves.png")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path}/curves.png\n")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert {name for name in panels(figures[0])["reward"] if "held-out" not in name} == set(map(str, runs))
    ppomax("report", runs[0], "--out", tmp_path / "one.png")
    assert "run" in panels(figures[1])["reward"]


@pytest.mark.parametrize("name", ["curves.pdf", "curves"])
def test_a_figure_is_a_png(name: str, tmp_path: Path, ppomax: Callable) -> None:
    run = write_run(tmp_path / "run", range(1, 3), reward__score_mean=1.0)
    (run / "run.toml").write_text("")
    complaint = ppomax("report", run, "--out", tmp_path / name).complaint
    assert complaint == f"{tmp_path}/{name}: expected a name that ends in .png"
    assert not (tmp_path / name).exists()


def test_report_of_something_else(tmp_path: Path, ppomax: Callable) -> None:
    run = write_run(tmp_path / "sft", range(0))
    assert ppomax("report", run, "--out", tmp_path / "x.png").complaint.startswith(f"{run}: holds no run (no run.toml)")
    (run / "run.toml").write_text("")
    assert "expected runs of PPO, found no iteration" in ppomax("report", run, "--out", tmp_path / "x.png").complaint
    assert "expected runs of PPO" in ppomax("report", "--out", tmp_path / "x.png").complaint
    (run / "metrics.jsonl").unlink()
    complaint = ppomax("report", run, "--out", tmp_path / "x.png").complaint
    assert complaint == f"{run}/metrics.jsonl: No such file or directory"
    assert not (tmp_path / "x.png").exists()


def test_eval_compares_two_policies(
    tmp_path: Path, policy_folder: Path, reward_folder: Path, world_files: dict, ppomax: Callable
) -> None:
    small = ["--max-sequence", 128, "--rollout.max-response", 8, "--runtime.device", "cpu"]
    outcome = ppomax(
        "eval", "--model", policy_folder, "--baseline", policy_folder, "--data", world_files["held_out"], *small,
        "--judge", reward_folder, "ppomax.engine.world:gold_rewards", "--samples", 1, "--out", tmp_path / "eval.md",
    )  # fmt: skip
    assert outcome.code == 0
    text = (tmp_path / "eval.md").read_text()
    assert text.startswith("12 held-out prompts, one answer each\n")
    assert "| ppomax.engine.world:gold_rewards, win / tie / lose |  | 0% / 100% / 0% |" in text
    assert f"| {reward_folder}, win / tie / lose |  | 0% / 100% / 0% |" in text
    assert "| KL to the baseline, nats per token | 0.0000 | 0.0000 |" in text
    samples = text.split("\n\n")[-1].splitlines()
    assert len(samples) == 3
