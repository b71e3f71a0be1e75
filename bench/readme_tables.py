"""Write the README's tables from the committed results, each between its `<!-- name -->` and `<!-- /name -->` marks,
and draw its figures.

    python bench/readme_tables.py [--check]

`--check` changes nothing and exits with 1 where a table in the README or a figure is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_seeds
import engine_tables
import kernels_table
import plots

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = before
    for name, render in TABLES.items():
        after = replace_section(after, name, render())
    old = {path: plot for path, plot in plots.plots().items() if not plots.is_current(path, plot)}
    if arguments.check:
        wrong = ["README.md"] * (after != before) + [path.name for path in old]
        sys.exit(f"not what bench/results says, run bench/readme_tables.py: {', '.join(wrong)}" if wrong else 0)
    for path, plot in old.items():
        plots.save(path, plot)
    readme.write_text(after, encoding="utf-8")


def replace_section(text: str, name: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no section {name!r}")
    return pattern.sub(lambda match: f"{match[1]}{content.strip()}\n{match[2]}", text)


def measured(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def demo_table() -> str:
    result = measured("demo_seeds")
    where, seeds = result["environment"], result["seeds"]
    accuracy = demo_seeds.cell([seed["rm_held_out_accuracy"] for seed in seeds.values()])
    note = (
        f"Mean over {len(seeds)} seeds ({', '.join(seeds)}) and half of the 95 % interval over seeds; each seed has a "
        f"world, a tokenizer, an SFT model and a reward model of its own (accuracy on held-out pairs {accuracy}). "
        f"{where['cpu']}, {where['cores']} cores, one thread an arm, torch {where['torch']}, {where['date']}."
    )
    return f"{demo_seeds.table(seeds)}\n\n{note}"


TABLES: dict[str, Callable[[], str]] = {
    "demo_seeds": demo_table,
    "rollouts": engine_tables.rollouts_table,
    "kernels": kernels_table.table,
    "trl": engine_tables.trl_table,
    "communication": engine_tables.communication_table,
    "iteration": engine_tables.iteration_table,
    "adapters": engine_tables.adapters_table,
}

if __name__ == "__main__":
    main()
