"""The folder that a run owns.

RUN/run.toml                    command, inputs and the resolved configuration
RUN/metrics.jsonl, tensorboard/ what was measured
RUN/checkpoints/step-000100/    models as Hugging Face folders, state.pt, tensors/: all that a run needs to go on
RUN/config.json, ...            the finished model, so that RUN itself is a model folder
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .checkpoint import atomic_file, save_checkpoint
from .config import Config, from_dict, to_dict
from .errors import InputError
from .metrics import NoLog, RunLog
from .models import Model
from .parallel import ALONE, Ranks

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]

Inputs = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """A folder that one run owns. Its processes all see it; the main one writes, checkpoints apart."""

    path: Path
    ranks: Ranks = ALONE

    @classmethod
    def create(
        cls,
        path: str | Path,
        command: str,
        inputs: Inputs,
        config: Any,
        *,
        overwrite: bool = False,
        ranks: Ranks = ALONE,
    ) -> RunFolder:
        """Claim `path` for a new run and write its run.toml: command, inputs, resolved configuration.

        Raises InputError where the folder already holds a run (unless `overwrite`) or anything else.
        """
        run = cls(Path(path), ranks)
        record = {"command": command, "version": version(), "inputs": inputs, "config": to_dict(config)}
        ranks.on_main(lambda: run._claim(record, overwrite=overwrite))
        return run

    def _claim(self, record: dict[str, Any], *, overwrite: bool) -> None:
        import tomli_w  # here, so that benchmarks, which keep no record, run without it

        if self.record_file.exists():
            if not overwrite:
                raise InputError(
                    f"{self.path} already holds a run: continue it with --resume {self.path}, replace it with "
                    "--overwrite, or choose another --out"
                )
            self._check_deletable(record["inputs"])
            shutil.rmtree(self.path)
        elif self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
            raise InputError(f"{self.path} is not empty and holds no run: choose another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.record_file) as draft:
            draft.write_text(tomli_w.dumps(record), encoding="utf-8")

    def _check_deletable(self, inputs: Inputs) -> None:
        """Raise InputError where the new run needs a file or model that stands in this folder."""
        for name, value in inputs.items():
            for source in [value] if isinstance(value, str) else value:
                if source and Path(source).resolve().is_relative_to(self.path.resolve()):
                    raise InputError(f"{self.path}: --overwrite would delete {source}, the new run's own {name}")

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run; InputError where `path` holds none."""
        run = cls(Path(path))
        if not run.record_file.is_file():
            raise InputError(f"{path}: holds no run (no run.toml), expected the --out folder of an earlier run")
        return run

    @property
    def record_file(self) -> Path:
        return self.path / "run.toml"

    def inputs(self, command: str) -> Inputs:
        """The inputs that the run was started with; InputError where another command started it."""
        record = self._record()
        if record["command"] != command:
            raise InputError(f"{self.path}: a run of `ppomax {record['command']}`, expected `ppomax {command}`")
        return record["inputs"]

    def config(self, cls: type[Config]) -> Config:
        """The configuration that the run was started with."""
        return from_dict(cls, self._record()["config"], str(self.record_file))

    def _record(self) -> dict[str, Any]:
        record = read_toml(self.record_file)
        for name in ("command", "inputs", "config"):
            if name not in record:
                raise InputError(f"{self.record_file}: no {name!r} in it, expected the run.toml of a run")
        return record

    def remove_if_unused(self) -> None:
        """Delete the folder where the run came to nothing: no record, no checkpoint."""
        metrics = self.path / "metrics.jsonl"
        if self.ranks.is_main and not self.checkpoints and not (metrics.exists() and metrics.stat().st_size):
            shutil.rmtree(self.path)

    def log(self, stage: str, *, after: int) -> RunLog | NoLog:
        """Where a stage's metrics go that continues from step `after`."""
        return RunLog(self.path, stage, after=after) if self.ranks.is_main else NoLog()

    @property
    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def latest_checkpoint(self) -> Path:
        """The newest checkpoint; InputError where the run has written none."""
        if not self.checkpoints:
            raise InputError(f"{self.path}: holds no checkpoint yet, start it anew with --overwrite")
        return self.checkpoints[-1]

    def save_checkpoint(
        self,
        step: int,
        models: Mapping[str, Model],
        tokenizer: PreTrainedTokenizerBase,
        state: dict[str, Any],
        keep: int,
    ) -> None:
        """Write `checkpoints/step-NNNNNN` whole or not at all, then drop all but the newest `keep`."""
        folder = self.path / "checkpoints" / f"step-{step:06d}"
        save_checkpoint(folder, models, tokenizer, {**state, "step": step}, self.ranks)
        for old in self.checkpoints[:-keep] if self.ranks.is_main else []:
            shutil.rmtree(old)


def version() -> str:
    """Of the installed package."""
    return metadata.version("ppomax")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file; InputError naming file and line where that fails."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
