"""What a run shows and keeps: one record a step in JSONL and TensorBoard, and a live line in the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from .checkpoint import atomic_file
from .errors import InputError, StorageError, first_line

console = Console(stderr=True, highlight=False)


class RunLog:
    """Appends one stage's metrics to `metrics.jsonl` and `tensorboard/STAGE` of a run folder."""

    def __init__(self, folder: Path, stage: str, *, after: int) -> None:
        """`after`: the step that the stage continues from; later records of it, of work that was lost, are dropped."""
        self.stage = stage
        self.path = path = folder / "metrics.jsonl"
        if path.exists():
            kept = [r for r in read_metrics(path) if r["stage"] != stage or r["step"] <= after]
            with atomic_file(path) as draft:
                draft.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (closed by close())
        self.writer = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=after + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One record: the figures after `step` steps. Raises StorageError where the disk is full."""
        with self._naming_the_file():
            self.file.write(json.dumps({"stage": self.stage, "step": step, **metrics}) + "\n")
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        with self._naming_the_file(), closing(self.writer), closing(self.file):
            pass

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(self.path, first_line(error)) from error


class NoLog:
    """In place of a `RunLog` where another process writes it."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def pick(metrics: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Those metrics of `names` that there are, by their names without the group."""
    return {name.split("/")[-1]: metrics[name] for name in names if name in metrics}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a crash left half-written is passed over."""
    records: list[dict[str, Any]] = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise InputError(f"{path}:{number}: expected a JSON record with 'stage' and 'step'")
    return records


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"stage", "step"} <= record.keys() else None


class StageProgress:
    """Live progress of one stage: bar, steps, rate, remaining time and the figures that matter.

    Where no terminal shows the bar, a plain line is printed every few seconds instead.
    """

    PLAIN_INTERVAL = 5.0

    def __init__(self, name: str, total: int, *, done: int = 0, unit: str = "step", plain: bool = False) -> None:
        """`plain`: lines instead of a bar even on a terminal (for stages that run side by side)."""
        self.name, self.total, self.done, self.unit = name, total, done, unit
        self.plain = plain or not console.is_terminal
        self.first, self.started = done, time.monotonic()
        self.last_line = 0.0
        self.bar = Progress(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=self.plain,
        )
        self.task = self.bar.add_task(name, total=total, completed=done, figures="")

    def __enter__(self) -> StageProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, done: int, **figures: float) -> None:
        """`done` of `total` steps are finished; `figures` are shown beside the bar."""
        self.done = done
        rate = (done - self.first) / max(time.monotonic() - self.started, 1e-9)
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        speed = f"{rate:.1f} {self.unit}s/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s/{self.unit}"
        self.bar.update(self.task, completed=done, figures=f"{speed}  {shown}")
        if self.plain:
            self._print_line(f"{speed}  {shown}", rate)

    def note(self, text: str) -> None:
        """Say how the step that is under way gets on; a plain line is for steps that take long."""
        self.bar.update(self.task, figures=text)
        if self.plain and time.monotonic() - max(self.last_line, self.started) > self.PLAIN_INTERVAL:
            self._print_line(text, (self.done - self.first) / max(time.monotonic() - self.started, 1e-9))

    def _print_line(self, figures: str, rate: float) -> None:
        now = time.monotonic()
        if self.done < self.total and now - self.last_line < self.PLAIN_INTERVAL:
            return
        self.last_line = now
        left = f"{(self.total - self.done) / rate:.0f} s left  " if rate > 0 else ""
        console.print(f"{self.name} {self.done}/{self.total}  {left}{figures}", soft_wrap=True)
