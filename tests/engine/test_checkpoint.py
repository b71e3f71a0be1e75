"""Files that are whole or not there, whatever goes wrong while they are written."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.engine import checkpoint
from ppomax.engine.checkpoint import (
    atomic_file,
    atomic_folder,
    check_writable,
    load_state,
    save_checkpoint,
    save_model,
)
from ppomax.engine.errors import InputError, StorageError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
KEPT = "nothing of it was kept, what stood there still does"
# What a full disk looks like, by who writes
WRITE_ERRORS = {
    "the operating system": (FULL, r"\[Errno 28\] No space left on device"),
    "torch": (RuntimeError("PytorchStreamWriter failed\nwriting file"), "PytorchStreamWriter failed"),
    "safetensors": (SafetensorError("I/O error: File too large"), "I/O error: File too large"),
    "nobody knows": (OSError(), "OSError"),
}
write_errors = pytest.mark.parametrize("name", WRITE_ERRORS)


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


def write_half(atomic: Any, target: Path, error: BaseException) -> None:
    """Write a part of a folder or file, then fail."""
    with atomic(target) as draft:
        (draft / "a" if atomic is atomic_folder else draft).write_text("half")
        raise error


@pytest.fixture(params=["new", "old"])
def target(request: pytest.FixtureRequest, tmp_path: Path, files_in: Callable[[Path], dict[str, bytes]]) -> Any:
    """A folder to write, new or with content; afterwards neither it nor its surroundings may have changed."""
    folder = tmp_path / "target"
    if request.param == "old":
        folder.mkdir()
        (folder / "a").write_text("old")
    before = files_in(tmp_path)
    yield folder
    assert files_in(tmp_path) == before
    assert folder.exists() == (request.param == "old")
    assert [path.name for path in tmp_path.iterdir()] == ["target"] * (request.param == "old")


# Folders


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path, files_in: Callable) -> None:
    for names in (["a", "b"], ["b", "c"]):
        with atomic_folder(tmp_path / "x" / "folder") as draft:
            assert not any(draft.iterdir())
            for name in names:
                (draft / name).write_text(name + names[0])
    assert files_in(tmp_path) == {"x/folder/b": b"bb", "x/folder/c": b"cb"}
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["folder"]


@write_errors
def test_a_folder_that_cannot_be_written(target: Path, name: str) -> None:
    error, reason = WRITE_ERRORS[name]
    with pytest.raises(StorageError, match=f"^{target}: could not be written \\({reason}\\); {KEPT}$") as caught:
        write_half(atomic_folder, target, error)
    assert isinstance(caught.value, InputError)
    assert isinstance(caught.value, OSError)


def test_another_error_inside_a_folder_is_passed_on(target: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(atomic_folder, target, KeyboardInterrupt())


def test_a_folder_that_cannot_take_its_place(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refuse(path: Path, goal: Path) -> Path:
        if path.name.endswith(".draft"):
            raise FULL
        return rename(path, goal)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="No space left"), atomic_folder(target) as draft:
        (draft / "a").write_text("new")


def test_the_outermost_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, atomic_folder(tmp_path / "outer") as draft:
        write_half(atomic_folder, draft / "inner", FULL)
    assert str(caught.value).startswith(f"{tmp_path}/outer: could not be written ([Errno 28] No space left on device)")


def test_drafts_of_a_killed_process_are_no_obstacle(tmp_path: Path, files_in: Callable) -> None:
    for name in (".folder.draft", ".folder.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rest").write_text("rest")
    with atomic_folder(tmp_path / "folder") as draft:
        (draft / "a").write_text("new")
    assert files_in(tmp_path) == {"folder/a": b"new"}


def test_content_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def fsync(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path).as_posix())
        assert not (tmp_path / "folder").exists()
        assert not (tmp_path / "file").exists()

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_file(tmp_path / "file") as draft:
        draft.write_text("new")
    (tmp_path / "file").unlink()
    with atomic_folder(tmp_path / "folder") as draft:
        (draft / "deep").mkdir()
        (draft / "deep" / "a").write_text("new")
    assert synced == [".file.draft", ".folder.draft/deep/a"]


# Files


def test_a_file_takes_the_place_of_the_old_one(tmp_path: Path, files_in: Callable) -> None:
    for text in ("old", "new"):
        with atomic_file(tmp_path / "x" / "file") as draft:
            draft.write_text(text)
    assert files_in(tmp_path) == {"x/file": b"new"}


@write_errors
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_a_file_that_cannot_be_written(tmp_path: Path, name: str, old: bool, files_in: Callable) -> None:
    path = tmp_path / "file"
    if old:
        path.write_text("old")
    error, reason = WRITE_ERRORS[name]
    with pytest.raises(StorageError, match=f"^{path}: could not be written \\({reason}\\); {KEPT}$"):
        write_half(atomic_file, path, error)
    assert files_in(tmp_path) == ({"file": b"old"} if old else {})


def test_a_file_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(StorageError, match=f"^{tmp_path}/file/x: could not be written"):
        write_half(atomic_file, tmp_path / "file" / "x", FULL)


# Before long work


@pytest.mark.parametrize("name", ["new", "old", "deep/new"])
def test_a_file_that_can_be_written(name: str, tmp_path: Path, files_in: Callable) -> None:
    (tmp_path / "old").write_text("old")
    check_writable(tmp_path / name)
    assert files_in(tmp_path) == {"old": b"old"}
    assert not (tmp_path / "deep").exists()


NO_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a folder": (lambda folder: folder, "expected the name of a file to write, found a folder"),
    "a device": (lambda folder: Path(os.devnull), "expected the name of a file to write, found a device"),
    "below a file": (lambda folder: folder / "file" / "x", "expected a file that can be written: Not a directory"),
    "too long": (lambda folder: folder / ("x" * 250), "expected a file that can be written: File name too long"),
    "nowhere": (lambda folder: Path("/proc/x"), "expected a file that can be written: "),
}


@pytest.mark.parametrize("case", NO_FILES)
def test_what_cannot_be_written_is_known_before(case: str, tmp_path: Path, files_in: Callable) -> None:
    (tmp_path / "file").write_text("old")
    place, expected = NO_FILES[case]
    path = place(tmp_path)
    with pytest.raises(InputError, match=f"^{path}: {expected}"):
        check_writable(path)
    assert files_in(tmp_path) == {"file": b"old"}


# Models and checkpoints


def test_models_load_in_plain_transformers(policy_folder: Path, reward_folder: Path, texts: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    ids = torch.tensor([tokenizer.encode(texts[0])])
    policy = AutoModelForCausalLM.from_pretrained(policy_folder)
    assert policy(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    reward = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    assert reward.config.pad_token_id == tokenizer.pad_token_id
    assert reward(ids).logits.shape == (1, 1)


def test_a_model_is_saved_beside_other_files(
    tmp_path: Path, new_policy: Any, tokenizer: Any, files_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, goal: moved.append(path.name) or replace(path, goal))
    (tmp_path / "metrics.jsonl").write_text("kept")
    for seed in (0, 1):
        save_model(new_policy(seed=seed, vocab_size=300), tokenizer, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"
    assert not list(tmp_path.glob(".*"))
    assert moved[len(moved) // 2 - 1] == moved[-1] == "config.json"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    expected = new_policy(seed=1, vocab_size=300).model.state_dict()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_a_full_disk_leaves_the_old_model(
    part: str, tmp_path: Path, new_policy: Any, tokenizer: Any, files_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(new_policy(vocab_size=300), tokenizer, folder)
    before = files_in(folder)
    model = new_policy(seed=1, vocab_size=300)
    saver = type(model.model) if part == "weights" else type(tokenizer)
    monkeypatch.setattr(saver, "save_pretrained", failing(FULL))
    with pytest.raises(StorageError, match="No space left"):
        save_model(model, tokenizer, folder)
    assert files_in(folder) == before


STATE: dict[str, Any] = {"step": 3, "moments": {"mean": 0.1}, "optimizer": {"m": torch.arange(3.0)}}


def save(folder: Path, new_policy: Any, new_scalar: Any, tokenizer: Any, seed: int = 0) -> None:
    models = {"policy": new_policy(seed=seed, vocab_size=300), "critic": new_scalar(seed=seed, vocab_size=300)}
    save_checkpoint(folder, models, tokenizer, {**STATE, "seed": seed})


def test_a_checkpoint_holds_models_state_and_random_state(
    tmp_path: Path, new_policy: Any, new_scalar: Any, tokenizer: Any
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        save(tmp_path / "step", new_policy, new_scalar, tokenizer)
        expected = torch.rand(3)
        torch.manual_seed(6)
        state = load_state(tmp_path / "step")
        assert torch.equal(torch.rand(3), expected)
    assert (state["step"], state["moments"], state["seed"]) == (3, {"mean": 0.1}, 0)
    assert torch.equal(state["optimizer"]["m"].tensor(), torch.arange(3.0))
    weights = new_policy(vocab_size=300).model.state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step" / "policy").state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "step" / "critic")
    assert torch.equal(critic.score.weight, new_scalar(vocab_size=300).model.score.weight)


@pytest.mark.parametrize("part", ["weights", "state"])
def test_a_full_disk_leaves_the_old_checkpoint(
    part: str,
    tmp_path: Path,
    new_policy: Any,
    new_scalar: Any,
    tokenizer: Any,
    files_in: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(tmp_path / "step", new_policy, new_scalar, tokenizer)
    before = files_in(tmp_path)
    if part == "weights":
        monkeypatch.setattr(type(new_scalar().model), "save_pretrained", failing(FULL))
    else:
        monkeypatch.setattr(checkpoint.torch, "save", failing(RuntimeError("unexpected pos 64 vs 0")))
    with pytest.raises(StorageError, match=f"^{tmp_path}/step: could not be written"):
        save(tmp_path / "step", new_policy, new_scalar, tokenizer, seed=1)
    assert files_in(tmp_path) == before


BROKEN: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "something else": lambda path: path.write_text("step = 3"),
    "without random state": lambda path: torch.save({"step": 3}, path),
    "with code in it": lambda path: torch.save({"step": shutil.rmtree}, path),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_state_is_named(tmp_path: Path, case: str) -> None:
    save_checkpoint(tmp_path / "step", {}, None, STATE)  # type: ignore[arg-type]
    BROKEN[case](tmp_path / "step" / "state.pt")
    with pytest.raises(InputError) as caught:
        load_state(tmp_path / "step")
    assert str(caught.value).startswith(f"{tmp_path}/step/state.pt: not a readable checkpoint (")
    assert "\n" not in str(caught.value)
