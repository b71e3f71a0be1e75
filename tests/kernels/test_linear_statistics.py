"""The fused form of `linear_logprobs`, statistics in a GEMM's epilogue: held to float64 as the chunked form is."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from ppomax.kernels.gpu.launch import overriding
from ppomax.kernels.linear_logprobs import linear_logprobs, linear_logprobs_ref
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("path", "fused"),
    pytest.mark.parametrize("path", ["triton"], indirect=True),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tensor-temperature": {"temperature": torch.tensor(1.3)},
    "all": {"bias": True, "softcap": 5.0, "temperature": 0.8},
}


@pytest.fixture(params=["pointers", "tma", "committed"])
def fused(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small blocks, so that small inputs take several programs and parts, and those that are committed."""
    sizes = {"BLOCK_N": 32, "BLOCK_V": 64, "BLOCK_H": 32, "GROUP": 2, "num_warps": 4, "num_stages": 2}
    with ExitStack() as stack:
        stack.enter_context(overriding("linear_logprobs", {"fused": 1}))
        if request.param != "committed":
            merge = {"BLOCK_N": 32, "BLOCK_P": 2, "num_warps": 1, "num_stages": 1}
            stack.enter_context(overriding("linear_statistics", {**sizes, "TMA": int(request.param == "tma")}))
            stack.enter_context(overriding("linear_merge", merge))
        yield


def check(out: Any, exact: Any) -> None:
    """To the accuracy of fp32 logits."""
    for a, b in zip(out, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=2e-6, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@DTYPES
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", [(1, 8, 5), (33, 40, 64), (70, 72, 131)], ids=str)
def test_matches_float64(shape: tuple, options: dict, dtype: torch.dtype, head_inputs: Any) -> None:
    hidden, weight, bias, labels = head_inputs(*shape, dtype, 4.0)
    options = {**options, "bias": bias} if "bias" in options else options
    functions = (linear_logprobs, linear_logprobs_ref)
    check(*(f(hidden, weight, labels, **options) for f in functions))


def test_gradients(head_inputs: Any, no_worse: Any) -> None:
    """The backward recomputes logits in the chunked form, from the statistics of this one."""
    hidden, weight, _, labels = head_inputs(40, 32, 131, torch.bfloat16, 4.0)
    c, h = torch.randn(2, 40)

    def gradients(function: Any, x: Tensor, w: Tensor) -> Any:
        out = function(x, w, labels)
        return torch.autograd.grad((out[0] * c).sum() + (out[1] * h).sum(), (x, w))

    def plain(x: Tensor, w: Tensor, y: Tensor) -> Any:
        logp = torch.log_softmax(torch.nn.functional.linear(x, w).float(), -1)
        return logp.gather(1, y[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)

    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    ours, theirs = (gradients(f, hidden, weight) for f in (linear_logprobs, plain))
    no_worse(ours, theirs, gradients(linear_logprobs_ref, *wide))


@DTYPES
def test_masked_and_ignored_rows_may_hold_anything(dtype: torch.dtype, head_inputs: Any) -> None:
    hidden, weight, _, labels = (x.detach() for x in head_inputs(70, 8, 70, dtype))
    mask = torch.rand(70) > 0.3
    labels[::7] = -100
    kept = mask & (labels != -100)
    clean = linear_logprobs(hidden, weight, labels, mask=mask)
    hidden[~kept], labels[~mask] = torch.nan, 10**9
    for a, b in zip(clean, linear_logprobs(hidden, weight, labels, mask=mask), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b[~kept], torch.zeros_like(b[~kept]))


def test_tiles_of_minus_infinity_and_logits_far_from_zero(head_inputs: Any) -> None:
    hidden, weight, bias, labels = (x.detach() for x in head_inputs(20, 16, 200, torch.float16))
    labels %= 30
    bias = bias.float() - 1000.0
    bias[32:170] = -torch.inf
    allowed = bias > -torch.inf
    exact = linear_logprobs_ref(hidden, weight[allowed], labels, bias=bias[allowed])
    for a, b in zip(linear_logprobs(hidden, weight, labels, bias=bias), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-4)  # an ulp of 1000 is 6e-5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_one_nan_logit_breaks_its_row(head_inputs: Any) -> None:
    hidden, weight, bias, labels = (x.detach() for x in head_inputs(20, 16, 200, torch.float16))
    bias[32:128] = -torch.inf
    bias[50] = torch.nan
    mask = torch.arange(20) % 3 != 0
    for x in linear_logprobs(hidden, weight, labels % 30, bias=bias, mask=mask):
        assert torch.equal(x.isnan(), mask)


def test_labels_outside_the_vocabulary(head_inputs: Any) -> None:
    hidden, weight, _, labels = (x.detach() for x in head_inputs(5, 8, 70, torch.float16))
    labels[1], labels[2], labels[3] = 70, -1, 10**12
    wrong = linear_logprobs(hidden, weight, labels).logprobs.isnan()
    assert wrong.tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("step", [1, 2])
def test_rows_that_the_copy_engine_cannot_take(step: int, head_inputs: Any) -> None:
    """Of 42 bytes, or not contiguous: pointers serve."""
    hidden, weight, _, labels = (x.detach() for x in head_inputs(20, 21, 70, torch.float16))
    hidden, weight = hidden[:, ::step], weight[:, ::step]
    check(linear_logprobs(hidden, weight, labels), linear_logprobs_ref(hidden, weight, labels))


def test_no_rows(head_inputs: Any) -> None:
    hidden, weight, _, labels = (x.detach() for x in head_inputs(0, 8, 70, torch.float16))
    assert linear_logprobs(hidden, weight, labels).logprobs.shape == (0,)


def test_float32_takes_the_chunked_form(head_inputs: Any) -> None:
    hidden, weight, _, labels = (x.detach() for x in head_inputs(9, 8, 70))
    with overriding("linear_statistics", {}):  # launching it would fail
        check(linear_logprobs(hidden, weight, labels), linear_logprobs_ref(hidden, weight, labels))
