"""KL estimators: closed forms, unbiasedness on a distribution that is known, gradients."""

from typing import Any

import pytest
import torch
from ppomax.kernels.kl import kl_penalty, kl_penalty_ref

KINDS = ["k1", "abs", "k2", "k3", "k1+", "k3+"]


def test_closed_forms() -> None:
    logprobs = torch.tensor([-1.0, -0.5, -3.0], dtype=torch.float64)
    ref = torch.tensor([-1.2, -0.5, -1.0], dtype=torch.float64)
    d = logprobs - ref
    expected = {"k1": d, "abs": d.abs(), "k2": d**2 / 2, "k3": ref.exp() / logprobs.exp() - 1 + d}
    for kind, value in (expected | {"k1+": expected["k1"], "k3+": expected["k3"]}).items():
        torch.testing.assert_close(kl_penalty(logprobs, ref, kind), value, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    p, q = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    return p, q


@pytest.mark.parametrize("kind", ["k1", "k3", "k1+", "k3+"])
def test_expectation_is_the_divergence(kind: Any) -> None:
    """Summed over the whole distribution, exactly: k1 and k3 are unbiased."""
    p, q = distributions()
    divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    torch.testing.assert_close((p.exp() * kl_penalty(p, q, kind)).sum(), divergence, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["k2", "k1+", "k3+"])
def test_expected_gradient_is_that_of_the_divergence(kind: Any) -> None:
    """E_p[d k / d theta] = d KL / d theta for k2 and the straight-through forms (and not for k1, k3)."""
    _, q = distributions()
    theta = torch.randn(50, dtype=torch.float64, requires_grad=True)
    p = theta.log_softmax(-1)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), theta, retain_graph=True)
    (estimate,) = torch.autograd.grad((p.exp().detach() * kl_penalty(p, q, kind)).sum(), theta)
    torch.testing.assert_close(estimate, exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["abs", "k2", "k3", "k3+"])
def test_never_negative_and_exact_near_zero(kind: Any) -> None:
    ref = -torch.rand(1000)
    for scale in (1e-6, 1e-3, 1.0, 10.0):
        assert bool((kl_penalty(ref + scale * torch.randn(1000), ref, kind) >= 0).all())
    assert torch.equal(kl_penalty(ref, ref, kind), torch.zeros(1000))


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_error_and_gradient(kind: Any, no_worse: Any) -> None:
    logprobs, ref = -torch.rand(200) * 4, -torch.rand(200) * 4
    results = []
    for function in (kl_penalty, kl_penalty, kl_penalty_ref):
        x = logprobs.clone().requires_grad_()
        y = function(x, ref, kind)
        results.append([y, torch.autograd.grad(y.sum(), x)[0]])
    no_worse(*results)


def test_clamps() -> None:
    logprobs, ref = torch.tensor([0.0, -50.0]), torch.tensor([-50.0, 0.0])
    assert kl_penalty(logprobs, ref, "k1", log_ratio_clamp=20.0).tolist() == [20.0, -20.0]
    assert kl_penalty(logprobs, ref, "k3", clamp=10.0).tolist() == [10.0, 10.0]


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        kl_penalty(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="unknown KL estimator 'k5'"):
        kl_penalty(torch.zeros(3), torch.zeros(3), "k5")  # type: ignore[arg-type]
