"""KL estimators on both paths: closed forms, unbiasedness on a distribution that is known, gradients, clamps."""

from typing import Any

import pytest
import torch
from ppomax.kernels import kl as module
from ppomax.kernels.kl import kl_penalty, kl_penalty_ref
from torch import Tensor

pytestmark = pytest.mark.usefixtures("path")

KINDS = ["k1", "abs", "k2", "k3", "k1+", "k3+"]
# no tighter: near 0 a GPU's exp, off by 2 ulps, is all of k3's error
CLAMPS: dict[str, dict[str, float]] = {"": {}, "log-ratio": {"log_ratio_clamp": 1.7}, "result": {"clamp": 1.5}}


def test_closed_forms() -> None:
    logprobs = torch.tensor([-1.0, -0.5, -3.0], dtype=torch.float64)
    ref = torch.tensor([-1.2, -0.5, -1.0], dtype=torch.float64)
    d = logprobs - ref
    expected = {"k1": d, "abs": d.abs(), "k2": d**2 / 2, "k3": ref.exp() / logprobs.exp() - 1 + d}
    for kind, value in (expected | {"k1+": expected["k1"], "k3+": expected["k3"]}).items():
        torch.testing.assert_close(kl_penalty(logprobs, ref, kind), value, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]


def distributions() -> tuple[Tensor, Tensor]:
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


def test_straight_through_values_are_exact() -> None:
    logprobs, ref = -torch.rand(500) * 9, -torch.rand(500) * 9
    for kind in ("k1", "k3"):
        straight = kl_penalty(logprobs, ref, f"{kind}+")  # type: ignore[arg-type]
        assert torch.equal(straight, kl_penalty(logprobs, ref, kind))


def with_gradients(function: Any, inputs: tuple[Tensor, Tensor], upstream: Tensor, *args: Any, **clamps: float) -> Any:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves, *args, **clamps)
    return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("clamps", CLAMPS.values(), ids=CLAMPS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_error_and_gradients(
    kind: Any, clamps: dict[str, float], no_worse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, upstream = (-torch.rand(3, 700) * 2, -torch.rand(3, 700) * 2), torch.randn(3, 700)
    ours = with_gradients(kl_penalty, inputs, upstream, kind, **clamps)
    exact = with_gradients(kl_penalty_ref, inputs, upstream, kind, **clamps)
    monkeypatch.setattr(module, "uses_triton", lambda *tensors: False)
    no_worse(ours, with_gradients(kl_penalty, inputs, upstream, kind, **clamps), exact)


def test_clamps() -> None:
    logprobs, ref = torch.tensor([0.0, -50.0]), torch.tensor([-50.0, 0.0])
    assert kl_penalty(logprobs, ref, "k1", log_ratio_clamp=20.0).tolist() == [20.0, -20.0]
    assert kl_penalty(logprobs, ref, "k3", clamp=10.0).tolist() == [10.0, 10.0]
    x = torch.tensor([0.5, 0.75, -0.5, -0.75], requires_grad=True)  # at a border the gradient still flows
    for clamp in ({"log_ratio_clamp": 0.5}, {"clamp": 0.5}):
        assert torch.autograd.grad(kl_penalty(x, torch.zeros(4), "k1", **clamp).sum(), x)[0].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("leaf", [0, 1])
def test_gradient_of_one_input(leaf: int) -> None:
    inputs = [-torch.rand(20), -torch.rand(20)]
    inputs[leaf].requires_grad_()
    kl_penalty(inputs[0], inputs[1], "k2").sum().backward()
    d = (inputs[0] - inputs[1]).detach()
    torch.testing.assert_close(inputs[leaf].grad, -d if leaf else d)
    assert inputs[1 - leaf].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    inputs = (-torch.rand(300).to(dtype), -torch.rand(300).to(dtype))
    ours, exact = (with_gradients(f, inputs, torch.ones(300), "k3") for f in (kl_penalty, kl_penalty_ref))
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    torch.testing.assert_close(ours[0], exact[0].float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours[1:], exact[1:], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_shapes_strides_and_retained_graph() -> None:
    for shape in ((0,), (), (1,), (3, 0), (2, 3, 5)):
        assert kl_penalty(torch.zeros(shape), torch.zeros(shape), "k3").shape == shape
    x, y = torch.randn(6, 4)[::2, 1:3].requires_grad_(), torch.randn(2, 3).T
    kl = kl_penalty(x, y, "k2")
    assert torch.equal(kl, kl_penalty(x.contiguous(), y.contiguous(), "k2"))
    once = torch.autograd.grad(kl.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(kl.sum(), x)[0], once)


def test_compiles_in_one_graph() -> None:
    torch.compiler.reset()  # the other path's graph
    x, y = torch.randn(2, 40)

    def loss(x: Tensor) -> Tensor:
        return kl_penalty(x * 1.0, y, "k3+", log_ratio_clamp=1.5).square().sum()

    x.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(loss(x), x)[0])


def test_custom_ops_are_sound(path: str) -> None:
    if path == "torch":
        pytest.skip("the torch path has no operator")
    x, y, g = torch.randn(3, 20)
    torch.library.opcheck(torch.ops.ppomax.kl_forward.default, (x, y, "k3", None, 2.0))
    for wants in ((True, True), (False, True)):
        torch.library.opcheck(torch.ops.ppomax.kl_backward.default, (x, y, g, "k3", None, 2.0, *wants))


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        kl_penalty(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="unknown KL estimator 'k5'"):
        kl_penalty(torch.zeros(3), torch.zeros(3), "k5")  # type: ignore[arg-type]
