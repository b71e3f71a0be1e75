"""bench/gpu.sh where there is no GPU, and its steps with commands that only say that they were called."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STUB = """#!/usr/bin/env bash
case "$*" in
-) exit 0 ;;
*"import hypothesis"*) exit {hypothesis} ;;
*"import pytest_benchmark"*) exit {benchmark} ;;
*"import ppomax.engine"*) exit {engine} ;;
*get_device_capability*) echo {chip} ;;
*"-m pytest"*) echo "called $*"; exit {tests} ;;
*) echo "called $*" ;;
esac
"""


def run(out: Path, python: Path | str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(python)}
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh")], env=environment, capture_output=True, text=True, check=False
    )


def stub(
    folder: Path, chip: str = "sm_90", hypothesis: int = 0, benchmark: int = 0, engine: int = 0, tests: int = 0
) -> Path:
    path = folder / "python"
    statuses = {"hypothesis": hypothesis, "benchmark": benchmark, "engine": engine, "tests": tests}
    path.write_text(STUB.format(chip=chip, **statuses))
    path.chmod(0o755)
    return path


def verdicts(out: Path) -> dict[str, str]:
    lines = (out / "summary.txt").read_text().splitlines()
    return {line[:28].strip(): line[28:45].strip() for line in lines}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_what_is_missing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run(tmp_path / "out", sys.executable)
    assert done.returncode == 2
    assert "a GPU: torch.cuda.is_available() is false" in done.stderr.splitlines()
    assert not (tmp_path / "out").exists()


def test_a_python_that_does_not_start_is_missing(tmp_path: Path) -> None:
    done = run(tmp_path / "out", tmp_path / "no-python")
    assert done.returncode == 2
    assert f"a working {tmp_path / 'no-python'}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_step_is_in_the_summary(tmp_path: Path) -> None:
    done = run(tmp_path / "out", stub(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = verdicts(tmp_path / "out")
    steps = ("build", "tests", "compile_report", "bench_kernels", "engine_tests", "bench_rollout", "bench_iteration",
             "bench_suite")  # fmt: skip
    assert {found[name] for name in steps} == {"ok"}
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert "called -m pip install --no-deps --no-build-isolation --quiet ." in log
    assert "called bench/compile_report.py --chips sm_90" in log
    assert done.stdout.endswith((tmp_path / "out" / "summary.txt").read_text())


def test_a_failing_step_does_not_stop_the_others(tmp_path: Path) -> None:
    done = run(tmp_path / "out", stub(tmp_path, tests=3))
    assert done.returncode == 1
    assert verdicts(tmp_path / "out")["tests"] == "failed (3)"
    assert verdicts(tmp_path / "out")["bench_kernels"] == "ok"


@pytest.mark.parametrize("lacking", ["benchmark", "engine"])
def test_without_what_the_suite_needs(tmp_path: Path, lacking: str) -> None:
    done = run(tmp_path / "out", stub(tmp_path, **{lacking: 1}))
    assert done.returncode == 0
    found, log = verdicts(tmp_path / "out"), (tmp_path / "out" / "gpu.log").read_text()
    assert found["bench_suite"] == "skipped"
    assert "-m pytest bench" not in log
    assert ("bench_rollout" in found) == (lacking == "benchmark") == ("bench/bench_rollout.py" in log)


def test_without_hypothesis_and_on_a_chip_without_a_report(tmp_path: Path) -> None:
    run(tmp_path / "out", stub(tmp_path, chip="sm_103", hypothesis=1))
    found, log = verdicts(tmp_path / "out"), (tmp_path / "out" / "gpu.log").read_text()
    assert found["tests that need hypothesis"] == "skipped"
    assert found["compile_report"] == "not for sm_103"
    tests = next(line for line in log.splitlines() if line.startswith("called -m pytest tests/kernels"))
    users = {path for path in (ROOT / "tests" / "kernels").rglob("test_*.py") if "from hypothesis" in path.read_text()}
    assert users
    assert "--confcutdir=tests/kernels" in tests
    assert {ROOT / part.removeprefix("--ignore=") for part in tests.split() if part.startswith("--ignore=")} == users
