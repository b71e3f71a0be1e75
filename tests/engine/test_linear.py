"""The linear layers on a CPU: torch's function, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ppomax.engine.linear import linear, speed_up
from torch import Tensor, nn


def with_gradients(function: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = function(*leaves, *[None] * (3 - len(leaves)))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(1, 40, 24), (3, 7, 24), (16, 24), (15, 24), (1, 24)], ids=str)
def test_errors_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(10, 24)
    b = torch.randn(10) if bias else None
    ours, plain = with_gradients(linear, x, weight, b), with_gradients(F.linear, x, weight, b)
    exact = with_gradients(F.linear, x.double(), weight.double(), None if b is None else b.double())
    for a, p, e in zip(ours, plain, exact, strict=True):
        assert a.shape == p.shape
        assert a.is_contiguous()
        assert (a - e).abs().max() <= 2 * (p - e).abs().max() + 1e-6


def test_partial_gradients_and_retained_graph() -> None:
    x, weight = torch.randn(20, 8), torch.randn(5, 8, requires_grad=True)
    out = linear(x, weight, None)
    out.sum().backward(retain_graph=True)
    assert weight.grad is not None
    once = weight.grad.clone()
    out.sum().backward()
    assert torch.equal(weight.grad, 2 * once)
    frozen = weight.detach()
    x.requires_grad_()
    assert torch.autograd.grad(linear(x, frozen, None).sum(), x)[0].shape == x.shape


def test_a_model_keeps_its_function_and_names() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 3, bias=False))
    x, names = torch.randn(40, 8), list(model.state_dict())
    expected = model(x)
    speed_up(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.double()(x.double()), expected.double(), rtol=1e-5, atol=1e-6)
