"""An iteration in parts: they add up, each phase runs alone, operators are told apart."""

import json
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its operations on the CPU's own path: not as `bench` has it, for Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return import_module("bench_iteration")


@pytest.fixture
def tiny(module: ModuleType) -> Any:
    return module.small_setting(prompts=4, prompt=6, response=5, width=32)


def test_rows_add_up_to_the_iteration(module: ModuleType, tiny: Any) -> None:
    result = module.measure(tiny, CPU, profile=True)
    assert set(result["rows"]) == set(module.GROUP)
    assert sum(result["rows"].values()) == pytest.approx(result["seconds_with_spans"])
    assert sum(group["seconds"] for group in result["groups"].values()) == pytest.approx(result["seconds_with_spans"])
    assert min(result["rows"].values()) > 0
    assert result["decode"]["steps"] >= tiny.lengths.response - 1
    assert result["flops"] > 0
    assert result["mfu"] is None  # a CPU's rate of products is not known
    json.dumps(result)
    for name in ("update policy", "score reference"):
        assert {"matrix products", "attention", "LM head and its loss"} <= set(result["operators"][name])
    assert "optimizer" in result["operators"]["policy optimizer"]
    assert "sampling" in result["operators"]["sampling"]


def test_flops_are_those_of_the_plan(module: ModuleType, tiny: Any) -> None:
    """2 for each parameter of a product and token, 3 passes, attention on top."""
    groups = module.against_plan(tiny, CPU, {"update critic": 2.0, "not explained": 1.0})
    layers = 4 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 86)
    pairs = tiny.lengths.sequence * (tiny.lengths.sequence + 1) // 2
    needed = 4 * 3 * (2 * layers * tiny.lengths.sequence + 4 * pairs * 4 * 32)
    assert groups["update critic"]["flops"] == pytest.approx(needed / 2.0)
    assert groups["not explained"]["flops"] is None


@pytest.mark.parametrize(
    ("phases", "rows"),
    [
        (["rollout"], {"prefill", "decode", "sampling"}),
        (["score"], {"score policy", "score reference", "score critic", "score reward"}),
        (["update"], {"update policy", "policy optimizer", "update critic", "critic optimizer"}),
    ],
)
def test_a_phase_alone(module: ModuleType, tiny: Any, phases: list[str], rows: set[str]) -> None:
    result = module.measure(tiny, CPU, phases, warm_up=False)
    assert rows <= set(result["rows"])
    others = {"decode", "score policy", "update policy"} - rows
    assert not others & set(result["rows"])


def test_decode_of_several_sizes(module: ModuleType, tiny: Any) -> None:
    few, many = (module.measure_decode(tiny, CPU, running, steps=3) for running in (2, 4))
    # the steps read 7 and 8 tokens of each sequence; K and V of 4 layers, 4 heads of 4, in float32
    assert many["bytes_per_step"] - few["bytes_per_step"] == 2 * 7.5 * 2 * 4 * 4 * 4 * 4
    assert few["steps"] == 2
    assert few["of_floor"] is None


def test_an_unknown_phase(module: ModuleType, tiny: Any) -> None:
    with pytest.raises(ValueError, match="phases decode: expected some of rollout, score, update"):
        module.measure(tiny, CPU, ["rollout", "decode"])


def test_spans_leave_out_what_is_inside(module: ModuleType) -> None:
    spans = module.Spans(CPU)
    with spans("outer"):
        time.sleep(0.01)
        with spans("inner"):
            time.sleep(0.05)
    assert spans.seconds["inner"] >= 0.05
    assert 0.01 <= spans.seconds["outer"] < spans.seconds["inner"]


def test_operators_by_span() -> None:
    """An operation inside one of this package's counts with it; what is left of a span is the host's."""
    spans = import_module("spans")

    def event(name: str, start: float, end: float, own: float, parent: Any = None) -> SimpleNamespace:
        times = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(
            name=name, time_range=times, self_cpu_time_total=own, cpu_parent=parent,
            device_type=torch.autograd.DeviceType.CPU,
        )  # fmt: skip

    fused = event("ppomax::linear_ppo", 10e6, 16e6, 2e6)
    events = [
        event("span: outer", 0, 30e6, 0), event("span: inner", 5e6, 20e6, 0),
        fused, event("aten::mm", 11e6, 15e6, 4e6, fused),
        event("aten::mm", 22e6, 25e6, 3e6), event("aten::mm", 40e6, 41e6, 1e6),
    ]  # fmt: skip
    assert spans.by_span(events, on_gpu=False) == {
        "outer": {spans.HOST: 12.0, "matrix products": 3.0},
        "inner": {spans.HOST: 9.0, "LM head and its loss": 6.0},
    }
