"""The README's tables and figures are those of the committed results."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(bench: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README and results of its own."""
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "bench" / "results")
    sections = "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in bench("readme_tables").TABLES)
    (tmp_path / "README.md").write_text(f"# Before\n{sections}after\n")
    results = tmp_path / "bench" / "results"
    for name in ("readme_tables", "engine_tables", "kernels_table", "plots"):
        monkeypatch.setattr(bench(name), "RESULTS", results)
    monkeypatch.setattr(bench("readme_tables"), "ROOT", tmp_path)
    for name in ("GPU", "CPU"):
        path = getattr(bench("kernels_table"), name)
        monkeypatch.setattr(bench("kernels_table"), name, results / path.name)
    return tmp_path


def run(bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str | int | None:
    """What the command exits with."""
    monkeypatch.setattr("sys.argv", ["readme_tables.py", *arguments])
    try:
        bench("readme_tables").main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_readme_and_figures_say_what_the_results_say(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(bench, monkeypatch, "--check") == 0


def test_one_command_writes_all_and_the_check_sees_each_change(
    bench: Callable[[str], Any], tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tree / "bench" / "results"
    assert "README.md" in str(run(bench, monkeypatch, "--check"))
    assert run(bench, monkeypatch) == 0
    assert run(bench, monkeypatch, "--check") == 0
    text = (tree / "README.md").read_text()
    assert text.startswith("# Before\n<!-- demo_seeds -->\n|")
    assert text.endswith("after\n")
    pictures = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert {"bench/results/kernels_cpu.png", "bench/results/engine_cpu.png"} <= set(pictures)
    assert all((tree / picture).stat().st_size > 10_000 for picture in pictures)

    (tree / "README.md").write_text(text.replace("| gae |", "| GAE |", 1))
    assert str(run(bench, monkeypatch, "--check")).endswith(": README.md")
    (tree / "README.md").write_text(text)

    report = json.loads((results / "rollout_cpu.json").read_text())
    report["tokens_per_second"]["ppomax"] *= 1.00001  # too little for the table's digits
    (results / "rollout_cpu.json").write_text(json.dumps(report))
    assert str(run(bench, monkeypatch, "--check")).endswith(": engine_cpu.png")


def test_a_section_that_is_not_there(bench: Callable[[str], Any], tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "README.md").write_text("nothing\n")
    assert run(bench, monkeypatch) == "README.md has no section 'demo_seeds'"


def test_bars_are_relative_to_the_plain_way(bench: Callable[[str], Any]) -> None:
    providers = {
        "ppomax": {"ms": 1.0, "peak_bytes": 1 << 20},
        "TRL": {"ms": 6.0, "peak_bytes": 4 << 20},
        "torch eager": {"ms": 2.0, "peak_bytes": 2 << 20},
        "torch compile": {"skipped": "not here"},
        "Liger": {"failed": "wrong", "error": 1.0},
    }
    alone = {"op": "adamw", "shape": "N", "providers": {"ppomax": {"ms": 1.0, "peak_bytes": 1}}}
    where = {"cpu": "a CPU", "threads": 1, "torch": "2.13", "date": "2026-01-01"}
    ops = [{"op": "gae", "shape": "2 x 3", "providers": providers}, alone]
    data = bench("plots").kernels_data({"ops": ops, "environment": where, "device": "cpu"})
    assert data["rows"] == [
        {"label": "gae\n2 x 3", "time": {"ppomax": 0.5, "TRL": 3.0}, "memory": {"ppomax": 0.5, "TRL": 2.0}}
    ]
    assert data["where"] == "a CPU, 1 thread, torch 2.13, 2026-01-01"
    assert bench("plots").kernels(data).axes
