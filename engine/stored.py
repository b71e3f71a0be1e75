"""The safetensors of a model folder: what is in which file, read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .errors import InputError, first_line

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Entry(NamedTuple):
    """What a file's header says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it: F32, BF16"""


class StoredWeights:
    """The safetensors of a model folder, read tensor by tensor; of several files one is open at a time.

    Raises:
        InputError: no such files, a file that the index names is missing, cut off, or lacks a tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        for file, names in self._files().items():
            entries = _header(file)
            if absent := sorted(names - entries.keys()):
                raise InputError(f"{file}: {absent[0]} is not in it, but {SAFE_WEIGHTS_INDEX_NAME} says so")
            self.entries |= entries
        self._lock = Lock()
        self._file: Path | None = None
        self._handle: Any = None

    def _files(self) -> dict[Path, set[str]]:
        """File -> the tensors that the index expects in it; the order of precedence is that of transformers."""
        if (single := self.folder / SAFE_WEIGHTS_NAME).is_file():
            return {single: set()}
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        if not index.is_file():
            raise InputError(f"{self.folder}: holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not an index of safetensors ({first_line(error)})") from None
        files: dict[Path, set[str]] = {}
        for name, file in sorted(places):
            if not isinstance(file, str):
                raise InputError(f"{index}: weight_map.{name} = {file!r}: expected the name of a file")
            files.setdefault(self.folder / file, set()).add(name)
        for file, names in files.items():
            if not file.is_file():
                raise InputError(f"{file}: no such file, but {index.name} says that it holds {min(names)}")
        return dict(sorted(files.items()))

    @property
    def dtype(self) -> torch.dtype | None:
        """That of all tensors, if they have the same one and it is of floating point."""
        found = {entry.dtype for entry in self.entries.values()}
        return _DTYPES.get(found.pop()) if len(found) == 1 else None

    def read(self, name: str, index: Any = ...) -> Tensor:
        """A tensor, or the part of it that `index` (slices) selects: a view into the mapped file."""
        file = self.entries[name].file
        with self._lock:
            try:
                if file != self._file:
                    self.close()
                    self._handle, self._file = safe_open(str(file), framework="pt"), file
                return self._handle.get_slice(name)[index]
            except (OSError, SafetensorError) as error:
                raise InputError(f"{file}: {name} cannot be read ({first_line(error)})") from error

    def close(self) -> None:
        """Let go of the open file; tensors that were read stay valid."""
        self._handle = self._file = None


def _header(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(str(file), framework="pt") as handle:
            views = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {name: Entry(file, tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({first_line(error)})") from None
