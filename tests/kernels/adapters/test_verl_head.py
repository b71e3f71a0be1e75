"""The verl adapter's log-probs, entropy and LM head: against loops, and against verl where it is importable."""

import importlib
import math
from typing import Any

import pytest
import torch
from ppomax.kernels.adapters import verl


@pytest.fixture
def logits(dtype: torch.dtype) -> torch.Tensor:
    """[2, 3, 7]: one row far below 0, one with -inf."""
    x = 3 * torch.randn(2, 3, 7, dtype=dtype)
    x[0, 1] -= 500.0
    x[1, 2, ::2] = -math.inf
    return x


LABELS = [[0, 6, 3], [2, 1, 5]]


def test_logprobs_and_entropy(logits: Any, loops: Any, same: Any) -> None:
    labels = torch.tensor(LABELS)
    exact = [
        [loops.softmax_row(x, y) for x, y in zip(*row, strict=True)]
        for row in zip(logits.double().tolist(), LABELS, strict=True)
    ]
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        logprobs = verl.logprobs_from_logits(leaf * 1, labels, inplace_backward=inplace)
        same(logprobs, [[t.logprob for t in row] for row in exact])
        same(torch.autograd.grad(logprobs.sum(), leaf)[0], [[t.d_logprob for t in row] for row in exact])
    for function in (verl.entropy_from_logits, verl.entropy_from_logits_with_chunking):
        leaf = logits.clone().requires_grad_()
        entropy = function(leaf)
        same(entropy, [[t.entropy for t in row] for row in exact])
        same(torch.autograd.grad(entropy.sum(), leaf)[0], [[t.d_entropy for t in row] for row in exact])


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["packed", "padded"])
def test_fused_head(shape: tuple[int, ...], dtype: torch.dtype, loops: Any, same: Any) -> None:
    labels = torch.tensor([0, 6, 3, 2, 1, 5])
    hidden = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(7, 4, dtype=dtype, requires_grad=True)
    rows = (hidden.double() @ weight.double().t()).tolist()
    exact = [loops.softmax_row(x, y, 1.3) for x, y in zip(rows, labels.tolist(), strict=True)]
    slope = torch.tensor(
        [[2 * a + b for a, b in zip(t.d_logprob, t.d_entropy, strict=True)] for t in exact], dtype=torch.float64
    )
    for head in (verl.FusedLinearForPPO(), verl.linear_cross_entropy):
        logprobs, entropy = head(hidden.view(*shape, 4), weight, labels.view(shape), 1.3)
        assert logprobs.shape == entropy.shape == shape
        same(logprobs.flatten(), [t.logprob for t in exact])
        same(entropy.flatten(), [t.entropy for t in exact])
        dx, dw = torch.autograd.grad(2 * logprobs.sum() + entropy.sum(), (hidden, weight))
        same(dx, slope @ weight.double(), ulps=512)
        same(dw, slope.t() @ hidden.double(), ulps=512)


def test_fused_head_limits() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for options in ({"reduction": "sum"}, {"dist_process_group": object()}):
        with pytest.raises(ValueError, match="linear_cross_entropy"):
            verl.linear_cross_entropy(x, x, y, **options)  # type: ignore[arg-type]


# Against verl itself


@pytest.fixture
def functional() -> Any:
    return pytest.importorskip("verl.utils.torch_functional", reason="verl is not importable", exc_type=ImportError)


@pytest.fixture
def experimental(functional: Any) -> Any:
    return importlib.import_module("verl.utils.experimental.torch_functional")


def test_signatures(functional: Any, experimental: Any, same_signature: Any) -> None:
    for name in ("logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking"):
        same_signature(getattr(verl, name), getattr(functional, name))
    same_signature(verl.FusedLinearForPPO, experimental.FusedLinearForPPO)
    same_signature(verl.FusedLinearForPPO.forward, experimental.FusedLinearForPPO.forward)


def test_log_probs_are_verl_s(functional: Any, dtype: torch.dtype, same: Any) -> None:
    x, labels = 3 * torch.randn(2, 3, 7, dtype=dtype), torch.tensor(LABELS)
    for name, arguments in (("logprobs_from_logits", (labels, False)), ("entropy_from_logits", ())):
        results = []
        for module in (verl, functional):
            leaf = x.clone().requires_grad_()
            out = getattr(module, name)(leaf, *arguments)
            results.append([out, *torch.autograd.grad(out.sum(), leaf)])
        for ours, theirs in zip(*results, strict=True):
            same(ours, theirs.detach().double(), ulps=128)


def test_heads_are_verl_s(experimental: Any, dtype: torch.dtype, same: Any) -> None:
    results = []
    for head in (verl.FusedLinearForPPO(), experimental.FusedLinearForPPO(chunk_size=2)):
        torch.manual_seed(1)
        hidden = torch.randn(2, 3, 4, dtype=dtype, requires_grad=True)
        weight = torch.randn(7, 4, dtype=dtype, requires_grad=True)
        out = head(hidden, weight, torch.tensor(LABELS), 1.3)
        results.append([*out, *torch.autograd.grad(2 * out[0].sum() + out[1].sum(), (hidden, weight))])
    for x, y in zip(*results, strict=True):
        # verl's log-probs are float32 whatever the inputs
        same(x.float(), y.double(), ulps=512)
