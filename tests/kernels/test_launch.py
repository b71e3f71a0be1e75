"""Launch configurations by chip and shape, records of launches, and the committed table."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.kernels.gpu import launch as module
from ppomax.kernels.gpu.launch import configuration, launch, multiprocessors, overriding, recording, splits_of

CPU = torch.device("cpu")
TABLE = {
    "default": {
        "rows": [{"up_to": {"vocab": 100, "rows": 8}, "BLOCK_V": 16}, {"up_to": {"vocab": 1000}, "BLOCK_V": 64},
                 {"BLOCK_V": 256, "num_warps": 8}],
        "small": [{"up_to": {"vocab": 10}, "BLOCK_V": 16}],
    },
    "sm_90": {"rows": [{"BLOCK_V": 512}]},
    "sm_100": {"small": [{"BLOCK_V": 32}]},
}  # fmt: skip


class Kernel:
    """Stands for a Triton function; keeps what it was launched with."""

    __name__ = "rows"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **arguments: self.calls.append((grid, arguments))


@pytest.fixture
def _table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "table", lambda: TABLE)
    module._configuration.cache_clear()
    yield
    module._configuration.cache_clear()


@pytest.mark.usefixtures("_table")
@pytest.mark.parametrize(
    ("vocab", "rows", "block"), [(100, 8, 16), (100, 9, 64), (101, 1, 64), (1000, 1, 64), (1001, 1, 256)]
)
def test_first_entry_that_fits_the_shape(vocab: int, rows: int, block: int) -> None:
    assert configuration("rows", CPU, vocab=vocab, rows=rows)["BLOCK_V"] == block


@pytest.mark.usefixtures("_table")
def test_entry_of_the_chip_else_default() -> None:
    with recording("sm_90") as launches:
        assert configuration("rows", CPU, vocab=1, rows=1) == {"BLOCK_V": 512}
    assert launches.configurations == [("rows", {"BLOCK_V": 512})]
    with recording("sm_100"):
        assert configuration("rows", CPU, vocab=5000, rows=1) == {"BLOCK_V": 256, "num_warps": 8}


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], torch.device]]:
    """gpu_of(8, 9): a device that says it is a GPU of capability 8.9."""

    def made(*capability: int) -> torch.device:
        module._capability.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
        return torch.device("cuda", 0)

    yield made
    module._capability.cache_clear()


@pytest.mark.usefixtures("_table")
@pytest.mark.parametrize(
    ("capability", "rows", "small"),
    [((9, 0), 512, 16), ((8, 6), 16, 16), ((10, 0), 16, 32), ((10, 3), 16, 32), ((12, 1), 16, 16), ((13, 0), 16, 16)],
)
def test_a_chip_s_own_then_its_kin_s_then_the_default(
    capability: tuple[int, int], rows: int, small: int, gpu_of: Callable[[int, int], torch.device]
) -> None:
    device = gpu_of(*capability)
    assert configuration("rows", device, vocab=1, rows=1)["BLOCK_V"] == rows
    assert configuration("small", device, vocab=1)["BLOCK_V"] == small


def test_older_gpus_are_refused(gpu_of: Callable[[int, int], torch.device]) -> None:
    with pytest.raises(RuntimeError, match=r"a card is sm_75: the kernels are for sm_80 \(Ampere\) and later GPUs"):
        configuration("rows", gpu_of(7, 5), vocab=1, rows=1)


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0), (12, 1)])
def test_no_copy_engine_where_there_is_none(
    capability: tuple[int, int], gpu_of: Callable[[int, int], torch.device]
) -> None:
    assert configuration("linear_statistics", gpu_of(*capability))["TMA"] == 0


@pytest.mark.usefixtures("_table")
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("unknown", {"vocab": 3}, "no configuration of unknown on default at {'vocab': 3}"),
        ("small", {"vocab": 11}, "no configuration of small on default at {'vocab': 11}"),
        ("rows", {"rows": 1}, "configurations of rows go by vocab, rows; asked for {'rows': 1}"),
    ],
    ids=["kernel", "shape", "key"],
)
def test_missing_configurations_are_named(name: str, shape: dict[str, int], message: str) -> None:
    with pytest.raises(LookupError, match=re.escape(message)):
        configuration(name, CPU, **shape)


@pytest.mark.usefixtures("_table")
def test_results_are_not_the_table_s_own() -> None:
    configuration("rows", CPU, vocab=5000, rows=1)["BLOCK_V"] = 0
    assert configuration("rows", CPU, vocab=5000, rows=1)["BLOCK_V"] == 256


@pytest.mark.usefixtures("_table")
def test_overriding_ends_with_its_block() -> None:
    before = configuration("rows", CPU, vocab=5000, rows=1)
    with overriding("rows", {"BLOCK_V": 1}):
        with overriding("rows", {"BLOCK_V": 2}):
            assert configuration("rows", CPU, vocab=5000, rows=1) == {"BLOCK_V": 2}
        assert configuration("rows", CPU) == {"BLOCK_V": 1}
        assert configuration("small", CPU, vocab=1) == {"BLOCK_V": 16}
    assert configuration("rows", CPU, vocab=5000, rows=1) == before


def test_launch_splits_the_configuration() -> None:
    kernel = Kernel()
    launch(kernel, [3, 2], {"BLOCK_V": 64, "num_warps": 4, "num_stages": 2}, x_ptr=None)
    expected = {"x_ptr": None, "BLOCK_V": 64, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert kernel.calls == [((3, 2), expected)]


class Elsewhere(torch.Tensor):
    """Stands for a tensor on the second GPU."""

    device = torch.device("cuda", 1)


@pytest.mark.parametrize(("current", "entered"), [(0, [torch.device("cuda", 1)]), (1, [])])
def test_launches_are_on_the_device_of_their_tensors(
    current: int, entered: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[torch.device] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        devices.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", on)
    kernel = Kernel()
    launch(kernel, (1,), {}, mask_ptr=None, x_ptr=torch.empty(3, device="cpu").as_subclass(Elsewhere), n=3)
    assert devices == entered
    assert len(kernel.calls) == 1


def test_an_empty_grid_launches_nothing() -> None:
    kernel = Kernel()
    launch(kernel, (4, 0), {})
    with recording("sm_90") as launches:
        launch(kernel, (0,), {})
    assert kernel.calls == []
    assert launches == []


def test_recording_notes_launches_in_place_of_them() -> None:
    kernel, x = Kernel(), torch.empty(3, device="meta")
    with recording("sm_80") as outer:
        launch(kernel, (1,), {"BLOCK_V": 64, "num_warps": 4}, x_ptr=x, n=3)
        with recording("sm_90") as inner:
            assert multiprocessors(CPU) == 132
            launch(kernel, (2,), {})
        assert multiprocessors(CPU) == 108
    assert kernel.calls == []
    assert [len(outer), len(inner)] == [1, 1]
    assert outer[0].grid == (1,)
    assert outer[0].arguments == {"x_ptr": x, "n": 3, "BLOCK_V": 64}
    assert outer[0].options == {"num_warps": 4}
    launch(kernel, (1,), {})
    assert len(kernel.calls) == 1


def test_recording_knows_its_chips() -> None:
    with pytest.raises(ValueError, match="not for sm_70"), recording("sm_70"):
        pass


def test_failing_launches_are_named() -> None:
    class Failing(Kernel):
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            raise MemoryError("out of shared memory")

    message = r"rows: grid \(7,\), {'BLOCK_V': 64}, {'x_ptr': \(3, 5\)}: out of shared memory"
    with pytest.raises(RuntimeError, match=message):
        launch(Failing(), (7,), {"BLOCK_V": 64}, x_ptr=torch.zeros(3, 5), n=2)


@pytest.mark.parametrize(
    ("rows", "columns", "splits"), [(1, 100, 1), (1, 10_000, 64), (100, 10_000, 2), (264, 10_000, 1), (0, 500, 4)]
)
def test_splits_fill_the_chip_twice(rows: int, columns: int, splits: int) -> None:
    with recording("sm_90"):
        assert splits_of(rows, columns, 128, CPU) == splits


def test_committed_table() -> None:
    table = module.table()
    assert set(table) <= {"default", *(f"sm_{n}" for n in (80, 86, 87, 89, 90, 100, 103, 120))}
    for chip, kernels in table.items():
        for name, entries in kernels.items():
            assert name in table["default"], f"{name} of {chip} has no default"
            assert ["up_to" in entry for entry in entries] == [True] * (len(entries) - 1) + [False], (chip, name)
            for entry in entries:
                sizes = [value for key, value in entry.items() if key.startswith("BLOCK_") or key == "num_warps"]
                assert all(size & (size - 1) == 0 < size for size in sizes), (chip, name, entry)
                assert entry.get("num_warps", 1) <= 32
                assert 1 <= entry.get("num_stages", 1) <= 8


def test_every_kernel_that_asks_has_a_default_and_no_entry_is_left_over() -> None:
    sources = "".join(path.read_text() for path in Path(module.__file__).parent.glob("*.py"))
    named = set(module.table()["default"])
    assert set(re.findall(r'\bconfiguration\(\s*"(\w+)"', sources)) <= named
    assert {name for name in named if f'"{name}"' not in sources} == set()
