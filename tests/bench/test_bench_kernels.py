"""The kernel benchmark: providers agree with float64, wrong ones are not timed, gates and tables say what was found."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_providers_agree_with_float64(bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    correctness, operations = bench("measure").correctness, bench("suites").small("cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for op in operations:
        torch.manual_seed(0)
        entries = correctness(op, op.inputs())
        assert {name: entry.get("failed") for name, entry in entries.items()} == dict.fromkeys(entries), op.name
        ran = [entry for entry in entries.values() if "skipped" not in entry]
        assert all(0 <= entry["error"] <= op.tolerance for entry in ran)
        assert ran


def test_a_package_that_is_not_there_is_absent_with_the_reason(bench: Callable[[str], Any]) -> None:
    ops = bench("ops")
    assert ops.peer("no_such_package", "x").reason == "No module named 'no_such_package'"
    assert "no_such_name" in ops.peer("torch", "no_such_name").reason
    assert ops.peer("math", "sqrt") is math.sqrt
    assert ops.over(ops.Absent("gone"), len) == ops.Absent("gone")
    assert ops.on_gpu(math.sqrt, "cpu").reason == "runs on a GPU alone"
    assert ops.on_gpu(math.sqrt, "cuda") is math.sqrt


def test_every_reference_operation_has_its_small_one(bench: Callable[[str], Any]) -> None:
    suites = bench("suites")
    assert {op.name for op in suites.configured("meta")} == {op.name for op in suites.small("meta")}


@pytest.fixture
def op(bench: Callable[[str], Any]) -> Any:
    """Doubles x in place of a buffer that each provider finds as it was."""

    def ours(x: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
        return [out.add_(x).add_(x)]

    def off(x: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
        return [2.01 * x]

    def not_a_number(x: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
        return [x * math.nan]

    def broken(x: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
        raise RuntimeError("no such device\nand more")

    ops = bench("ops")
    providers = {"ppomax": ours, "again": ours, "off": off, "NaN": not_a_number, "broken": broken,
                 "gone": ops.Absent("not installed")}  # fmt: skip
    judge = ops.against(lambda x, out: [2 * x.double()])
    return ops.Op("twice", "N=4", lambda: {"x": torch.randn(4), "out": torch.zeros(4)}, providers, judge, 1e-3, 64.0)


def test_wrong_and_broken_providers_are_not_timed(bench: Callable[[str], Any], op: Any) -> None:
    entries = bench("measure").correctness(op, op.inputs())
    failed = {name: entry.get("failed") for name, entry in entries.items()}
    assert failed == {"ppomax": None, "again": None, "off": "wrong", "NaN": "wrong",
                      "broken": "RuntimeError: no such device", "gone": None}  # fmt: skip
    assert entries["gone"] == {"skipped": "not installed"}
    assert entries["off"]["error"] == pytest.approx(0.005, rel=1e-3)
    assert math.isnan(entries["NaN"]["error"])


def test_report_of_a_run(
    bench: Callable[[str], Any], op: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    module = bench("bench_kernels")
    monkeypatch.setattr(module.suites, "of", lambda device, *, quick, full: [op])
    path = tmp_path / "new" / "kernels.json"
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", "--device", "cpu", "--samples", "4", "--json", str(path)])
    module.main()
    report = json.loads(path.read_text())
    assert report["device"] == "cpu"
    assert report["ceilings"] is None
    assert report["gates"] == {}
    (entry,) = report["ops"]
    assert entry["providers"]["ppomax"]["samples"] == 4
    assert entry["providers"]["ppomax"]["gb_per_second"] == pytest.approx(64 / entry["providers"]["ppomax"]["ms"] / 1e6)
    assert "ms" not in entry["providers"]["off"]
    samples = report["samples_ms"]["twice, N=4"]
    assert {name: len(times) for name, times in samples.items()} == {"ppomax": 4, "again": 4}
    assert median(samples["ppomax"]) == pytest.approx(entry["providers"]["ppomax"]["ms"], 1e-4)
    out = capsys.readouterr().out
    assert "twice" in out
    assert "not installed" in out


def test_check_exits_with_1_where_ours_is_wrong(bench: Callable[[str], Any], op: Any, capsys: Any) -> None:
    module = bench("bench_kernels")
    wrong = op._replace(name="thrice", providers={"ppomax": op.providers["off"]})
    assert module.check([op]) == 0
    assert module.check([wrong, op]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["ok: twice", "wrong: thrice", "ok: twice"]


def test_a_gpu_that_is_not_there(bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = bench("bench_kernels")
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        module.main()


def test_gates_against_a_limit_and_against_another_operation(bench: Callable[[str], Any], op: Any) -> None:
    module = bench("measure")
    limits = {"a": {"gate_ms": 2.0}, "b": {"gate_of": ("a", 0.5)}, "c": {"gate_ms": 1.0}, "d": {}}
    ours = {"a": {"ms": 1.8}, "b": {"ms": 1.0}, "c": {"failed": "wrong"}, "d": {"ms": 1.0}}
    entries = [{"op": name, "providers": {"ppomax": entry}} for name, entry in ours.items()]
    found = module.gates([op._replace(name=name, **limit) for name, limit in limits.items()], entries)
    assert {name: gate["pass"] for name, gate in found.items()} == {"a": True, "b": False, "c": False}
    assert found["b"]["limit_ms"] == pytest.approx(0.9)


def test_floor_is_the_longer_of_bytes_and_flops(bench: Callable[[str], Any], op: Any) -> None:
    floor = bench("measure").floor_ms
    assert floor(op._replace(bytes=4.3e9, flops=790e8)) == pytest.approx(1.0)
    assert floor(op._replace(bytes=4.3e8, flops=790e9)) == pytest.approx(1.0)


def test_reference_floors_are_those_of_the_shapes(bench: Callable[[str], Any]) -> None:
    """At N = 8192, H = 4096, V = 128256 in bfloat16, worked out by hand."""
    floor = bench("measure").floor_ms
    floors = {op.name: floor(op) for op in bench("suites").reference("meta")}
    assert floors["logprobs_from_logits forward"] == pytest.approx(0.489, abs=2e-3)
    assert floors["linear_logprobs forward"] == pytest.approx(10.9, abs=0.05)
    assert floors["linear_ppo_loss forward + backward"] == pytest.approx(32.7, abs=0.1)
    assert floors["ppo_loss forward + backward"] == pytest.approx(0.010, abs=5e-4)


def test_samples_stop_at_the_time_allowed(bench: Callable[[str], Any]) -> None:
    times = bench("timing").cpu_times({"a": lambda: None, "b": lambda: None}, 1000, least=2, seconds=0.0)
    assert [len(t) for t in times.values()] == [2, 2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_on_a_cpu(bench: Callable[[str], Any]) -> None:
    peak = bench("timing").cpu_peak
    size = 64 << 20
    assert 0.95 * size < peak(lambda: torch.ones(size // 4).sum()) < 1.25 * size
    assert peak(lambda: None) < 1 << 20


def test_table_says_what_is_unmeasured(
    bench: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bench("kernels_table")
    where = {"cpu": "a CPU", "threads": 1, "torch": "2.13", "date": "2026-01-01"}
    providers = {
        "ppomax": {"ms": 12.34, "peak_bytes": 5e6, "samples": 7},
        "torch eager": {"failed": "OutOfMemoryError: x"},
        "TRL": {"skipped": "not installed"},
    }
    report = {"device": "cpu", "environment": where, "ops": [{"op": "gae", "shape": "2 x 3", "providers": providers}]}
    (tmp_path / "cpu.json").write_text(json.dumps(report))
    monkeypatch.setattr(module, "GPU", tmp_path / "gpu.json")
    monkeypatch.setattr(module, "CPU", tmp_path / "cpu.json")
    text = module.table()
    assert "| gae | 64 x 8192 | 0.00195 ms | unmeasured on a GPU |  | H200 |" in text
    assert "| gae | 2 x 3 |  | 12.3 ms, 5 MB | torch eager: OutOfMemoryError | CPU |" in text
    assert "Medians of 7 to 7 alternating samples" in text
    measured = {**report, "device": "NVIDIA H200", "ops": [{**report["ops"][0], "shape": "64 x 8192"}]}
    (tmp_path / "gpu.json").write_text(json.dumps(measured))
    assert "| gae | 64 x 8192 | 0.00195 ms | 12.3 ms, 5 MB |" in module.table()


def test_a_slow_call_is_measured_when_it_is_judged(
    bench: Callable[[str], Any], op: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, calls = bench("measure"), []
    monkeypatch.setattr(module, "SLOW", 0.0)
    monkeypatch.setattr(module, "cpu_peak", lambda function: calls.append(function()) or 123)
    rounds = stand_in_times(module, monkeypatch)
    entry, samples = module.measured(op, module.Plan("cpu", samples=3))
    assert [entry["providers"][name]["peak_bytes"] for name in ("ppomax", "again")] == [123, 123]
    assert len(calls) == 4  # of five providers that can be called the broken one did not return; none a second time
    assert rounds == [2]  # the third is the call that was judged
    assert [times[1:] for times in samples.values()] == [[1.0, 1.0], [1.0, 1.0]]
    assert "first_ms" not in entry["providers"]["ppomax"]


def stand_in_times(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of a millisecond; the list gets how many rounds were asked for."""
    asked: list[int] = []

    def cpu_times(functions: dict[str, Any], samples: int, *, least: int, seconds: float) -> dict[str, list[float]]:
        asked.append(samples)
        return {name: [1.0] * samples for name in functions}

    monkeypatch.setattr(module, "cpu_times", cpu_times)
    return asked


def test_a_fast_provider_beside_slow_ones_keeps_the_rounds_whole(
    bench: Callable[[str], Any], op: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, rounds = bench("measure"), stand_in_times(bench("measure"), monkeypatch)
    results = iter([{"first_ms": 9.0, "peak_bytes": 5}, {}])
    monkeypatch.setattr(module, "first_call", lambda run: (run(), next(results, {})))
    two = op._replace(providers={name: op.providers[name] for name in ("ppomax", "again")})
    _, samples = module.measured(two, module.Plan("cpu", samples=3))
    assert rounds == [3]
    assert samples == {"ppomax": [1.0] * 3, "again": [1.0] * 3}


@pytest.mark.parametrize(("provider", "outcome"), [("off", "wrong: error 0.00[45]"), ("broken", "RuntimeError: no s")])
def test_wrong_providers_fail_in_the_suite(bench: Callable[[str], Any], op: Any, provider: str, outcome: str) -> None:
    measured = bench("measure").measured(op, bench("measure").Plan("cpu", samples=2, seconds=0.0))
    with pytest.raises(AssertionError, match=outcome):
        bench("test_ops").test_operation(op.title, provider, lambda title: measured, None)
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        bench("test_ops").test_operation(op.title, "gone", lambda title: measured, None)


def test_the_suite_writes_what_is_compared(bench: Callable[[str], Any], tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    files = ("bench/test_ops.py", "bench/test_kv_manager.py")
    command = [sys.executable, "-m", "pytest", *files, "--benchmark-only", "--quick", "-q", "-k", "gae or 256"]
    left_out = ("TRITON_INTERPRET", "PYTEST_XDIST_")  # under pytest-xdist pytest-benchmark would measure nothing
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--device", "cpu", f"--benchmark-json={path}"],
        cwd=ROOT, env=kept | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    report = json.loads(path.read_text())
    assert report["machine_info"]["environment"]["torch"] == torch.__version__
    for entry in report["benchmarks"]:
        if "ms" in entry["extra_info"]:  # replayed samples are the measured ones
            assert entry["extra_info"]["ms"] == pytest.approx(1e3 * entry["stats"]["median"])
            assert {"error", "gb_per_second", "peak_bytes", "floor_ms"} <= entry["extra_info"].keys()
    samples = bench("records").read(path).samples
    assert set(samples["gae, 64 x 64"]) == {"ppomax", "column loop"}
    assert {len(times) for times in samples["gae, 64 x 64"].values()} == {3}
    assert len(samples["KV manager, decode, 256 sequences"]["ppomax"]) > 30
    assert "GB/s" in done.stdout
