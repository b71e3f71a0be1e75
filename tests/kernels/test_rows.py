"""The loss maths in Triton against its definition in torch: terms, derivatives, borders, overflow, tiny log-ratios."""

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.kernels.kl import KLKind, kl_terms
from ppomax.kernels.ppo_terms import (
    PolicyInputs,
    PolicyOptions,
    ValueOptions,
    policy_terms,
    row_numbers,
    value_terms,
)
from torch import Tensor

# the interpreter computes both sides of `where`
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

KINDS: list[KLKind] = ["k1", "abs", "k2", "k3", "k1+", "k3+"]
KL_NUMBERS = {kind: i + 1 for i, kind in enumerate(KINDS)}  # as the kernels take them
LOG_RATIOS = [
    0.0, 1e-4, -1e-4, 1e-6, 0.18, 0.19, -0.22, -0.23, 0.39, 0.41, -0.39, -0.41, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0,
    20.0, -20.0, 100.0, -100.0,
]  # fmt: skip


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    """row_kernels.py, in the interpreter where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location("row_kernels", Path(__file__).with_name("row_kernels.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def grid(*axes: list[float]) -> list[Tensor]:
    """The product of the axes, one vector an axis, repeated up to a power of two."""
    points = list(itertools.product(*axes))
    size = 1 << (len(points) - 1).bit_length()
    points = (points * 2)[:size]
    return [torch.tensor(column) for column in zip(*points, strict=True)]


def run(kernel: Any, inputs: list[Tensor], results: int, *numbers: float, **constants: Any) -> list[Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.full((results, inputs[0].numel()), torch.nan, device=device)
    kernel[(1,)](torch.stack(inputs).to(device), out, *numbers, N=inputs[0].numel(), **constants)
    return list(out.cpu())


@pytest.mark.parametrize("kind", KINDS)
def test_kl(kind: KLKind, kernels: Any) -> None:
    (d,) = grid(LOG_RATIOS)
    ours = run(kernels.kl, [d], 2, KIND=KL_NUMBERS[kind])
    d.requires_grad_()
    value = kl_terms(d, kind)
    expected = [value, torch.autograd.grad(value.sum(), d)[0]]
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 0.3, 0.5, 3.0])
def test_k3_keeps_its_relative_accuracy(scale: float, kernels: Any) -> None:
    """`exp(-d) - 1 + d` in fp32 has an error of 6e-8 at any d: all of it at 1e-4, where k3 is 5e-9."""
    d = scale * torch.linspace(-1, 1, 64)
    ours = run(kernels.kl, [d], 2, KIND=KL_NUMBERS["k3"])
    slope = -torch.expm1(-d.double())
    torch.testing.assert_close(ours[0].double(), d.double() - slope, rtol=6e-6, atol=0)  # see below
    torch.testing.assert_close(ours[1].double(), slope, rtol=2e-6, atol=0)
    assert bool((ours[0] >= 0).all())


def test_series_and_closed_forms_meet(kernels: Any) -> None:
    """A GPU's exp is off by 2 ulps, its division by 2 more: at x = 0.4, exp(x) is 16 times exp(x) - 1 - x."""
    x = torch.cat([torch.linspace(-0.6, 0.6, 1008), torch.tensor([30.0, -30.0, -1e4, 0.4, -0.4, 0.15, -0.15, 0.0] * 2)])
    ours = run(kernels.series, [x], 3)
    z = x.double()
    exact = [torch.expm1(z) - z, torch.expm1(z), torch.tanh(z)]
    for a, b, rtol in zip(ours, exact, (6e-6, 2e-6, 4e-6), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=1e-12)


OPTIONS: dict[str, PolicyOptions] = {
    "default": PolicyOptions(),
    "no-range": PolicyOptions(clip_eps=0.0),
    "dual": PolicyOptions(clip_eps_high=0.3, dual_clip=2.0),
    "dual-inside-the-range": PolicyOptions(dual_clip=1.05),
    "clamped": PolicyOptions(log_ratio_clamp=0.5),
    "entropy": PolicyOptions(entropy_coef=0.1),
    "bounded-entropy": PolicyOptions(entropy_coef=0.1, entropy_bound=1.25),
    **{kind: PolicyOptions(kl_coef=0.3, kl_kind=kind) for kind in KINDS},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_policy(options: PolicyOptions, kernels: Any) -> None:
    """Term, ratio and derivatives over the whole grid, infinities included; NaN nowhere but where torch has it."""
    log_ratio, advantage, weight, entropy, d = grid(
        LOG_RATIOS, [0.0, 1.0, -1.0, 2.5], [1.0, 0.5], [0.5, 1.25, 2.0], [0.0, 1e-4, -0.7, 100.0]
    )
    inputs = PolicyInputs(-log_ratio, advantage, weight, -d)
    numbers = row_numbers(options, ValueOptions())[:7]
    bonus, kind = options.entropy_coef != 0, KL_NUMBERS[options.kl_kind] if options.kl_coef else 0
    zero = torch.zeros_like(d)
    tensors = [zero, inputs.old_logprobs, advantage, weight, entropy, inputs.ref_logprobs]
    term, ratio, slope, entropy_slope, low, high, held = run(
        kernels.policy, tensors, 7, *numbers, BONUS=bonus, KIND=kind
    )
    leaves = [zero.requires_grad_(), entropy.requires_grad_()]
    terms, ratios = policy_terms(*leaves, inputs, options)
    slopes = torch.autograd.grad(terms.sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(
        [term, ratio, slope, entropy_slope], [terms, ratios, *slopes], rtol=5e-6, atol=1e-6, equal_nan=True
    )
    assert not bool(slope.isnan().any())
    beyond = torch.stack([
        (advantage < 0) & (ratio < options.lower), (advantage > 0) & (ratio > options.upper),
        (advantage < 0) & (ratio > options.dual),
    ])  # fmt: skip
    assert torch.equal(torch.stack([low, high, held]).bool(), beyond)


@pytest.mark.parametrize("clip_eps", [0.25, 0.0, None])
def test_value(clip_eps: float | None, kernels: Any) -> None:
    """Binary fractions, so that borders and ties are met exactly."""
    value, old_value, target = grid(
        [0.0, 0.25, -0.25, 0.375, 0.5, 1.0, -2.0], [0.0, 0.125, 0.25, -0.5], [0.0, 0.25, 0.375, -0.25, 1.0, 0.125]
    )
    ours = run(kernels.value, [value, old_value, target], 3, clip_eps or 0.0, 0.5, CLIP=clip_eps is not None)
    value.requires_grad_()
    terms, clipped = value_terms(value, old_value, target, clip_eps, 0.5)
    expected = [terms, torch.autograd.grad(terms.sum(), value)[0], clipped.float()]
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
