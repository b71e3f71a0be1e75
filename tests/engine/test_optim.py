"""Schedules at their key steps, and the optimizer against AdamW written out."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ppomax.engine.config import OptimConfig, ScheduleConfig
from ppomax.engine.optim import Optimizer, lr_factor
from torch import Tensor, nn

TENTH = 0.1


@pytest.mark.parametrize(
    ("schedule", "total", "expected"),
    [
        (ScheduleConfig("constant"), 100, {0: 1, 50: 1, 99: 1}),
        (ScheduleConfig("constant", warmup=0.1), 100, {0: 1 / 11, 4: 5 / 11, 9: 10 / 11, 10: 1, 99: 1}),
        (ScheduleConfig("constant", warmup=4), 100, {0: 1 / 5, 3: 4 / 5, 4: 1, 99: 1}),
        (ScheduleConfig("constant", warmup=1), 100, {0: 1 / 2, 1: 1}),
        (ScheduleConfig("cosine", floor=TENTH), 100, {0: 1, 50: 0.55, 25: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 100: 0.1}),
        (ScheduleConfig("cosine", floor=TENTH), 100, {150: 0.1}),
        (ScheduleConfig("cosine", warmup=0.2, floor=TENTH), 100, {0: 1 / 21, 20: 1, 60: 0.55, 100: 0.1}),
        # the released scripts: max(0.1, step / 100), then sqrt(100 / step)
        (ScheduleConfig("inverse-sqrt", warmup=100, floor=TENTH), 5000,
         {0: 0.1, 5: 0.1, 50: 51 / 101, 100: 1, 400: 0.5, 2500: 0.2}),
        (ScheduleConfig("inverse-sqrt"), 100, {0: 1, 1: 1, 4: 0.5, 64: 0.125}),
    ],
)  # fmt: skip
def test_key_steps(schedule: ScheduleConfig, total: int, expected: dict[int, float]) -> None:
    assert {step: lr_factor(schedule, step, total) for step in expected} == pytest.approx(expected)


@given(
    st.sampled_from(["constant", "cosine", "inverse-sqrt"]),
    st.one_of(st.floats(0, 0.99), st.integers(1, 60).map(float)),
    st.floats(0, 1),
    st.integers(1, 200),
)
def test_every_schedule_rises_and_then_does_not(kind: Any, warmup: float, floor: float, total: int) -> None:
    schedule = ScheduleConfig(kind, warmup, floor)
    factors = [lr_factor(schedule, step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    top = math.ceil(warmup * total if warmup < 1 else warmup)
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)


class Small(nn.Module):
    """A matrix, a bias, and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 4, dtype=torch.float64, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.float64, generator=generator))
        self.frozen = nn.Parameter(torch.ones(2, 2, dtype=torch.float64), requires_grad=False)


def give_gradients(model: Small, step: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in (model.matrix, model.bias):
        parameter.grad = size * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)


def gradient_norm(model: Small) -> float:
    return math.sqrt(float(model.matrix.grad.square().sum() + model.bias.grad.square().sum()))


class ByHand:
    """AdamW of arXiv 1711.05101, algorithm 2, for one tensor."""

    def __init__(self, value: Tensor, config: OptimConfig, weight_decay: float) -> None:
        self.value, self.config, self.weight_decay = value.detach().clone(), config, weight_decay
        self.m, self.v, self.t = torch.zeros_like(value), torch.zeros_like(value), 0

    def step(self, gradient: Tensor, lr: float) -> None:
        (b1, b2), self.t = self.config.betas, self.t + 1
        self.value = self.value - lr * self.weight_decay * self.value
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient * gradient
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        self.value = self.value - lr * m / (v.sqrt() + self.config.eps)


CONFIG = OptimConfig(
    lr=0.05, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3, schedule=ScheduleConfig("cosine", warmup=2, floor=TENTH)
)


@pytest.mark.parametrize("grad_clip", [None, 0.7, 100.0])
def test_steps_against_adamw_by_hand(grad_clip: float | None) -> None:
    """Weight decay is on matrices only; one norm over all parameters clips them all."""
    model = Small()
    optimizer = Optimizer(model, CONFIG, 8, grad_clip)
    matrix, bias = ByHand(model.matrix, CONFIG, 0.3), ByHand(model.bias, CONFIG, 0.0)
    for step in range(8):
        give_gradients(model, step)
        norm, lr = gradient_norm(model), 0.05 * lr_factor(CONFIG.schedule, step, 8)
        scale = 1.0 if grad_clip is None else min(1.0, grad_clip / norm)
        for twin, parameter in ((matrix, model.matrix), (bias, model.bias)):
            twin.step(parameter.grad * scale, lr)
        measured = optimizer.step()
        assert float(measured["grad_norm"]) == pytest.approx(norm)
        assert measured["lr"] == pytest.approx(lr)
        assert measured["skipped_steps"] == 0
        torch.testing.assert_close(model.matrix.data, matrix.value, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.bias.data, bias.value, rtol=0, atol=1e-6)
        assert model.matrix.grad is None
        assert model.bias.grad is None
    assert len(optimizer.parameters) == 2, "frozen weights are none of its business"
    assert torch.equal(model.frozen, torch.ones(2, 2, dtype=torch.float64))


def test_clipping_bounds_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    optimizer = Optimizer(model, CONFIG, 8, 0.5)
    norms: list[float] = []
    monkeypatch.setattr(optimizer.adamw, "step", lambda: norms.append(gradient_norm(model)))
    for size, expected in ((100.0, 0.5), (1e-3, None)):
        give_gradients(model, 0, size)
        before = gradient_norm(model)
        optimizer.step()
        assert norms[-1] == pytest.approx(expected or before, rel=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grad_clip", [None, 1.0])
def test_a_step_without_a_finite_norm_is_skipped_and_counted(poison: float, grad_clip: float | None) -> None:
    model, clean = Small(), Small()
    optimizer, reference = Optimizer(model, CONFIG, 8, grad_clip), Optimizer(clean, CONFIG, 8, grad_clip)
    for step in range(4):
        give_gradients(model, step)
        give_gradients(clean, step)
        if step == 2:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            model.bias.grad[1] = poison
            measured = optimizer.step()
            assert not math.isfinite(measured["grad_norm"])
            assert measured["skipped_steps"] == 1
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            assert model.bias.grad is None
            reference.steps += 1  # the schedule goes on
        else:
            optimizer.step()
            reference.step()
    assert optimizer.step()["skipped_steps"] == 1
    for ours, theirs in zip(model.parameters(), clean.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_comes_back_to_the_last_bit() -> None:
    model = Small()
    optimizer = Optimizer(model, CONFIG, 8, 0.7)

    def train(model: Small, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            give_gradients(model, step)
            if step == 1:
                model.bias.grad[0] = math.nan
            optimizer.step()

    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Small()
    again.load_state_dict(saved["model"])
    resumed = Optimizer(again, CONFIG, 8, 0.7)
    resumed.load_state_dict(saved["optimizer"])
    assert (resumed.steps, resumed.skipped) == (4, 1)
    train(model, optimizer, range(4, 8))
    train(again, resumed, range(4, 8))
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
