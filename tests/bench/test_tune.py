"""How launch configurations are chosen and written, with a timer that needs no GPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.kernels.gpu import launch

BEFORE = {"BLOCK_V": 64, "num_warps": 4, "num_stages": 1}
TABLE = {
    "default": {
        "rows": [{"up_to": {"vocab": 100}, **BEFORE, "num_warps": 1}, {"up_to": {"vocab": 1000}, **BEFORE}, BEFORE],
        "other": [{"BLOCK_N": 8, "num_warps": 1, "num_stages": 1}],
    },
    "sm_80": {"rows": [{"BLOCK_V": 32, "num_warps": 4, "num_stages": 1}]},
}


@pytest.fixture
def tune(bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    module = bench("tune")
    monkeypatch.setattr(launch, "table", lambda: TABLE)
    launch._configuration.cache_clear()
    yield module
    launch._configuration.cache_clear()


def candidate(block: int) -> dict[str, int]:
    return {**BEFORE, "BLOCK_V": block}


@pytest.fixture
def tuning(tune: Any, bench: Callable[[str], Any]) -> Any:
    return bench("candidates").Tuning("rows", "twice", "N=4", {"vocab": 500}, {"vocab": 1000})


@pytest.fixture
def used() -> list[int]:
    """Blocks that the operation was launched with."""
    return []


@pytest.fixture
def op(bench: Callable[[str], Any], used: list[int]) -> Any:
    """Doubles its input, wrongly with blocks of 7; blocks above 1000 do not fit."""
    ops = bench("ops")

    def ours(x: torch.Tensor) -> list[torch.Tensor]:
        used.append(block_in_force())
        if used[-1] > 1000:
            raise RuntimeError("out of shared memory")
        return [x * (3 if used[-1] == 7 else 2)]

    judge = ops.against(lambda x: [2 * x.double()])
    return ops.Op("twice", "N=4", lambda: {"x": torch.randn(4)}, {"ppomax": ours}, judge, 1e-6)


def block_in_force() -> int:
    return launch.configuration("rows", torch.device("cpu"), vocab=500)["BLOCK_V"]


def timer_of(milliseconds: dict[int, float], used: list[int]) -> Callable[..., dict[str, list[float]]]:
    """Says how long each function takes by the block that it launches with."""

    def timer(functions: dict[str, Callable[[], Any]], samples: int) -> dict[str, list[float]]:
        times = {}
        for name, function in functions.items():
            function()
            times[name] = [milliseconds[used[-1]]] * samples
        return times

    return timer


def test_the_fastest_that_works_wins(
    tune: Any, tuning: Any, op: Any, used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CANDIDATES", {"rows": [candidate(b) for b in (16, 32, 64, 2048)]})
    winner = tune.tune(tuning, [op], 5, timer_of({16: 3.0, 32: 1.0, 64: 2.0}, used))
    assert winner == (tuning, BEFORE, candidate(32), 2.0, 1.0)
    assert used == [64, 16, 32, 2048, 64, 16, 32, 64]  # each once to be judged, then timed, the present one twice
    assert block_in_force() == 64


@pytest.mark.parametrize(
    ("medians", "again", "best"),
    [
        ([2.0, 1.0, 3.0], 2.0, 1),
        ([2.0, 1.97], 2.0, 0),
        ([2.0, 1.9], 2.3, 0),
        ([2.3, 1.9], 2.0, 0),
        ([1.0], 1.0, 0),
        ([1.0, 1.0, 0.5, 0.4], 1.0, 3),
    ],
    ids=["faster", "by less than 2 %", "within noise", "within noise below", "alone", "fastest"],
)
def test_pick(tune: Any, medians: list[float], again: float, best: int) -> None:
    assert tune.pick(medians, again) == best


def test_a_wrong_candidate_ends_it(tune: Any, tuning: Any, op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "CANDIDATES", {"rows": [candidate(16), candidate(7)]})
    with pytest.raises(tune.WrongResult, match=r"rows with .*: 7.*: twice, N=4, is off by 0\.5"):
        tune.tune(tuning, [op], 5, timer_of({}, []))


def test_nothing_is_written_where_a_candidate_is_wrong(
    tune: Any, tuning: Any, op: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "configs.json"
    wrong = {"TUNINGS": [tuning], "configured": lambda device: [op]}
    for name, value in {**wrong, "CANDIDATES": {"rows": [candidate(7)]}}.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr("sys.argv", ["tune.py", "--out", str(path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "chip_of", lambda device: "sm_90")
    with pytest.raises(SystemExit, match=r"is off by 0\.5; nothing was written"):
        tune.main()
    assert not path.exists()


def test_winners_are_written_under_the_chip_s_name(
    tune: Any, tuning: Any, op: Any, used: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "configs.json"
    values = {"TUNINGS": [tuning], "configured": lambda device: [op], "chip_of": lambda device: "sm_90", "PATH": path,
              "CANDIDATES": {"rows": [candidate(32)]}}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(tune, name, value)
    path.write_text(json.dumps(TABLE))
    timer = timer_of({32: 1.0, 64: 2.0}, used)
    chosen = tune.tune
    monkeypatch.setattr(tune, "tune", lambda *arguments: chosen(*arguments, timer=timer))
    monkeypatch.setattr("sys.argv", ["tune.py", "--out", str(path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    tune.main()
    first, _, last = TABLE["default"]["rows"]
    expected = {"rows": [first, {"up_to": {"vocab": 1000}, **candidate(32)}, last]}
    assert json.loads(path.read_text()) == {**TABLE, "sm_90": expected}


def test_without_a_gpu(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tune.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees none here"):
        tune.main()


def merged(tune: Any, tuning: Any, chip: str, *winners: tuple[dict[str, int], int]) -> Any:
    """The chip's entries of `rows` after winners (up_to, block)."""
    made = [tune.Winner(tuning._replace(up_to=up_to), BEFORE, candidate(block), 2.0, 1.0) for up_to, block in winners]
    before = json.dumps(TABLE)
    result = tune.merged(TABLE, chip, made)
    assert json.dumps(TABLE) == before
    assert result["default"] == TABLE["default"]
    return result[chip]["rows"]


def test_winners_join_the_default_s_other_shapes(tune: Any, tuning: Any) -> None:
    first, _, last = TABLE["default"]["rows"]
    entries = merged(tune, tuning, "sm_90", ({"vocab": 1000}, 16))
    assert entries == [first, {"up_to": {"vocab": 1000}, **candidate(16)}, last]


def test_winners_replace_and_join_the_chip_s_own(tune: Any, tuning: Any) -> None:
    entries = merged(tune, tuning, "sm_80", ({}, 16), ({"vocab": 1000}, 8), ({"vocab": 50}, 4))
    assert [(e.get("up_to"), e["BLOCK_V"]) for e in entries] == [({"vocab": 50}, 4), ({"vocab": 1000}, 8), (None, 16)]


def test_what_is_written_is_read_back(tune: Any, tmp_path: Path) -> None:
    path = tmp_path / "configs.json"
    path.write_text("something else")
    tune.write(TABLE, path)
    assert json.loads(path.read_text()) == TABLE
    assert list(tmp_path.iterdir()) == [path]


def test_the_committed_file_changes_in_its_white_space_at_most(tune: Any) -> None:
    text = tune.PATH.read_text()
    rendered = tune.rendered(json.loads(text))
    assert "".join(rendered.split()) == "".join(text.split())
    assert max(len(line) for line in rendered.splitlines()) <= 120


def test_every_tuning_can_be_tuned(tune: Any, bench: Callable[[str], Any]) -> None:
    known = {(op.name, op.shape) for op in tune.configured("meta")}
    table = json.loads(tune.PATH.read_text())["default"]
    for tuning in tune.TUNINGS:
        assert (tuning.op, tuning.size) in known
        assert tuning.up_to in [entry.get("up_to", {}) for entry in table[tuning.kernel]], tuning
        assert all(tuning.shape[key] <= most for key, most in tuning.up_to.items())
        known_keys = table[tuning.kernel][-1].keys() | {"maxnreg"}
        for config in tune.CANDIDATES[tuning.kernel]:
            assert config.keys() | {"maxnreg"} == known_keys, tuning.kernel
    assert set(tune.CANDIDATES) == {tuning.kernel for tuning in tune.TUNINGS}
