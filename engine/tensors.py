"""The tensors of a checkpoint's state: torch's distributed checkpoint, whatever the number of processes.

Each process writes the parts that it has, and reads the parts that it needs: state saved by some processes goes on
with any other number of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor

from .errors import InputError, first_line
from .parallel import Ranks


@dataclass(frozen=True)
class Stored:
    """A tensor in a folder, not read yet."""

    folder: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """All of it, on the CPU."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        read_tensors([(self, whole)])
        return whole


def take_out(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(`state` with a tensor without content in place of each that has dimensions, those tensors by their path)"""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: walk(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item, f"{path}/{index}") for index, item in enumerate(value))
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        tensors[path.removeprefix("/")] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    return walk(state, ""), tensors


def put_back(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`state` as `take_out` left it, with a `Stored` for each of its tensors, which are in `folder`."""

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: walk(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item, f"{path}/{index}") for index, item in enumerate(value))
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        return Stored(folder, path.removeprefix("/"), value.shape, value.dtype)

    return walk(state, "")


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """Write what this process has of `tensors`, which are the same on all processes or DTensors.

    Raises:
        OSError: on all processes, where one of them cannot write.
    """
    if not tensors:
        return
    writer = FileSystemWriter(folder, sync_files=False)
    try:
        with _in_peace():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=ranks.size == 1)
    except CheckpointException as error:
        raise OSError(_reason(error)) from error


def read_tensors(wanted: Sequence[tuple[Stored, Tensor]]) -> None:
    """Read stored tensors of one folder into tensors, of DTensors this process's part.

    Raises:
        InputError: they cannot be read.
    """
    if not wanted:
        return
    folder = wanted[0][0].folder
    targets: dict[str, Any] = {stored.name: target for stored, target in wanted}
    alone = not any(isinstance(target, DTensor) for target in targets.values())
    try:
        with _in_peace():
            dcp.load(targets, storage_reader=_reader(folder), no_dist=alone)
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: not the tensors of a checkpoint ({_reason(error)})") from None


def _reader(folder: Path) -> FileSystemReader:
    """Of tensors in `folder`, whose metadata can be read: torch would log a traceback where they cannot."""
    reader = FileSystemReader(folder)
    try:
        reader.read_metadata()
    except Exception as error:  # a broken pickle fails in any way
        raise OSError(f".metadata: {first_line(error)}") from None
    return reader


def fill(target: Tensor, source: Tensor | Stored) -> None:
    """Copy or read `source` into `target`."""
    if isinstance(source, Stored):
        read_tensors([(source, target)])
    else:
        target.copy_(source)


@contextmanager
def _in_peace() -> Iterator[None]:
    """Without the warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """What went wrong on the first process where something did."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)
