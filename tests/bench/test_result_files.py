"""The files of the manager's and the rollouts' benches: figures, and samples that can be compared."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest


def test_kv_manager(bench: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, path = bench("bench_kv_manager"), tmp_path / "new" / "kv.json"
    monkeypatch.setattr(module, "SIZES", (256,))
    monkeypatch.setattr("sys.argv", ["bench_kv_manager.py", "--steps", "150", "--json", str(path)])
    module.main()
    (result,) = json.loads(path.read_text())["results"]
    samples = bench("records").read(path).samples
    assert set(samples) == {f"KV manager, {kind}, 256 sequences" for kind in result["microseconds"]}
    for kind, figures in result["microseconds"].items():
        times = samples[module.title(256, kind)]["ppomax"]
        assert len(times) == figures["steps"] <= 200
        assert 1e3 * median(times) == pytest.approx(figures["median"], abs=0.06)  # which is rounded to 0.1


def test_rollouts(bench: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, path = bench("bench_rollout"), tmp_path / "rollout.json"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # interpreted kernels would take minutes
    monkeypatch.setattr(module, "LONGEST", 12)
    arguments = ["--device", "cpu", "--rounds", "2", "--prompts", "3", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["bench_rollout.py", *arguments])
    module.main()
    result = json.loads(path.read_text())
    (times,) = bench("records").read(path).samples.values()
    assert set(times) == {"ppomax", "transformers"}
    assert result["prompts"] == 3
    assert [1e-3 * ms for ms in times["ppomax"]] == pytest.approx(result["seconds"]["ppomax"], rel=1e-4)
    assert result["tokens_per_second"]["ppomax"] == pytest.approx(
        result["tokens"] / median(result["seconds"]["ppomax"])
    )
