"""What a run keeps of its figures, and what it shows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ppomax.engine import metrics
from ppomax.engine.errors import InputError, StorageError
from ppomax.engine.metrics import RunLog, StageProgress, pick, read_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def log_steps(folder: Path, stage: str, steps: range, after: int = 0, shift: float = 0.0) -> None:
    log = RunLog(folder, stage, after=after)
    for step in steps:
        log.write(step, {f"{stage}/loss": step + shift})
    log.close()


def steps_in(folder: Path) -> list[tuple[str, int]]:
    return [(record["stage"], record["step"]) for record in read_metrics(folder / "metrics.jsonl")]


def test_records_are_kept_in_jsonl_and_tensorboard(tmp_path: Path) -> None:
    log_steps(tmp_path, "ppo", range(1, 4))
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"stage": "ppo", "step": step, "ppo/loss": float(step)} for step in (1, 2, 3)
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "ppo")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("ppo/loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_each_record_is_on_the_disk_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "ppo", after=0)
    log.write(1, {"a": 1.0})
    assert steps_in(tmp_path) == [("ppo", 1)]
    log.close()


def test_records_of_lost_work_are_dropped(tmp_path: Path) -> None:
    log_steps(tmp_path, "critic", range(1, 4))
    log_steps(tmp_path, "ppo", range(1, 6))
    log_steps(tmp_path, "ppo", range(4, 6), after=3, shift=0.5)
    assert steps_in(tmp_path) == [*(("critic", n) for n in (1, 2, 3)), *(("ppo", n) for n in (1, 2, 3, 4, 5))]
    losses = [record.get("ppo/loss") for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses == [None, None, None, 1, 2, 3, 4.5, 5.5]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "ppo")).Reload()
    assert [event.value for event in events.Scalars("ppo/loss")] == [1, 2, 3, 4.5, 5.5]


def test_a_half_written_last_line_is_passed_over(tmp_path: Path) -> None:
    log_steps(tmp_path, "ppo", range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert steps_in(tmp_path) == [("ppo", 1), ("ppo", 2)]
    log_steps(tmp_path, "ppo", range(3, 4), after=2)
    assert steps_in(tmp_path) == [("ppo", 1), ("ppo", 2), ("ppo", 3)]
    assert len(path.read_text().splitlines()) == 3


BROKEN_LINES = {
    "half": '{"stage": "ppo", "st',
    "binary": "\udcff\udcfe",
    "empty": "",
    "number": "3",
    "list": '["stage", "step"]',
    "no step": '{"stage": "ppo"}',
    "no stage": '{"step": 2}',
}


@pytest.mark.parametrize("case", BROKEN_LINES)
def test_a_broken_line_before_the_last_is_named(tmp_path: Path, case: str) -> None:
    log_steps(tmp_path, "ppo", range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], BROKEN_LINES[case], lines[2], ""]), errors="surrogateescape")
    with pytest.raises(InputError) as caught:
        read_metrics(path)
    assert str(caught.value) == f"{path}:2: expected a JSON record with 'stage' and 'step'"


def test_figures_that_are_no_numbers_survive(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "ppo", after=0)
    log.write(1, {"a": float("inf"), "b": float("nan")})
    log.close()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["a"] == float("inf")
    assert record["b"] != record["b"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    log_steps(tmp_path, "ppo", range(1, 3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    log = RunLog(tmp_path, "ppo", after=2)
    log.file.close()
    log.file = open("/dev/full", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    expected = f"^{tmp_path}/metrics.jsonl: could not be written \\(.*No space left on device\\)"
    with pytest.raises(StorageError, match=expected):
        log.write(3, {"a": 1.0})
    with pytest.raises(StorageError, match=expected):
        log.close()
    assert log.file.closed
    assert log.writer.all_writers is None  # closed as well
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_pick() -> None:
    assert pick({"kl/ref": 0.1, "eval/kl/ref": 0.2, "a": 3.0}, ("kl/ref", "missing", "a")) == {"ref": 0.1, "a": 3.0}


# Progress where no terminal shows a bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])

    def set_time(value: float) -> None:
        now[0] = 100.0 + value

    return set_time


def test_a_plain_line_every_few_seconds_and_at_the_end(clock: Any, capsys: pytest.CaptureFixture) -> None:
    with StageProgress("ppo", 20, done=10, unit="iteration") as progress:
        for done, seconds in ((11, 2.0), (12, 4.0), (13, 7.5), (20, 8.0)):
            clock(seconds)
            progress.update(done, score_mean=1.23456)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "ppo 11/20  18 s left  2.0 s/iteration  score mean 1.235",
        "ppo 13/20  18 s left  2.5 s/iteration  score mean 1.235",
        "ppo 20/20  0 s left  1.2 iterations/s  score mean 1.235",
    ]


def test_nothing_is_printed_to_the_standard_output(clock: Any, capsys: pytest.CaptureFixture) -> None:
    with StageProgress("sft", 1) as progress:
        progress.update(1)
    assert capsys.readouterr().out == ""


def test_records_are_json(tmp_path: Path) -> None:
    log_steps(tmp_path, "ppo", range(1, 2))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"stage": "ppo", "step": 1, "ppo/loss": 1.0}
