"""Cross-entropy from hidden states: against float64, weights, and the log-probs that the others give."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ppomax.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from ppomax.kernels.linear_logprobs import linear_logprobs
from torch import Tensor

pytestmark = pytest.mark.usefixtures("path")


def plain_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, row_weights: Tensor | None = None, **options: Any
) -> Any:
    z = F.linear(hidden, weight, options.get("bias"))
    cap = options.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    logp = torch.log_softmax(z, -1)
    kept = labels != -100 if row_weights is None else (labels != -100) & (row_weights != 0)
    logprobs = torch.where(kept, logp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1), 0.0)
    weights = kept.float() if row_weights is None else row_weights
    loss = -(logprobs * weights).sum() / options.get("normalizer", kept.sum())
    return SimpleNamespace(loss=loss, logprobs=logprobs, entropy=torch.where(kept, -(logp.exp() * logp).sum(-1), 0.0))


@pytest.mark.usefixtures("small_chunks", "poisoned")
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": 4.0, "normalizer": 7.0}], ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 5), (40, 24, 131), (65, 16, 48)], ids=str)
def test_matches_float64(shape: tuple, options: dict, weighted: bool, head_inputs: Any, no_worse: Any) -> None:
    hidden, weight, bias, labels = head_inputs(*shape, scale=3.0)
    labels[1::5] = -100
    row_weights = torch.rand(shape[0]) * (torch.rand(shape[0]) > 0.2) if weighted else None
    options = {**options, "bias": bias} if "bias" in options else options
    leaves = [hidden, weight, bias] if "bias" in options else [hidden, weight]
    results = []
    for function in (linear_cross_entropy, plain_cross_entropy, linear_cross_entropy_ref):
        out = function(hidden, weight, labels, row_weights, **options)
        results.append([out.loss, out.logprobs, out.entropy, *torch.autograd.grad(out.loss, leaves)])
    no_worse(*results)


def test_is_torchs_cross_entropy(head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(60, 16, 131, torch.float64)
    labels[::3] = -100
    ours = linear_cross_entropy(hidden, weight, labels).loss
    torchs = F.cross_entropy(hidden @ weight.t(), labels)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, torchs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("small_chunks")
def test_gradcheck(head_inputs: Any) -> None:
    hidden, weight, bias, labels = head_inputs(5, 4, 60, torch.float64)
    row_weights = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0], dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda x, w, b: linear_cross_entropy(x, w, labels, row_weights, bias=b, softcap=3.0).loss,
        (hidden, weight, bias),
    )


def test_logprobs_are_those_of_linear_logprobs_bit_for_bit(head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(100, 24, 300)
    labels[::4] = -100
    with torch.no_grad():
        expected = linear_logprobs(hidden, weight, labels)
    out = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(out.logprobs, expected.logprobs)
    assert torch.equal(out.entropy, expected.entropy)


def test_rows_of_weight_zero_may_hold_anything(head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(20, 8, 50)
    row_weights = (torch.arange(20) % 3).float()
    out = linear_cross_entropy(hidden, weight, labels, row_weights)
    clean = torch.autograd.grad(out.loss, (hidden, weight))
    garbage = hidden.detach().clone()
    garbage[::3], labels[::3] = torch.nan, -5
    again = linear_cross_entropy(garbage.requires_grad_(), weight, labels, row_weights)
    assert torch.equal(again.loss, out.loss)
    for a, b in zip(torch.autograd.grad(again.loss, (garbage, weight)), clean, strict=True):
        assert torch.equal(a, b)


def test_micro_batches_and_weight_grad(head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(50, 8, 60)
    labels[::4] = -100
    whole = linear_cross_entropy(hidden, weight, labels)
    _, weight_grad = torch.autograd.grad(whole.loss, (hidden, weight))
    buffer, total = torch.zeros(60, 8), torch.zeros(())
    for rows in (slice(0, 10), slice(10, 50)):
        part = linear_cross_entropy(
            hidden[rows], weight, labels[rows], normalizer=(labels != -100).sum(), weight_grad=buffer
        )
        part.loss.backward()
        total += part.loss.detach()
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(buffer, weight_grad)
    assert weight.grad is None


def test_edges(head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(4, 8, 50)
    out = linear_cross_entropy(hidden, weight, torch.full((4,), -100))
    out.loss.backward()
    for x in (out.loss, hidden.grad, weight.grad):
        assert torch.equal(x, torch.zeros_like(x))
    assert float(linear_cross_entropy(hidden[:0], weight, labels[:0]).loss.detach()) == 0.0
    with pytest.raises(ValueError, match="row_weights"):
        linear_cross_entropy(hidden, weight, labels, torch.ones(3))


def test_label_outside_the_vocabulary(path: str, head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(4, 8, 50)
    labels[1] = 50
    if path == "triton":
        out = linear_cross_entropy(hidden, weight, labels)
        assert out.logprobs.isnan().tolist() == [False, True, False, False]
        assert bool(out.loss.isnan())
    else:
        with pytest.raises(ValueError, match="outside the vocabulary"):
            linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_partial_gradients(wanted: int, head_inputs: Any) -> None:
    *inputs, labels = head_inputs(20, 8, 50)
    exact = torch.autograd.grad(linear_cross_entropy_ref(*inputs[:2], labels, bias=inputs[2]).loss, inputs)[wanted]
    for i, x in enumerate(inputs):
        x.requires_grad_(i == wanted)
    linear_cross_entropy(*inputs[:2], labels, bias=inputs[2]).loss.backward()
    assert [x.grad is not None for x in inputs] == [i == wanted for i in range(3)]
    torch.testing.assert_close(inputs[wanted].grad, exact.float())


@pytest.mark.parametrize("in_buffer", [False, True])
def test_compiles_in_one_graph(in_buffer: bool, head_inputs: Any) -> None:
    hidden, weight, bias, labels = head_inputs(20, 8, 50)
    labels[::4] = -100

    def loss(x: Tensor, w: Tensor, b: Tensor, buffer: Tensor | None) -> Tensor:
        return linear_cross_entropy(x * 1.0, w, labels, bias=b, softcap=5.0, weight_grad=buffer).loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        buffer = torch.zeros_like(weight, requires_grad=False) if in_buffer else None
        grads = torch.autograd.grad(function(hidden, weight, bias, buffer), (hidden, weight, bias), allow_unused=True)
        results.append([grads[0], buffer if in_buffer else grads[1], grads[2]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert float(results[0][1].abs().max()) > 0


def test_custom_op_is_sound(head_inputs: Any) -> None:
    hidden, weight, bias, labels = (x.detach() for x in head_inputs(6, 8, 30))
    rows = (hidden, weight, bias, labels, torch.arange(6) != 2, 5.0, -torch.rand(6))
    op = torch.ops.ppomax.linear_cross_entropy.default
    for buffer, wants in ((None, [True, True, True]), (torch.zeros(30, 8), [True, False, False])):
        torch.library.opcheck(op, (*rows, buffer, wants))
