"""Tensors of a checkpoint's state, taken out of it and read back when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.engine.errors import InputError
from ppomax.engine.parallel import ALONE
from ppomax.engine.tensors import Stored, fill, put_back, read_tensors, take_out, write_tensors

STATE: dict[str, Any] = {
    "step": 3,
    "optimizer": {
        "adamw": [{"step": torch.tensor(2.0), "m": torch.arange(6.0).view(2, 3)}, {}, {"low": torch.tensor([-3, 4])}]
    },
    "under_way": [({"tokens": [1, 2]}, {"seed": 5})],
}
NAMES = ["optimizer/adamw/0/m", "optimizer/adamw/2/low"]


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Any]:
    """STATE, written and put back."""
    small, tensors = take_out(STATE)
    write_tensors(tensors, tmp_path / "tensors", ALONE)
    torch.save(small, tmp_path / "state.pt")
    return put_back(torch.load(tmp_path / "state.pt", weights_only=True), tmp_path / "tensors")


def test_tensors_are_taken_out_and_the_rest_stays() -> None:
    small, tensors = take_out(STATE)
    assert list(tensors) == NAMES
    assert small["step"] == 3
    assert small["under_way"] == STATE["under_way"]
    first = small["optimizer"]["adamw"][0]
    assert float(first["step"]) == 2.0  # a scalar is no matter
    assert (first["m"].device.type, first["m"].shape) == ("meta", (2, 3))
    assert STATE["optimizer"]["adamw"][0]["m"].device.type == "cpu"


def test_what_is_put_back_is_read_when_it_is_asked_for(saved: dict[str, Any]) -> None:
    first, empty, last = saved["optimizer"]["adamw"]
    assert empty == {}
    assert (type(first["m"]), first["m"].name, first["m"].shape) == (Stored, NAMES[0], (2, 3))
    assert torch.equal(first["m"].tensor(), torch.arange(6.0).view(2, 3))
    assert torch.equal(last["low"].tensor(), torch.tensor([-3, 4]))
    assert last["low"].tensor().dtype == torch.int64
    assert saved["under_way"] == STATE["under_way"]


def test_several_are_read_at_once_into_their_places(saved: dict[str, Any]) -> None:
    first, _, last = saved["optimizer"]["adamw"]
    targets = [torch.full((2, 3), torch.nan), torch.zeros(2, dtype=torch.int64)]
    read_tensors([(first["m"], targets[0]), (last["low"], targets[1])])
    assert torch.equal(targets[0], STATE["optimizer"]["adamw"][0]["m"])
    assert targets[1].tolist() == [-3, 4]
    read_tensors([])


def test_filling_takes_tensors_and_stored_ones(saved: dict[str, Any]) -> None:
    for source in (STATE["optimizer"]["adamw"][0]["m"], saved["optimizer"]["adamw"][0]["m"]):
        target = torch.zeros(2, 3)
        fill(target, source)
        assert torch.equal(target, torch.arange(6.0).view(2, 3))


def test_state_without_tensors_leaves_no_folder(tmp_path: Path) -> None:
    small, tensors = take_out({"step": 1})
    write_tensors(tensors, tmp_path / "tensors", ALONE)
    assert (small, list(tmp_path.iterdir())) == ({"step": 1}, [])


BROKEN: dict[str, Callable[[Path], object]] = {
    "missing": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "without metadata": lambda folder: (folder / ".metadata").unlink(),
    "metadata overwritten": lambda folder: (folder / ".metadata").write_bytes(b"\xff" * 99),
    "metadata cut off": lambda folder: (folder / ".metadata").write_bytes(b"PK"),
    "data missing": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "data cut off": lambda folder: next(folder.glob("*.distcp")).write_bytes(b"0" * 100),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tensors_are_named(
    case: str, saved: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    BROKEN[case](tmp_path / "tensors")
    with pytest.raises(InputError, match=f"^{tmp_path}/tensors: not the tensors of a checkpoint \\(") as caught:
        saved["optimizer"]["adamw"][0]["m"].tensor()
    assert "\n" not in str(caught.value)
    assert not [record for record in caplog.records if record.name == "root"]


def test_a_tensor_of_another_name_or_shape_is_not_read(saved: dict[str, Any], tmp_path: Path) -> None:
    stored = saved["optimizer"]["adamw"][0]["m"]
    for other, shape in ((Stored(stored.folder, "other", stored.shape, stored.dtype), (2, 3)), (stored, (3, 3))):
        with pytest.raises(InputError, match="not the tensors of a checkpoint"):
            read_tensors([(other, torch.empty(shape))])
