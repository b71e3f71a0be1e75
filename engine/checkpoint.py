"""Files that are whole or not there: text, model folders, checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from .errors import InputError, StorageError, first_line
from .lora import has_adapter, save_adapter
from .models import Model, ScalarModel
from .parallel import ALONE, Ranks
from .tensors import put_back, take_out, write_tensors
from .weights import SHARD_SIZE, save_weights, weight_files

# Whatever writes a file may run into a full disk, each in its own words.
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its place when the block ends well, and vanishes if not.

    Raises StorageError where writing fails; what stood in `folder` is then still there.
    """
    draft, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("draft", "old"))
    try:
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        _flush_to_disk(draft)
        _swap(folder, draft, old)
    except _WRITE_ERRORS as error:
        raise _storage_error(folder, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _swap(folder: Path, draft: Path, old: Path) -> None:
    if folder.exists():
        folder.rename(old)
    try:
        draft.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


def check_writable(path: Path) -> None:
    """Raise InputError where `atomic_file` could not write `path`: to be asked before the work whose result it takes.

    Leaves nothing behind, not even missing folders.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: expected the name of a file to write, found {_kind(path)}")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with NamedTemporaryFile(dir=folder, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise InputError(f"{path}: expected a file that can be written: {error.strerror}") from None


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "a device"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file beside `path` that takes its place when the block ends well, and vanishes if not."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        _flush_to_disk(draft)
        draft.replace(path)
    except _WRITE_ERRORS as error:
        raise _storage_error(path, error) from error
    finally:
        with suppress(OSError):
            draft.unlink()


def _storage_error(path: Path, error: BaseException) -> StorageError:
    reason = error.reason if isinstance(error, StorageError) else first_line(error)
    return StorageError(path, reason)


def save_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    max_shard_size: str = SHARD_SIZE,
    write: bool = True,
) -> None:
    """Write a Hugging Face folder: configuration, safetensors of at most `max_shard_size`, tokenizer.

    Where other files stand in `folder` they stay, but for the weights of a model that was there; `config.json`, which
    makes it a model folder, goes first and comes last. Where the model is sharded all processes call this, and one of
    them has `write`.
    """
    if not write:
        save_weights(model.model, folder, max_shard_size=max_shard_size, write=False)
        return
    if isinstance(model, ScalarModel) and model.config.pad_token_id is None:
        # Other tools find a response's end by its padding.
        model.config.pad_token_id = tokenizer.pad_token_id
    whole = folder / ".model"
    with atomic_folder(whole) as draft:
        save_weights(model.model, draft, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(draft)
    config = folder / "config.json"
    config.unlink(missing_ok=True)
    for old in weight_files(folder):
        old.unlink()
    for path in sorted(whole.iterdir(), key=lambda path: path.name == config.name):
        path.replace(folder / path.name)
    whole.rmdir()


@contextmanager
def common_folder(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """An `atomic_folder` that all processes write into: the main one makes it, and puts it in place when all are
    done."""
    if ranks.is_main:
        with atomic_folder(folder) as draft:
            ranks.barrier()
            yield draft
            ranks.barrier()
    else:
        ranks.barrier()
        yield folder.with_name(f".{folder.name}.draft")
        ranks.barrier()
    ranks.barrier()


def save_checkpoint(
    folder: Path,
    models: Mapping[str, Model],
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    ranks: Ranks = ALONE,
) -> None:
    """Write a checkpoint: each model as a Hugging Face folder of its name (an adapter as one of peft), `state.pt`, and
    the tensors of `state` in `tensors` (`tensors.py`), each process its part."""
    with common_folder(folder, ranks) as draft:
        for name, model in models.items():
            (draft / name).mkdir(exist_ok=True)
            if has_adapter(model):
                if ranks.is_main:
                    save_adapter(model, draft / name)
            else:
                save_model(model, tokenizer, draft / name, write=ranks.is_main)
        small, tensors = take_out(state)
        write_tensors(tensors, draft / "tensors", ranks)
        if ranks.is_main:
            torch.save({**small, "torch_rng": torch.get_rng_state()}, draft / "state.pt")


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` got as `state`, with a `Stored` for each tensor; restores torch's random state."""
    try:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        torch.set_rng_state(state["torch_rng"])
    except Exception as error:
        raise InputError(f"{checkpoint}/state.pt: not a readable checkpoint ({first_line(error)})") from None
    return put_back(state, checkpoint / "tensors")


def _flush_to_disk(path: Path) -> None:
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
