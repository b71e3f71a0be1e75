"""The files of the engine's benches: figures, and samples that can be compared."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch


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


def test_beside_trl(bench: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, path, asked = bench("vs_trl"), tmp_path / "vs_trl.json", []

    def measured(engine: str, case: str, iterations: int) -> dict[str, Any]:
        asked.append((engine, case, iterations))
        slower, times = {"ppomax": 1.0, "trl": 4.0}[engine], [float(len(asked)), len(asked) + 0.5, len(asked) + 1.0]
        return {"seconds": [slower * x for x in times], "phases": [{"update": 0.5}], "above": len(asked) * 2**20}

    monkeypatch.setattr(module, "measured", measured)
    monkeypatch.setattr("sys.argv", ["vs_trl.py", "--case", "mixed lengths", "--rounds", "2", "--json", str(path)])
    module.main()
    assert asked == [(engine, "mixed lengths", 4) for engine in ("ppomax", "trl", "ppomax", "trl")]
    figures = json.loads(path.read_text())["cases"]["mixed lengths"]
    assert figures["seconds"] == {"ppomax": [1.5, 3.5], "trl": [10.0, 18.0]}
    assert figures["peaks_above_models"] == {"ppomax": [2**20, 3 * 2**20], "trl": [2 * 2**20, 4 * 2**20]}
    assert figures["memory_ratio"] == 0.75
    samples = bench("records").read(path).samples["iteration, mixed lengths"]
    assert samples == {"ppomax": [1000, 1500, 2000, 3000, 3500, 4000], "trl": [8e3, 1e4, 1.2e4, 1.6e4, 1.8e4, 2e4]}


def test_optimizers(bench: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, path = bench("bench_optim"), tmp_path / "optim.json"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(module.SHAPES, "cpu", [(64, 512)])
    monkeypatch.setattr("sys.argv", ["bench_optim.py", "--samples", "4", "--json", str(path)])
    module.main()
    forms = json.loads(path.read_text())["forms"]
    samples = bench("records").read(path).samples["AdamW step, 32,768 weights"]
    assert set(samples) == set(forms) == set(module.FORMS)
    for name, times in samples.items():
        assert len(times) == 4
        assert median(times) == pytest.approx(forms[name]["ms"], rel=1e-4)


def test_adapters(bench: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs, of trainers that no one environment holds, into one file; a third one is compared with it."""
    module, path, other = bench("bench_adapters"), tmp_path / "adapters.json", tmp_path / "other.json"
    case = module.Case("total", lambda m: [m.total(torch.ones(3))])
    peer = module.Peer(SimpleNamespace(total=torch.sum), ("math",), lambda has: iter([case]))
    monkeypatch.setattr(module, "functions_of", lambda modules: SimpleNamespace(total=torch.sum))
    monkeypatch.setattr(module, "cpu_peak", lambda run: 1)
    for version, file in (("1", path), ("2", path), ("2", other)):
        monkeypatch.setattr(module, "PEERS", {"trl": peer})
        monkeypatch.setattr(module.metadata, "version", lambda name, version=version: version)
        monkeypatch.setattr("sys.argv", ["bench_adapters.py", "--samples", "3", "--json", str(file)])
        module.main()
    old, new = bench("records").read(path), bench("records").read(other)
    assert set(old.samples) == {"trl 1: total", "trl 2: total"}
    assert {name: len(times) for name, times in new.samples["trl 2: total"].items()} == {"ppomax": 3, "peer": 3}
    functions = json.loads(path.read_text())["trl 1"]["functions"]
    assert median(old.samples["trl 1: total"]["peer"]) == pytest.approx(functions["total"]["ms"]["peer"], rel=1e-4)
    compare = bench("compare")
    assert [change.case for change in compare.compared(old.samples, new.samples)] == ["trl 2: total"] * 2
    assert not compare.differences(old, new)
    moved = new.environment | {"trl 2: cores": -1, "trl 2: date": "then"}
    (difference,) = compare.differences(old, new._replace(environment=moved))
    assert difference.startswith("trl 2: cores: ")
