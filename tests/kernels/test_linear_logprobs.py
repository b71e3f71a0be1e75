"""Log-probs from hidden states: against float64, at the edges, and on a CPU row by row the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ppomax.kernels.linear_logprobs import linear_logprobs, linear_logprobs_ref
from torch import Tensor

pytestmark = pytest.mark.usefixtures("path")
torch_path = pytest.mark.parametrize("path", ["torch"], indirect=True)

SHAPES = [(1, 8, 5), (2, 16, 33), (70, 24, 131), (33, 40, 64), (12, 32, 1000)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "tensor-temperature": {"temperature": torch.tensor(1.3)},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "softcap": 5.0, "temperature": 0.8},
}


def plain_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What one writes without kernels, in the inputs' dtype up to the logits and in fp32 from there."""
    z = torch.nn.functional.linear(hidden, weight, bias).float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature, -1)
    return logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def with_gradients(
    function: Callable[..., Any], inputs: list[Tensor], labels: Tensor, c: Tensor, h: Tensor, **options: Any
) -> list[Tensor]:
    """[logprobs, entropy, gradients...] under the upstream gradients c and h."""
    options = {**options, "bias": inputs[2]} if len(inputs) > 2 else options
    logprobs, entropy = function(inputs[0], inputs[1], labels, **options)
    loss = (logprobs * c).sum() + (entropy * h).sum()
    return [logprobs, entropy, *torch.autograd.grad(loss, inputs)]


def chosen_inputs(hidden: Tensor, weight: Tensor, bias: Tensor, options: dict[str, Any]) -> Any:
    options = dict(options)
    return [hidden, weight, bias] if options.pop("bias", False) else [hidden, weight], options


def against_float64(no_worse: Any, inputs: list[Tensor], labels: Tensor, **options: Any) -> list[Tensor]:
    """Holds results and gradients to the criterion; returns ours."""
    c, h = torch.randn(2, labels.numel())
    functions = (linear_logprobs, plain_logprobs, linear_logprobs_ref)
    ours, plain, exact = (with_gradients(f, inputs, labels, c, h, **options) for f in functions)
    no_worse(ours, plain, exact)
    return ours


@pytest.mark.usefixtures("small_chunks", "poisoned")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, int, int], options: dict, head_inputs: Any, no_worse: Any) -> None:
    hidden, weight, bias, labels = head_inputs(*shape, scale=3.0)
    inputs, options = chosen_inputs(hidden, weight, bias, options)
    against_float64(no_worse, inputs, labels, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_halves_are_not_rounded_to_halves(dtype: torch.dtype, head_inputs: Any) -> None:
    """At |z| = 20 a bf16 logit is off by up to 0.06, which would be noise in the ratio."""
    hidden, weight, _, labels = (x.detach() for x in head_inputs(40, 32, 300, dtype, 6.0))
    ours, exact = linear_logprobs(hidden, weight, labels), linear_logprobs_ref(hidden, weight, labels)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-5)
    rounded = plain_logprobs(hidden, weight, labels)[0]
    assert float((rounded - exact.logprobs).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_halves(dtype: torch.dtype, head_inputs: Any, no_worse: Any) -> None:
    hidden, weight, bias, labels = head_inputs(40, 32, 300, dtype, 6.0)
    c, h = torch.randn(2, 40) * 1e-3
    inputs = [hidden, weight, bias]
    ours, plain = (with_gradients(f, inputs, labels, c, h)[2:] for f in (linear_logprobs, plain_logprobs))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    assert [g.dtype for g in ours] == [dtype] * 3
    no_worse(ours, plain, with_gradients(linear_logprobs_ref, wide, labels, c, h)[2:])


def test_gradients_of_float16_do_not_vanish(head_inputs: Any) -> None:
    """p * c is about 1e-8 here, less than fp16 holds."""
    hidden, weight, _, labels = head_inputs(40, 16, 300, torch.float16)
    c = torch.full((40,), 1e-5)
    hidden_grad = torch.autograd.grad(linear_logprobs(hidden * 300, weight, labels).logprobs, hidden, c)[0]
    exact = torch.autograd.grad(linear_logprobs_ref(hidden * 300, weight, labels).logprobs, hidden, c.double())[0]
    torch.testing.assert_close(hidden_grad, exact, rtol=2e-2, atol=1e-5)
    assert float(exact.abs().max()) > 1e-4


def test_dtypes_may_differ(head_inputs: Any) -> None:
    hidden, weight, bias, labels = head_inputs(20, 16, 90)
    halves = [hidden.detach().bfloat16().requires_grad_(), weight, bias]
    c, h = torch.randn(2, 20)
    ours = with_gradients(linear_logprobs, halves, labels, c, h)
    wide = [halves[0].detach().float().requires_grad_(), weight, bias]
    expected = with_gradients(linear_logprobs, wide, labels, c, h)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype))


@pytest.mark.usefixtures("small_chunks")
def test_gradcheck(head_inputs: Any) -> None:
    hidden, weight, bias, labels = head_inputs(5, 4, 60, torch.float64)
    for options in ({}, {"softcap": 2.0, "temperature": 0.6}):
        torch.autograd.gradcheck(
            lambda x, w, b, o=options: linear_logprobs(x, w, labels, bias=b, **o), (hidden, weight, bias)
        )


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_partial_gradients(wanted: int, head_inputs: Any) -> None:
    *inputs, labels = head_inputs(20, 8, 50)
    expected = torch.autograd.grad(linear_logprobs_ref(inputs[0], inputs[1], labels, bias=inputs[2])[0].sum(), inputs)
    for i, x in enumerate(inputs):
        x.requires_grad_(i == wanted)
    linear_logprobs(inputs[0], inputs[1], labels, bias=inputs[2]).logprobs.sum().backward()
    assert [x.grad is not None for x in inputs] == [i == wanted for i in range(3)]
    torch.testing.assert_close(inputs[wanted].grad, expected[wanted].float())


@pytest.mark.parametrize("output", [0, 1], ids=["logprobs", "entropy"])
def test_gradient_of_one_output_alone(output: int, head_inputs: Any, no_worse: Any) -> None:
    """A dropped gradient of the entropy would show here."""
    hidden, weight, _, labels = head_inputs(30, 16, 200)
    results = [
        torch.autograd.grad(f(hidden, weight, labels)[output].sum(), (hidden, weight))
        for f in (linear_logprobs, plain_logprobs, linear_logprobs_ref)
    ]
    assert float(results[0][0].abs().max()) > 0
    no_worse(*results)


@pytest.mark.usefixtures("small_chunks")
def test_masked_and_ignored_rows_may_hold_anything(path: str, head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(70, 8, 70)
    mask = torch.rand(70) > 0.3
    labels[::7] = -100
    kept = mask & (labels != -100)
    c, h = torch.randn(2, 70)
    clean = with_gradients(linear_logprobs, [hidden, weight], labels, c, h, mask=mask)

    garbage = hidden.detach().clone()
    garbage[~kept] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).repeat(2)
    labels[~mask] = 10**9
    c[~kept], h[~kept] = torch.nan, torch.inf
    dirty = with_gradients(linear_logprobs, [garbage.requires_grad_(), weight], labels, c, h, mask=mask)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    for x in (dirty[0], dirty[1], dirty[2]):
        assert torch.equal(x[~kept], torch.zeros_like(x[~kept]))
    if path == "torch":  # elsewhere a product's bits may depend on the number of rows
        assert torch.equal(dirty[0][kept], linear_logprobs(hidden[kept], weight, labels[kept]).logprobs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("column", [3, 50, 199], ids=["first tile", "a tile of -inf", "last tile"])
def test_one_nan_logit_breaks_its_row(column: int, softcap: float | None, head_inputs: Any) -> None:
    """Maxima on a GPU pass over a NaN: a broken model must not get finite log-probs."""
    hidden, weight, bias, labels = (x.detach() for x in head_inputs(40, 8, 200))
    labels, mask = labels % 3, torch.arange(40) % 3 != 0
    bias[48:128] = -torch.inf if softcap is None else 0.0
    before = linear_logprobs(hidden, weight, labels, bias=bias, softcap=softcap, mask=mask)
    assert all(bool(x.isfinite().all()) for x in before)
    bias[column] = torch.nan
    for x in linear_logprobs(hidden, weight, labels, bias=bias, softcap=softcap, mask=mask):
        assert torch.equal(x.isnan(), mask)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("n", [0, 5])
def test_no_rows_and_all_masked(n: int, head_inputs: Any) -> None:
    hidden, weight, bias, labels = head_inputs(n, 8, 50)
    out = linear_logprobs(hidden, weight, labels, bias=bias, mask=torch.zeros(n, dtype=torch.bool))
    (out.logprobs.sum() + out.entropy.sum()).backward()
    for x in (out.logprobs, out.entropy, hidden.grad, weight.grad, bias.grad):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("label", [50, -1, -99, 10**12])
def test_label_outside_the_vocabulary(path: str, label: int, head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(4, 8, 50)
    labels[2] = label
    if path == "triton":
        wrong = linear_logprobs(hidden, weight, labels).logprobs.isnan()
        assert wrong.tolist() == [False, False, True, False]
    else:
        with pytest.raises(ValueError, match=f"label {label} is outside the vocabulary of 50"):
            linear_logprobs(hidden, weight, labels)


def test_shapes_that_do_not_fit_raise(head_inputs: Any) -> None:
    hidden, weight, bias, labels = head_inputs(4, 8, 50)
    for bad in (
        lambda: linear_logprobs(hidden[:, :7], weight, labels),
        lambda: linear_logprobs(hidden, weight, labels[:3]),
        lambda: linear_logprobs(hidden, weight, labels, bias=bias[:9]),
        lambda: linear_logprobs(hidden, weight, labels, mask=torch.ones(3, dtype=torch.bool)),
        lambda: linear_logprobs(hidden, weight, labels, temperature=torch.ones(4)),
    ):
        with pytest.raises(ValueError, match=r"shape|hidden"):
            bad()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("offset", [-1e4, -150.0, 1e4])
def test_maximum_does_not_start_at_zero(offset: float, head_inputs: Any, no_worse: Any) -> None:
    """One that did would leave exp(-150) = 0 in every column."""
    hidden, weight, bias, labels = head_inputs(20, 16, 150)
    with torch.no_grad():
        bias += offset
    ours = against_float64(no_worse, [hidden, weight, bias], labels)
    assert all(bool(x.isfinite().all()) for x in ours)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("vocab", [33, 129, 150])
def test_columns_beyond_the_vocabulary_do_not_count(vocab: int, head_inputs: Any, no_worse: Any) -> None:
    """Entering as logits of 0 they would take all the probability."""
    hidden, weight, bias, labels = head_inputs(20, 16, vocab)
    with torch.no_grad():
        bias -= 60.0
    ours = against_float64(no_worse, [hidden, weight, bias], labels)
    assert float(ours[0].detach().min()) > -20


def test_logits_of_both_extremes(head_inputs: Any) -> None:
    hidden, weight, bias, labels = head_inputs(20, 16, 150)
    with torch.no_grad():
        bias.copy_(torch.where(torch.arange(150) % 2 == 0, 1e4, -1e4))
    ours = with_gradients(linear_logprobs, [hidden, weight, bias], labels, torch.ones(20), torch.ones(20))
    exact = with_gradients(linear_logprobs_ref, [hidden, weight, bias], labels, torch.ones(20), torch.ones(20))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=2e-3)  # an ulp of 1e4 is 1e-3


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("banned", ["first tile", "last tile", "most"])
def test_tiles_of_minus_infinity(banned: str, head_inputs: Any) -> None:
    """As top-p masks leave them: no exp(-inf - -inf)."""
    hidden, weight, bias, labels = head_inputs(20, 16, 150)
    columns = {"first tile": slice(0, 70), "last tile": slice(90, 150), "most": slice(1, 149)}[banned]
    allowed = torch.ones(150, dtype=torch.bool)
    allowed[columns] = False
    labels = allowed.nonzero().squeeze(1)[labels % int(allowed.sum())]
    with torch.no_grad():
        bias[~allowed] = -torch.inf
    c, h = torch.randn(2, 20)
    ours = with_gradients(linear_logprobs, [hidden, weight, bias], labels, c, h)
    new_labels = (allowed.cumsum(0) - 1)[labels]
    inputs = [hidden, weight.detach()[allowed].requires_grad_(), bias.detach()[allowed].requires_grad_()]
    exact = with_gradients(linear_logprobs_ref, inputs, new_labels, c, h)
    for a, b in zip((*ours[:3], ours[3][allowed], ours[4][allowed]), exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)
    assert float(ours[3][~allowed].abs().max()) == 0.0


def test_banned_label_has_logprob_minus_infinity(head_inputs: Any) -> None:
    hidden, weight, bias, labels = head_inputs(3, 8, 50)
    with torch.no_grad():
        bias[labels[1]] = -torch.inf
    out = linear_logprobs(hidden, weight, labels, bias=bias)
    assert float(out.logprobs[1].detach()) == -torch.inf
    assert bool(out.entropy.isfinite().all())


@torch_path
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_among_any_others(options: dict, threads: int, head_inputs: Any) -> None:
    """What makes the first ratio exactly 1 whatever the packing of scoring and updates."""
    torch.set_num_threads(threads)
    try:
        hidden, weight, bias, labels = (x.detach() for x in head_inputs(700, 72, 2100, scale=3.0))
        inputs, options = chosen_inputs(hidden, weight, bias, options)
        options = {**options, "bias": bias} if len(inputs) > 2 else options
        whole = linear_logprobs(hidden, weight, labels, **options)
        for start, stop in ((0, 1), (1, 4), (5, 18), (18, 147), (147, 148), (150, 699), (697, 700)):
            part = linear_logprobs(hidden[start:stop], weight, labels[start:stop], **options)
            assert torch.equal(part.logprobs, whole.logprobs[start:stop]), (start, stop)
            assert torch.equal(part.entropy, whole.entropy[start:stop]), (start, stop)
        backwards = linear_logprobs(hidden.flip(0), weight, labels.flip(0), **options)
        assert torch.equal(backwards.logprobs.flip(0), whole.logprobs)
    finally:
        torch.set_num_threads(1)


def test_same_inputs_same_bits(head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(50, 32, 500)
    c, h = torch.randn(2, 50)
    first, second = (with_gradients(linear_logprobs, [hidden, weight], labels, c, h) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_vocabulary(head_inputs: Any, no_worse: Any) -> None:
    hidden, weight, _, labels = head_inputs(6, 8, 151_937)
    labels[0] = 151_936
    against_float64(no_worse, [hidden, weight], labels)


def test_strided_inputs(head_inputs: Any) -> None:
    hidden, weight, bias, labels = (x.detach() for x in head_inputs(24, 16, 100))
    bias = torch.stack([bias, torch.zeros_like(bias)], 1)
    mask = torch.arange(24) % 5 > 0
    views = [hidden[::2, ::2], weight.t()[:8].t(), bias[:, 0]]
    strided = [x.requires_grad_() for x in views]
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in views]
    upstream = torch.randn(()).expand(12), torch.randn(24)[::2]
    ours, expected = (
        with_gradients(linear_logprobs, inputs, y, *upstream, mask=m)
        for inputs, y, m in ((strided, labels[::2], mask[::2]), (copies, labels[::2].clone(), mask[::2].clone()))
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_retained_graph(head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(20, 8, 50)
    loss = linear_logprobs(hidden, weight, labels).logprobs.sum()
    loss.backward(retain_graph=True)
    once = [hidden.grad.clone(), weight.grad.clone()]
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once[0])
    assert torch.equal(weight.grad, 2 * once[1])


def test_autocast_changes_nothing(head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(40, 16, 120)
    c, h = torch.randn(2, 40)
    expected = with_gradients(linear_logprobs, [hidden, weight], labels, c, h)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        got = with_gradients(linear_logprobs, [hidden, weight], labels, c, h)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.7}], ids=str)
def test_compiles_in_one_graph(options: dict, head_inputs: Any) -> None:
    hidden, weight, bias, labels = head_inputs(9, 8, 50)
    labels[4] = -100

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = linear_logprobs(x * 1.0, w, labels, bias=b, **options)
        return (out.logprobs * labels).sum() + out.entropy.sum()

    expected = torch.autograd.grad(loss(hidden, weight, bias), (hidden, weight, bias))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(hidden, weight, bias), (hidden, weight, bias)), expected, strict=True):
        assert torch.equal(a, b)


def test_custom_ops_are_sound(head_inputs: Any) -> None:
    hidden, weight, bias, labels = (x.detach() for x in head_inputs(6, 8, 30))
    kept = torch.arange(6) != 2
    ops, head = torch.ops.ppomax, (hidden, weight, bias, labels, kept, 1.0, torch.tensor(0.7), 5.0)
    torch.library.opcheck(ops.linear_logprobs_forward.default, head)
    rows = ops.linear_logprobs_forward(*head)
    for wants in ([True, True, True], [False, True, False]):
        torch.library.opcheck(ops.linear_logprobs_backward.default, (*head, *rows, torch.randn(6), None, wants))


@torch_path
@pytest.mark.usefixtures("unseeing")
def test_without_looking_at_the_rows(head_inputs: Any) -> None:
    """Rows that do not count are masked instead of left out; a label outside the vocabulary gives NaN."""
    hidden, weight, bias, labels = head_inputs(70, 16, 131)
    mask = torch.rand(70) > 0.3
    labels[::9] = -100
    kept = mask & (labels != -100)
    c, h = torch.randn(2, 70)
    exact = with_gradients(linear_logprobs_ref, [hidden, weight, bias], labels, c, h, mask=mask)
    with torch.no_grad():
        hidden[~kept] = torch.nan
    labels[~mask], c[~kept] = 10**9, torch.nan
    ours = with_gradients(linear_logprobs, [hidden, weight, bias], labels, c, h, mask=mask)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    labels[kept.nonzero()[0]] = 131
    wrong = linear_logprobs(hidden, weight, labels, mask=mask).logprobs
    assert wrong.isnan().nonzero().tolist() == kept.nonzero()[:1].tolist()
