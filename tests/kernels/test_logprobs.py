"""Log-probs from logits: against float64, at the edges, over the logits' own memory."""

from typing import Any

import pytest
import torch
from ppomax.kernels import logprobs as module
from ppomax.kernels.logprobs import logprobs_from_logits, logprobs_from_logits_ref
from torch import Tensor

pytestmark = pytest.mark.usefixtures("path")


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 300)


def plain(logits: Tensor, labels: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits.float() / temperature, -1)
    return logp.gather(-1, labels[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def with_gradient(function: Any, logits: Tensor, labels: Tensor, c: Tensor, h: Tensor, **options: Any) -> list[Tensor]:
    out = function(logits, labels, **options)
    return [*out, torch.autograd.grad((out[0] * c).sum() + (out[1] * h).sum(), logits)[0]]


@pytest.mark.usefixtures("_small_chunks", "poisoned")
@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.tensor(1.7)], ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (5, 131), (3, 4, 33), (2, 1000)], ids=str)
def test_matches_float64(shape: tuple[int, ...], temperature: Any, no_worse: Any) -> None:
    logits = (torch.randn(shape) * 4).requires_grad_()
    labels = torch.randint(0, shape[-1], shape[:-1])
    c, h = torch.randn(2, *shape[:-1])
    no_worse(
        *(
            with_gradient(f, logits, labels, c, h, temperature=temperature)
            for f in (logprobs_from_logits, plain, logprobs_from_logits_ref)
        )
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits(dtype: torch.dtype) -> None:
    logits = (torch.randn(6, 300) * 4).to(dtype).requires_grad_()
    labels = torch.randint(0, 300, (6,))
    ours = with_gradient(logprobs_from_logits, logits, labels, torch.ones(6), torch.ones(6))
    exact = with_gradient(logprobs_from_logits_ref, logits, labels, torch.ones(6), torch.ones(6))
    assert [t.dtype for t in ours] == [torch.float32, torch.float32, dtype]
    torch.testing.assert_close(ours[:2], [t.float() for t in exact[:2]], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours[2], exact[2], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_gradcheck() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 3])
    torch.autograd.gradcheck(lambda z: logprobs_from_logits(z, labels, temperature=0.7), (logits,))


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(output: int, no_worse: Any) -> None:
    logits, labels = torch.randn(5, 40, requires_grad=True), torch.randint(0, 40, (5,))
    functions = (logprobs_from_logits, plain, logprobs_from_logits_ref)
    no_worse(*(torch.autograd.grad(f(logits, labels)[output].sum(), logits) for f in functions))


@pytest.mark.usefixtures("_small_chunks")
def test_masked_and_ignored_rows_may_hold_anything() -> None:
    logits, labels = torch.randn(12, 50), torch.randint(0, 50, (12,))
    mask = torch.rand(12) > 0.3
    labels[4] = -100
    kept = mask & (labels != -100)
    c, h = torch.randn(2, 12)
    clean = with_gradient(logprobs_from_logits, logits.requires_grad_(), labels, c, h, mask=mask)
    dirty_logits = logits.detach().clone()
    dirty_logits[~kept] = torch.nan
    labels[~mask] = -7
    c[~kept], h[~kept] = torch.nan, torch.nan
    dirty = with_gradient(logprobs_from_logits, dirty_logits.requires_grad_(), labels, c, h, mask=mask)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b[~kept], torch.zeros_like(b[~kept]))


@pytest.mark.parametrize("offset", [1e4, -1e4, -150.0])
def test_logits_far_from_zero(offset: float, no_worse: Any) -> None:
    logits = (torch.randn(5, 60) + offset).requires_grad_()
    labels = torch.randint(0, 60, (5,))
    c, h = torch.randn(2, 5)
    functions = (logprobs_from_logits, plain, logprobs_from_logits_ref)
    no_worse(*(with_gradient(f, logits, labels, c, h) for f in functions))


def test_columns_of_minus_infinity() -> None:
    logits = torch.randn(4, 600)
    banned = torch.arange(600) < 500
    logits[:, banned] = -torch.inf
    labels = torch.tensor([500, 550, 599, 510])
    logits.requires_grad_()
    ours = with_gradient(logprobs_from_logits, logits, labels, torch.ones(4), torch.ones(4))
    kept = logits.detach()[:, ~banned].requires_grad_()
    exact = with_gradient(logprobs_from_logits_ref, kept, labels - 500, torch.ones(4), torch.ones(4))
    torch.testing.assert_close(ours[:2], [t.float() for t in exact[:2]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[2][:, ~banned], exact[2], rtol=1e-5, atol=1e-7)
    assert float(ours[2][:, banned].abs().max()) == 0.0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("broken", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("rows", [4, 12], ids=["rows split over programs", "a program a row"])
def test_one_broken_logit_breaks_its_row_alone(rows: int, broken: float) -> None:
    """Maxima on a GPU pass over a NaN: a broken model must not get finite log-probs."""
    logits, labels = torch.randn(rows, 4500), torch.randint(0, 9, (rows,))
    logits[:, 2048:4096] = -torch.inf  # a whole tile of them
    mask = torch.arange(rows) != 3
    clean = with_gradient(logprobs_from_logits, logits.requires_grad_(), labels, mask.float(), mask.float(), mask=mask)
    dirty_logits = logits.detach().clone()
    dirty_logits[0, 10] = dirty_logits[1, 2050] = dirty_logits[2, 4499] = dirty_logits[3, 10] = broken
    dirty = with_gradient(
        logprobs_from_logits, dirty_logits.requires_grad_(), labels, mask.float(), mask.float(), mask=mask
    )
    for a, b in zip(clean, dirty, strict=True):
        assert bool(b[:3].isnan().all())
        assert torch.equal(a[3:], b[3:])
        assert bool(b[3:].isfinite().all())


def test_gradient_in_place() -> None:
    logits, labels = torch.randn(7, 50), torch.randint(0, 50, (7,))
    expected = with_gradient(
        logprobs_from_logits, logits.clone().requires_grad_(), labels, torch.ones(7), torch.ones(7)
    )
    leaf = logits.clone().requires_grad_()
    scratch = leaf * 1.0
    out = logprobs_from_logits(scratch, labels, inplace_backward=True)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected[2])
    assert torch.equal(scratch.detach(), expected[2])


def test_edges() -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    logprobs_from_logits(empty, torch.zeros(0, dtype=torch.int64)).logprobs.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 5)
    with pytest.raises(ValueError, match="do not fit"):
        logprobs_from_logits(torch.zeros(2, 5), torch.tensor([0]))


def test_label_outside_the_vocabulary(path: str) -> None:
    logits, labels = torch.zeros(3, 5), torch.tensor([0, 5, -1])
    if path == "triton":
        assert logprobs_from_logits(logits, labels).logprobs.isnan().tolist() == [False, True, True]
    else:
        with pytest.raises(ValueError, match="label 5 is outside the vocabulary of 5"):
            logprobs_from_logits(logits, labels)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_rows_split_over_programs(rows: int, no_worse: Any) -> None:
    logits, labels = (torch.randn(rows, 70_001) * 4).requires_grad_(), torch.randint(0, 70_001, (rows,))
    c, h = torch.randn(2, rows)
    no_worse(*(with_gradient(f, logits, labels, c, h) for f in (logprobs_from_logits, plain, logprobs_from_logits_ref)))


def test_strided_inputs() -> None:
    logits, labels = torch.randn(6, 2, 40)[::2, 1].requires_grad_(), torch.randint(0, 40, (6,))[::2]
    mask = torch.tensor([True, True, False, False, True, True])[::2]
    strided = with_gradient(logprobs_from_logits, logits, labels, torch.ones(3), torch.ones(3), mask=mask)
    inputs = (logits.detach().clone().requires_grad_(), labels.clone(), torch.ones(3), torch.ones(3))
    for a, b in zip(strided, with_gradient(logprobs_from_logits, *inputs, mask=mask.clone()), strict=True):
        # not bit for bit: a GPU reads rows in wider pieces where all are aligned, and sums in another order then
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_in_one_graph(inplace: bool) -> None:
    labels, c = torch.randint(0, 40, (5,)), torch.randn(5)

    def loss(x: Tensor) -> Tensor:
        out = logprobs_from_logits(x * 1.0, labels, inplace_backward=inplace)
        return (out.logprobs * c).sum() + out.entropy.sum()

    x = torch.randn(5, 40, requires_grad=True)
    expected = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], expected[0])


def test_custom_ops_are_sound() -> None:
    logits, labels, mask = torch.randn(4, 20), torch.randint(0, 20, (4,)), torch.tensor([True, False, True, True])
    ops = torch.ops.ppomax
    arguments = (logits, labels, mask, 0.7, None)
    torch.library.opcheck(ops.logprobs_forward.default, arguments)
    _, entropy, saved = ops.logprobs_forward(*arguments)
    for op in (ops.logprobs_backward, ops.logprobs_backward_):
        torch.library.opcheck(op.default, (*arguments, entropy, saved, torch.randn(4), None))


def test_large_vocabulary_and_retained_graph() -> None:
    logits, labels = torch.randn(2, 151_937, requires_grad=True), torch.tensor([151_936, 0])
    out = logprobs_from_logits(logits, labels)
    torch.testing.assert_close(out.logprobs.double(), logprobs_from_logits_ref(logits, labels).logprobs)
    out.logprobs.sum().backward(retain_graph=True)
    assert logits.grad is not None
    once = logits.grad.clone()
    out.logprobs.sum().backward()
    assert torch.equal(logits.grad, 2 * once)


@pytest.mark.usefixtures("unseeing")
def test_without_looking_at_the_rows() -> None:
    logits, labels, mask = torch.randn(9, 50), torch.randint(0, 50, (9,)), torch.arange(9) % 3 > 0
    exact = with_gradient(
        logprobs_from_logits_ref, logits.clone().requires_grad_(), labels, torch.ones(9), torch.ones(9), mask=mask
    )
    logits[~mask], labels[~mask] = torch.nan, 10**9
    ours = with_gradient(logprobs_from_logits, logits.requires_grad_(), labels, torch.ones(9), torch.ones(9), mask=mask)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
    labels[1] = 50
    assert logprobs_from_logits(logits, labels, mask=mask).logprobs.isnan().nonzero().tolist() == [[1]]
