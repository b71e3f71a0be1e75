"""The demonstration over several seeds: what comes out, with intervals, and one figure.

    python bench/demo_seeds.py --seeds 2 3 4 5 6 --out bench/results/demo_seeds.json

Each seed is a world, a tokenizer, an SFT model, a reward model and both arms of its own; some minutes each. The JSON
holds every seed's figures beside machine, versions and date, and is written after each: seeds that it holds already are
not measured again. The Markdown table printed at the end is made from it alone, as is the figure that
`readme_tables.py` draws. Intervals are 95 % over seeds
(Student's t). The settings of the demonstration were tuned on other seeds than the default ones.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from environment import environment
from matplotlib.figure import Figure
from ppomax.engine.demo import DemoConfig, run_demo
from ppomax.engine.evaluation import Answers, Evaluation
from ppomax.engine.metrics import read_metrics

ARMS = ("ppo-max", "vanilla")
FIGURES = {
    "learned reward": "learned reward_mean",
    "gold": "gold_mean",
    "KL to SFT, nats per response": "kl/ref_per_response",
    "perplexity under itself": "ppl/policy",
    "perplexity under SFT": "ppl/reference",
    "response length, tokens": "response/length_mean",
}
CURVES = {
    "learned reward": "eval/score_mean",
    "gold": "eval/judge_mean",
    "KL, nats per response": "eval/kl/ref_per_response",
    "length, tokens": "eval/response/length_mean",
}
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # 97.5 % point by number of seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--out", type=Path, default=Path("bench/results/demo_seeds.json"))
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text())["seeds"] if arguments.out.exists() else {}
    seeds: dict[str, Any] = {}
    for seed in arguments.seeds:
        seeds[str(seed)] = known.get(str(seed)) or measure(seed)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"environment": environment(), "seeds": seeds}, indent=1) + "\n")
    print(table(seeds))


def measure(seed: int) -> dict[str, Any]:
    """One seed of the whole demonstration, both arms side by side."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        evaluations = run_demo(DemoConfig(seed=seed), ARMS, Path(folder))
        curves = {arm: held_out_curves(Path(folder) / arm) for arm in ARMS}
        rm = [r for r in read_metrics(Path(folder) / "rm" / "metrics.jsonl") if "rm/held_out_accuracy" in r][-1]
    return {
        "seconds": time.monotonic() - started,
        "rm_held_out_accuracy": rm["rm/held_out_accuracy"],
        "sft": figures(evaluations["ppo-max"].baseline),
        **{arm: figures(evaluation.policy) | win_rates(evaluation) for arm, evaluation in evaluations.items()},
        "curves": curves,
    }


def figures(answers: Answers) -> dict[str, float]:
    summary = answers.summary()
    return {label: summary[name] for label, name in FIGURES.items()}


def win_rates(evaluation: Evaluation) -> dict[str, float]:
    rates = {judge: evaluation.win_rate(judge) for judge in ("learned reward", "gold")}
    return {f"{judge}, win - lose": rate.win - rate.lose for judge, rate in rates.items()}


def held_out_curves(run: Path) -> dict[str, list[list[float]]]:
    records = [record for record in read_metrics(run / "metrics.jsonl") if "eval/score_mean" in record]
    return {label: [[record["step"], record[name]] for record in records] for label, name in CURVES.items()}


def table(seeds: dict[str, Any]) -> str:
    """Markdown: mean over seeds and half of the 95 % interval."""
    rows = ["| held-out prompts | SFT | PPO-max | vanilla |", "|---|---|---|---|"]
    for label in FIGURES:
        cells = (cell([seed[side][label] for seed in seeds.values()]) for side in ("sft", *ARMS))
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    for judge in ("learned reward", "gold"):
        gains = (cell([seed[arm][judge] - seed["sft"][judge] for seed in seeds.values()]) for arm in ARMS)
        rates = (cell([seed[arm][f"{judge}, win - lose"] for seed in seeds.values()]) for arm in ARMS)
        rows.append(f"| {judge}, gain over SFT | | " + " | ".join(gains) + " |")
        rows.append(f"| {judge}, share of wins - share of losses | | " + " | ".join(rates) + " |")
    return "\n".join(rows)


def cell(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    half = STUDENT_T[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.2f} ± {half:.2f}"


def figure(seeds: dict[str, Any]) -> Figure:
    """Held-out curves: thin lines are seeds, thick ones their mean."""
    figure = Figure(figsize=(4 * len(CURVES), 3), layout="constrained")
    axes = figure.subplots(1, len(CURVES))
    for ax, label in zip(axes, CURVES, strict=True):
        for index, arm in enumerate(ARMS):
            lines = [seed["curves"][arm][label] for seed in seeds.values()]
            steps = [step for step, _ in lines[0]]
            for line in lines:
                ax.plot(steps, [value for _, value in line], color=f"C{index}", lw=0.6, alpha=0.6)
            ax.plot(steps, [mean(values) for values in zip(*([v for _, v in line] for line in lines), strict=True)],
                    color=f"C{index}", lw=2, label=arm)  # fmt: skip
        ax.set_title(label, fontsize=10)
        ax.set_xlabel("PPO iteration", fontsize=9)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    return figure


if __name__ == "__main__":
    main()
