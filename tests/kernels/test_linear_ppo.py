"""The PPO loss from hidden states: against float64, bit-equal log-probs, micro-batches, the weight's buffer."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppomax.kernels.linear_logprobs import linear_logprobs
from ppomax.kernels.linear_ppo import linear_ppo_loss, linear_ppo_loss_ref
from ppomax.kernels.ppo_loss import policy_loss
from ppomax.kernels.ppo_stats import merge_policy_stats
from torch import Tensor

pytestmark = pytest.mark.usefixtures("path")
torch_path = pytest.mark.parametrize("path", ["torch"], indirect=True)

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "dual-asymmetric": {"clip_eps": 0.1, "clip_eps_high": 0.3, "dual_clip": 2.0},
    "dual-inside-the-range": {"dual_clip": 1.05},
    "entropy": {"entropy_coef": 0.05, "entropy_bound": 4.5},
    "kl": {"kl_coef": 0.3, "kl_kind": "k3"},
    "weights": {"importance_weights": True, "whiten": (torch.tensor(0.2), torch.tensor(1.4))},
    "head": {"bias": True, "temperature": 0.8, "softcap": 4.0},
    "all": {
        "bias": True, "temperature": 1.2, "softcap": 4.0, "entropy_coef": 0.05, "kl_coef": 0.1, "kl_kind": "k2",
        "dual_clip": 3.0, "importance_weights": True,
    },
}  # fmt: skip
HEAD = ("bias", "temperature", "softcap")


class Case:
    """An LM head's inputs with the fields of PPO; about a third of the rows is masked."""

    def __init__(self, head_inputs: Any, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> None:
        self.hidden, self.weight, self.bias, self.labels = head_inputs(*shape, dtype, 3.0)
        n = shape[0]
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.mask = torch.rand(n) > 0.3
        with torch.no_grad():
            logprobs = linear_logprobs(self.hidden, self.weight, self.labels).logprobs
        self.old = logprobs + 0.3 * torch.randn(n)
        self.ref = logprobs + 0.3 * torch.randn(n)
        self.advantages = torch.randn(n, dtype=self.dtype)
        self.importance = torch.rand(n, dtype=self.dtype) * 2

    def wide(self) -> "Case":
        """The same numbers in float64."""
        case = copy.copy(self)
        for name in ("hidden", "weight", "bias"):
            setattr(case, name, getattr(self, name).detach().double().requires_grad_())
        return case

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        options = dict(options)
        if options.get("bias"):
            options["bias"] = self.bias
        if options.get("importance_weights"):
            options["importance_weights"] = self.importance
        if options.get("kl_coef"):
            options["ref_logprobs"] = self.ref
        return options

    def leaves(self, options: dict[str, Any]) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias] if "bias" in options else [self.hidden, self.weight]

    def run(self, function: Any, **options: Any) -> list[Tensor]:
        """[loss, logprobs, entropy, gradients...]."""
        options = self.options(options)
        out = function(self.hidden, self.weight, self.labels, self.old, self.advantages, self.mask, **options)
        return [out.loss, out.logprobs, out.entropy, *torch.autograd.grad(out.loss, self.leaves(options))]


def plain_ppo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **options: Any
) -> Any:
    """Logits in memory, torch's log-softmax, autograd."""
    z = torch.nn.functional.linear(hidden, weight, options.get("bias")).float()
    cap = options.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    logp = torch.log_softmax(z / options.get("temperature", 1.0), -1)
    logprobs = logp.gather(1, labels[:, None]).squeeze(1)
    entropy = -(logp.exp() * logp).sum(-1)
    rest = {k: v for k, v in options.items() if k not in HEAD}
    loss, _ = policy_loss(logprobs, old, advantages, mask, entropy=entropy, **rest)
    return SimpleNamespace(
        loss=loss, logprobs=torch.where(mask, logprobs, 0.0), entropy=torch.where(mask, entropy, 0.0)
    )


@pytest.mark.usefixtures("small_chunks", "poisoned")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", [(1, 8, 5), (40, 24, 131), (65, 16, 48)], ids=str)
def test_matches_float64(shape: tuple, options: dict, head_inputs: Any, no_worse: Any) -> None:
    case = Case(head_inputs, shape)
    no_worse(*(case.run(f, **options) for f in (linear_ppo_loss, plain_ppo_loss, linear_ppo_loss_ref)))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradcheck(options: dict, path: str, head_inputs: Any) -> None:
    if path == "triton" and not torch.cuda.is_available():
        pytest.skip("the other run does the same: float64 always is torch's")
    case = Case(head_inputs, (5, 4, 60), torch.float64)
    case.mask[0] = True
    chosen = case.options(options)
    has_bias = chosen.pop("bias", None) is not None

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        bias_option = {"bias": bias} if has_bias else {}
        args = (hidden, weight, case.labels, case.old, case.advantages, case.mask)
        return linear_ppo_loss(*args, **bias_option, **chosen).loss + 0.0 * bias.sum()

    torch.autograd.gradcheck(loss, (case.hidden, case.weight, case.bias))


def test_halves(head_inputs: Any, no_worse: Any) -> None:
    """Log-probs as exact as fp32 logits make them, gradients as those of plain torch in bf16."""
    case = Case(head_inputs, (40, 16, 131), torch.bfloat16)
    ours, plain = (case.run(f, bias=True) for f in (linear_ppo_loss, plain_ppo_loss))
    exact = case.wide().run(linear_ppo_loss_ref, bias=True)
    torch.testing.assert_close([x.double() for x in ours[1:3]], exact[1:3], rtol=1e-6, atol=1e-5)
    assert [x.dtype for x in ours[3:]] == [torch.bfloat16] * 3
    no_worse(ours[3:], plain[3:], exact[3:])


BITS = [{}, {"entropy_coef": 0.1}, {"softcap": 4.0, "temperature": 0.9, "bias": True}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", BITS, ids=str)
def test_the_first_ratio_is_exactly_one(options: dict, dtype: torch.dtype, head_inputs: Any) -> None:
    """The log-probs are those of linear_logprobs on the same rows, with gradients and without."""
    case = Case(head_inputs, (70, 24, 300), dtype)
    options = case.options(options)
    head = {k: v for k, v in options.items() if k in HEAD}
    with torch.no_grad():
        scored = linear_logprobs(case.hidden, case.weight, case.labels, mask=case.mask, **head)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            trained = linear_ppo_loss(
                case.hidden, case.weight, case.labels, scored.logprobs, case.advantages, case.mask, **options
            )
        assert torch.equal(trained.logprobs, scored.logprobs)
        assert torch.equal(trained.entropy, scored.entropy)
        assert float(trained.stats.ratio_mean) == float(trained.stats.ratio_max) == 1.0
        assert float(trained.stats.approx_kl) == 0.0


@torch_path
@pytest.mark.parametrize("options", BITS[:2], ids=str)
def test_the_first_ratio_is_exactly_one_among_other_rows(options: dict, head_inputs: Any) -> None:
    case = Case(head_inputs, (700, 40, 2100))
    with torch.no_grad():
        scored = linear_logprobs(case.hidden, case.weight, case.labels)
    rows = case.mask.nonzero().squeeze(1)
    trained = linear_ppo_loss(
        case.hidden[rows], case.weight, case.labels[rows], scored.logprobs[rows], case.advantages[rows], **options
    )
    assert torch.equal(trained.logprobs, scored.logprobs[rows])
    assert torch.equal(trained.entropy, scored.entropy[rows])
    masked = linear_ppo_loss(
        case.hidden, case.weight, case.labels, scored.logprobs, case.advantages, case.mask, **options
    )
    assert torch.equal(masked.logprobs, torch.where(case.mask, scored.logprobs, 0.0))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["token-mean", "token-sum"])
def test_micro_batches_add_up(reduction: str, head_inputs: Any) -> None:
    case = Case(head_inputs, (90, 16, 130), torch.float64)
    options = case.options({"entropy_coef": 0.05, "kl_coef": 0.1, "reduction": reduction})
    ref = options.pop("ref_logprobs")
    normalizer = case.mask.sum() if reduction == "token-mean" else 1.0

    def part(rows: slice, **extra: Any) -> tuple[Any, list[Tensor]]:
        out = linear_ppo_loss(
            case.hidden[rows], case.weight, case.labels[rows], case.old[rows], case.advantages[rows], case.mask[rows],
            ref_logprobs=ref[rows], **options, **extra,
        )  # fmt: skip
        return out, list(torch.autograd.grad(out.loss, (case.hidden, case.weight)))

    whole, gradients = part(slice(0, 90))
    parts = [part(slice(a, b), normalizer=normalizer) for a, b in ((0, 13), (13, 70), (70, 90))]
    torch.testing.assert_close(sum(p.loss for p, _ in parts), whole.loss, rtol=1e-12, atol=0)
    for i in range(2):
        torch.testing.assert_close(sum(g[i] for _, g in parts), gradients[i], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(merge_policy_stats([p.stats for p, _ in parts]), whole.stats)


def test_sequence_reductions(head_inputs: Any) -> None:
    case = Case(head_inputs, (30, 8, 60), torch.float64)
    bounds = torch.tensor([0, 4, 4, 19, 30], dtype=torch.int32)
    for reduction in ("seq-mean-token-sum", "seq-mean-token-mean"):
        options = {"reduction": reduction, "cu_seqlens": bounds}
        for a, b in zip(case.run(linear_ppo_loss, **options), case.run(linear_ppo_loss_ref, **options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.05, "softcap": 4.0}], ids=str)
def test_masked_rows_may_hold_anything(options: dict, head_inputs: Any) -> None:
    case = Case(head_inputs, (80, 8, 70))
    case.labels[case.mask.nonzero()[0]] = -100
    clean = case.run(linear_ppo_loss, **options, kl_coef=0.1, importance_weights=True)
    kept = case.mask & (case.labels != -100)
    with torch.no_grad():
        for x in (case.hidden, case.old, case.ref, case.advantages, case.importance):
            x[~kept] = torch.nan
        case.labels[~case.mask] = 10**9
    dirty = case.run(linear_ppo_loss, **options, kl_coef=0.1, importance_weights=True)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(dirty[3][~kept], torch.zeros_like(dirty[3][~kept]))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_weight_grad_buffer(frozen: bool, head_inputs: Any) -> None:
    case = Case(head_inputs, (100, 16, 131))
    args = (case.labels, case.old, case.advantages, case.mask)
    _, _, _, hidden_grad, weight_grad = case.run(linear_ppo_loss)
    case.weight.requires_grad_(not frozen)
    buffer = torch.ones_like(case.weight, requires_grad=False)
    linear_ppo_loss(case.hidden, case.weight, *args, weight_grad=buffer).loss.backward()
    torch.testing.assert_close(buffer, 1.0 + weight_grad, rtol=0, atol=1e-6)
    assert torch.equal(case.hidden.grad, hidden_grad)
    assert case.weight.grad is None

    before = buffer.clone()
    with torch.no_grad():
        linear_ppo_loss(case.hidden, case.weight, *args, weight_grad=buffer)
    assert torch.equal(buffer, before)


def test_weight_grad_needs_an_upstream_gradient_of_one(path: str, head_inputs: Any) -> None:
    if path == "triton" and torch.cuda.is_available():
        pytest.skip("the assertion on a GPU ends its context")
    case = Case(head_inputs, (6, 8, 20))
    buffer = torch.zeros_like(case.weight, requires_grad=False)
    loss = linear_ppo_loss(case.hidden, case.weight, case.labels, case.old, case.advantages, weight_grad=buffer).loss
    with pytest.raises(RuntimeError, match="filled in the forward"):
        (2 * loss).backward()


@pytest.mark.usefixtures("small_chunks")
def test_weight_grad_of_a_half_precision_weight(head_inputs: Any, no_worse: Any) -> None:
    case = Case(head_inputs, (60, 16, 131), torch.bfloat16)
    buffer = torch.zeros(131, 16)
    args = (case.labels, case.old, case.advantages, case.mask)
    linear_ppo_loss(case.hidden, case.weight, *args, weight_grad=buffer).loss.backward()
    weight_grad = case.run(linear_ppo_loss)[4]
    assert weight_grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        weight_grad, buffer.bfloat16(), rtol=2**-8, atol=1e-9
    )  # an ulp: rounded once, at the end
    no_worse([buffer], [case.run(plain_ppo_loss)[4]], [case.wide().run(linear_ppo_loss_ref)[4]])


def test_bad_weight_grad_raises(head_inputs: Any) -> None:
    case = Case(head_inputs, (5, 8, 20))
    args = (case.hidden, case.weight, case.labels, case.old, case.advantages)
    for buffer, match in ((torch.zeros(20, 7), "shape"), (torch.zeros(20, 8).half(), "float32")):
        with pytest.raises(ValueError, match=match):
            linear_ppo_loss(*args, weight_grad=buffer)
    with pytest.raises(ValueError, match="kl_coef needs"):
        linear_ppo_loss(*args, kl_coef=0.1)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_upstream_gradient_and_retained_graph(scale: float, head_inputs: Any) -> None:
    case = Case(head_inputs, (50, 8, 60))
    gradients = case.run(linear_ppo_loss)[3:]
    loss = linear_ppo_loss(case.hidden * 1.0, case.weight, case.labels, case.old, case.advantages, case.mask).loss
    (scale * loss).backward(retain_graph=True)
    (scale * loss).backward()
    for x, g in zip((case.hidden, case.weight), gradients, strict=True):
        torch.testing.assert_close(x.grad, 2 * scale * g, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_partial_gradients(wanted: int, head_inputs: Any) -> None:
    case = Case(head_inputs, (40, 8, 60))
    expected = case.run(linear_ppo_loss, bias=True)[3 + wanted]
    leaves = (case.hidden, case.weight, case.bias)
    for i, x in enumerate(leaves):
        x.requires_grad_(i == wanted)
    args = (case.hidden, case.weight, case.labels, case.old, case.advantages, case.mask)
    linear_ppo_loss(*args, bias=case.bias).loss.backward()
    assert [x.grad is not None for x in leaves] == [i == wanted for i in range(3)]
    torch.testing.assert_close(leaves[wanted].grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("n", [0, 4])
def test_no_rows_and_all_masked(n: int, head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(n, 8, 30)
    out = linear_ppo_loss(
        hidden, weight, labels, torch.zeros(n), torch.ones(n), torch.zeros(n, dtype=torch.bool), entropy_coef=0.1
    )
    out.loss.backward()
    for x in (out.loss, out.logprobs, out.entropy, hidden.grad, weight.grad, *out.stats):
        assert torch.equal(x, torch.zeros_like(x))


def test_only_the_loss_carries_gradients(head_inputs: Any) -> None:
    case = Case(head_inputs, (6, 8, 30))
    out = linear_ppo_loss(case.hidden, case.weight, case.labels, case.old, case.advantages)
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in (out.logprobs, out.entropy, *out.stats))
    with torch.no_grad():
        again = linear_ppo_loss(case.hidden, case.weight, case.labels, case.old, case.advantages)
    assert not again.loss.requires_grad
    assert torch.equal(again.loss, out.loss)
    assert torch.equal(again.logprobs, out.logprobs)


def test_clipped_tokens_take_no_gradient(head_inputs: Any) -> None:
    hidden, weight, _, labels = head_inputs(3, 8, 30)
    with torch.no_grad():
        logprobs = linear_logprobs(hidden, weight, labels).logprobs
    old = logprobs - torch.tensor([1.0, -1.0, 0.0])
    out = linear_ppo_loss(hidden, weight, labels, old, torch.tensor([1.0, -1.0, 0.0]))
    out.loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert float(out.stats.active_fraction) == 0.0
    assert float(out.stats.clipfrac) == pytest.approx(2 / 3)


def test_autocast_changes_nothing(head_inputs: Any) -> None:
    case = Case(head_inputs, (40, 16, 120))
    expected = case.run(linear_ppo_loss)
    with torch.autocast(case.hidden.device.type, dtype=torch.bfloat16):
        got = case.run(linear_ppo_loss)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_one_nan_logit_breaks_its_row(head_inputs: Any) -> None:
    case = Case(head_inputs, (20, 8, 150))
    case.labels %= 100
    with torch.no_grad():
        case.bias[130] = torch.nan
    loss, logprobs, entropy, gradient, *_ = case.run(linear_ppo_loss, bias=True)
    assert bool(loss.isnan())
    assert torch.equal(logprobs.isnan(), case.mask)
    assert torch.equal(entropy.isnan(), case.mask)
    assert torch.equal(gradient.isnan().all(1), case.mask)


def test_label_outside_the_vocabulary(path: str, head_inputs: Any) -> None:
    case = Case(head_inputs, (5, 8, 30))
    case.labels[2] = 30
    args = (case.hidden, case.weight, case.labels, case.old, case.advantages)
    if path == "triton":
        out = linear_ppo_loss(*args)
        assert out.logprobs.isnan().tolist() == [False, False, True, False, False]
        assert bool(out.loss.isnan())
    else:
        with pytest.raises(ValueError, match="label 30 is outside the vocabulary of 30"):
            linear_ppo_loss(*args)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("in_buffer", [False, True])
def test_compiles_in_one_graph(in_buffer: bool, head_inputs: Any) -> None:
    case = Case(head_inputs, (40, 8, 70))

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
        out = linear_ppo_loss(
            hidden * 1.0, weight, case.labels, case.old, case.advantages, case.mask, bias=bias, entropy_coef=0.1,
            ref_logprobs=case.ref, kl_coef=0.1, dual_clip=3.0, weight_grad=buffer,
        )  # fmt: skip
        return out.loss, out.stats.clipfrac

    leaves = [case.hidden, case.weight, case.bias]
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        buffer = torch.zeros_like(case.weight, requires_grad=False) if in_buffer else None
        loss, clipfrac = function(*leaves, buffer)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([loss.detach(), clipfrac, buffer if in_buffer else grads[1], grads[0], grads[2]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert float(results[0][2].abs().max()) > 0


def test_custom_op_is_sound(head_inputs: Any) -> None:
    case = Case(head_inputs, (6, 8, 30))
    hidden, weight = case.hidden.detach(), case.weight.detach()
    head = (hidden, weight, None, 0.8, None, 5.0)
    rows = (case.labels, case.mask, case.mask / 6, case.old, case.advantages, None, case.ref)
    numbers = (0.2, 0.2, 3.0, 0.01, torch.inf, 0.1, torch.inf)
    op = torch.ops.ppomax.linear_ppo.default
    for buffer, wants in ((None, [True, True, False]), (torch.zeros(30, 8), [True, False, False])):
        torch.library.opcheck(op, (*head, rows, numbers, "k3", buffer, wants))


@torch_path
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_without_looking_at_the_rows(options: dict, head_inputs: Any, request: pytest.FixtureRequest) -> None:
    case = Case(head_inputs, (90, 16, 131))
    expected = case.run(linear_ppo_loss, **options)
    request.getfixturevalue("unseeing")
    with torch.no_grad():
        case.hidden[~case.mask] = torch.nan
    case.labels[~case.mask] = -7
    for a, b in zip(case.run(linear_ppo_loss, **options), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    buffer = torch.zeros_like(case.weight, requires_grad=False)
    args = (case.hidden, case.weight, case.labels, case.old, case.advantages, case.mask)
    loss = linear_ppo_loss(*args, weight_grad=buffer).loss
    with pytest.raises(RuntimeError, match="filled in the forward"):
        (2 * loss).backward()
