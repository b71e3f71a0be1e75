"""The PPO losses on both paths: against float64, in every reduction, at the edges, with garbage and overflow."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ppomax.kernels import ppo_loss as module
from ppomax.kernels.ppo_loss import policy_loss, ppo_loss, ppo_loss_ref, value_loss, value_loss_ref
from torch import Tensor

pytestmark = pytest.mark.usefixtures("path")

REDUCTIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
LENGTHS = [40, 25, 1, 31]
VALUES = ("values", "old_values", "returns")
LEAVES = ("logprobs", "entropy", "values")
ALL = {
    "clip_eps_high": 0.28, "dual_clip": 1.6, "entropy_coef": 0.1, "entropy_bound": 1.2, "kl_coef": 0.1,
    "importance_weights": True, "log_ratio_clamp": 0.5, "value_clip_eps": 0.3, "value_coef": 0.7,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "dual": {"dual_clip": 1.5},
    "dual-inside-the-range": {"dual_clip": 1.05},
    "entropy": {"entropy_coef": 0.1},
    "k1": {"kl_coef": 0.2, "kl_kind": "k1"},
    "k3": {"kl_coef": 0.2},
    "straight-through": {"kl_coef": 0.2, "kl_kind": "k1+"},
    "unclipped-values": {"value_clip_eps": None},
    "all": ALL,
}


def outcome(function: Any, fields: Any, options: dict[str, Any], **more: Any) -> list[Tensor]:
    """Both losses, statistics and the gradients of a sum of all losses, by ppo_loss or its reference."""
    given = fields.leaves(*LEAVES)
    more = {"entropy": given["entropy"], **given.options(options), **more}
    out = function(*given.policy(), *given.critic(), given.mask, **more)
    total = out.loss + 0.3 * out.policy_loss - 0.2 * out.value_loss
    used = [given[name] for name in LEAVES if name != "entropy" or options.get("entropy_coef")]
    return [*out[1:3], *out.policy_stats, *out.value_stats, *torch.autograd.grad(total, used)]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`ppo_loss` on its torch path."""

    def run(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(module, "uses_triton", lambda *tensors: False)
            return ppo_loss(*args, **options)

    return run


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_losses_gradients_and_statistics(options: dict, tokens: Any, plain: Any, no_worse: Any) -> None:
    fields = tokens(LENGTHS)
    no_worse(*(outcome(function, fields, options) for function in (ppo_loss, plain, ppo_loss_ref)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalizer", [None, 7.0, torch.tensor(9)], ids=str)
def test_reductions(reduction: str, normalizer: Any, layout: str, tokens: Any, plain: Any, no_worse: Any) -> None:
    fields, more = tokens(LENGTHS), {"reduction": reduction, "normalizer": normalizer}
    fields.mask[3] = False
    if layout == "packed":
        fields, more = fields.packed(), {**more, "cu_seqlens": fields.bounds}
    no_worse(*(outcome(function, fields, ALL, **more) for function in (ppo_loss, plain, ppo_loss_ref)))


@pytest.mark.parametrize("masked", [True, False])
def test_parts_equal_the_whole(masked: bool, tokens: Any) -> None:
    """policy_loss and value_loss alone give what ppo_loss gives, bit for bit."""
    fields = tokens(LENGTHS).leaves(*LEAVES)
    mask, options = fields.mask if masked else None, {k: v for k, v in ALL.items() if "value" not in k}
    both = ppo_loss(*fields.policy(), *fields.critic(), mask, **fields.options(options))
    p = policy_loss(*fields.policy(), mask, **fields.options(options))
    v = value_loss(*fields.critic(), mask)
    torch.testing.assert_close(both[1:], (p.loss, v.loss, p.stats, v.stats), rtol=0, atol=0)
    torch.testing.assert_close(both.loss, p.loss + v.loss, rtol=1e-6, atol=0)
    alone = torch.autograd.grad(p.loss, [fields["logprobs"], fields["entropy"]])
    alone += torch.autograd.grad(v.loss, [fields["values"]])
    for a, b in zip(torch.autograd.grad(both.loss, [fields[name] for name in LEAVES]), alone, strict=True):
        assert torch.equal(a, b)


def test_lazy_whitening(tokens: Any, plain: Any, no_worse: Any) -> None:
    fields, whiten = tokens(LENGTHS), (torch.tensor(0.4), torch.tensor(1.7))
    no_worse(*(outcome(function, fields, ALL, whiten=whiten) for function in (ppo_loss, plain, ppo_loss_ref)))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_masked_tokens_may_hold_anything(garbage: float, tokens: Any) -> None:
    fields, whiten = tokens(LENGTHS), (torch.tensor(0.3), torch.tensor(1.7))
    dirty = fields.but(**{name: torch.where(fields.mask, x, garbage) for name, x in fields.items()})
    results = [outcome(ppo_loss, f, ALL, whiten=whiten) for f in (fields, dirty)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for g in results[1][-3:]:
        assert torch.equal(g[~fields.mask], torch.zeros_like(g[~fields.mask]))


def test_nothing_unmasked(tokens: Any) -> None:
    fields = tokens(LENGTHS)
    fields.mask[:] = False
    for x in outcome(ppo_loss, fields, ALL):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens(n: int) -> None:
    x = torch.full((n,), -0.5, requires_grad=True)
    loss, stats = policy_loss(x, x.detach(), torch.ones(n))
    assert (float(loss.detach()), float(stats.count), float(stats.ratio_max)) == (-n, n, n)
    assert torch.autograd.grad(loss, x)[0].tolist() == [-1.0] * n
    value, value_stats = value_loss(x, x.detach(), torch.ones(n), coef=1.0)
    assert (float(value.detach()), float(value_stats.explained_variance)) == (2.25 * n, 0.0)


def test_gradient_at_the_borders_of_the_ratio() -> None:
    """At ratio 1 with clip_eps 0 both bounds hold, and dL/dlogprob is still -A / n."""
    logprobs = -torch.rand(6)
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -3.0, 0.5])
    for eps in (0.0, 0.2):
        x = logprobs.clone().requires_grad_()
        loss, stats = policy_loss(x, logprobs, advantages, clip_eps=eps, dual_clip=3.0)
        loss.backward()
        torch.testing.assert_close(x.grad, -advantages / 6, rtol=1e-6, atol=0)
        assert [float(s) for s in stats[:6]] == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_a_broken_or_impossible_token_and_those_beside_it() -> None:
    """NaN reaches the gradient; a ratio that is 0 or overflows does not become one."""
    logprobs = torch.tensor([0.0, torch.nan, 300.0, -torch.inf, 300.0], requires_grad=True)
    loss = policy_loss(logprobs, torch.zeros(5), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), reduction="token-sum").loss
    assert torch.autograd.grad(loss, logprobs)[0].nan_to_num(nan=7.0).tolist() == [-1.0, 7.0, 0.0, 0.0, 0.0]


def test_gradient_at_the_borders_and_ties_of_the_value_clip() -> None:
    """The whole error's gradient up to the border, half of it where the errors beyond are equal."""
    values = torch.tensor([0.25, -0.25, 0.5, 0.5], requires_grad=True)
    returns = torch.tensor([1.0, 1.0, 0.375, 1.0])
    loss, stats = value_loss(values, torch.zeros(4), returns, clip_eps=0.25, coef=1.0, reduction="token-sum")
    assert torch.autograd.grad(loss, values)[0].tolist() == [-1.5, -2.5, 0.125, 0.0]
    assert float(stats.clipfrac) == 0.25


def test_rounding_does_not_count_as_clipping() -> None:
    """V_old + (V - V_old) is not V in floating point: tokens inside the range must not seem clipped."""
    values, old_values = torch.randn(4000) * 0.05 + 0.01, torch.randn(4000) * 0.05
    assert float((values - old_values).abs().max()) < 0.5
    assert float(value_loss(values, old_values, torch.randn(4000), clip_eps=0.5).stats.clipfrac) == 0.0


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # both sides of `where`
def test_overflowing_ratios_that_are_clipped_take_no_gradient() -> None:
    """0 * inf must not become NaN; unclipped, loss and gradient are infinite as they should be."""
    log_ratio = torch.tensor([100.0, 100.0, -200.0, -200.0, torch.inf])
    advantages = torch.tensor([1.0, 0.0, 1.0, -1.0, 2.0])
    x = torch.zeros(5, requires_grad=True)
    loss, stats = policy_loss(x, -log_ratio, advantages, reduction="token-sum")
    assert float(loss.detach()) == pytest.approx(-1.2 - 0.0 + 0.8 - 2.4)
    assert torch.autograd.grad(loss, x)[0].tolist() == [0.0] * 5
    assert float(stats.clipfrac) == pytest.approx(0.6)
    assert float(stats.ratio_max) == torch.inf
    unclipped = policy_loss(x, -log_ratio, -advantages, reduction="token-sum").loss
    assert float(unclipped.detach()) == torch.inf
    assert torch.autograd.grad(unclipped, x)[0].tolist()[:2] == [torch.inf, 0.0]
    clamped = policy_loss(x, -log_ratio, -advantages, log_ratio_clamp=20.0).loss
    assert bool(clamped.isfinite())
    assert torch.autograd.grad(clamped, x)[0].tolist() == [0.0] * 5


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy", *VALUES])
def test_nan_in_a_token_that_counts_is_seen(name: str, tokens: Any) -> None:
    fields = tokens([5]).packed()
    fields[name][2] = torch.nan
    out = ppo_loss(*fields.policy(), *fields.critic(), **fields.options(ALL))
    assert bool(out.loss.isnan())
    assert bool(out.policy_loss.isnan()) == (name not in VALUES)
    if name in ("logprobs", "old_logprobs"):
        assert bool(out.policy_stats.ratio_max.isnan())


def test_explained_variance_far_from_zero() -> None:
    """Sums of squares would lose it: 1e4^2 has an ulp of 8 in fp32."""
    returns = 1e4 + torch.randn(9000)
    values = returns + 0.5 * torch.randn(9000)
    ours, exact = (function(values, values, returns).stats for function in (value_loss, value_loss_ref))
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=0)
    assert 0.7 < float(exact.explained_variance) < 0.8


def test_same_bits_twice(tokens: Any) -> None:
    fields = tokens([700, 900, 800])
    for a, b in zip(*(outcome(ppo_loss, fields, ALL) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def large_tiles(path: str) -> Iterator[None]:
    """Tiles of half a million tokens for the interpreter, to which every tile is dear."""
    if path == "torch" or torch.cuda.is_available():
        yield
        return
    from ppomax.kernels.gpu.launch import overriding

    with overriding("ppo_forward", {"BLOCK_N": 1 << 19}):
        yield


@pytest.mark.usefixtures("large_tiles")
def test_many_tokens() -> None:
    """A third of 1.5 million tokens is clipped, and that is what is counted."""
    n = 1_500_000
    logprobs = torch.where(torch.arange(n) % 3 == 0, 0.5, 0.0)
    loss, stats = policy_loss(logprobs, torch.zeros(n), torch.ones(n))
    assert float(stats.count) == n
    assert float(stats.clipfrac) == pytest.approx(1 / 3, rel=1e-7)
    assert float(stats.active_fraction) == pytest.approx(2 / 3, rel=1e-7)
    assert float(loss) == pytest.approx(-(1.2 + 2.0) / 3, rel=1e-6)


def test_sums_of_programs_beyond_the_integers_of_fp32(path: str) -> None:
    """Programs that counted 2^24 - 1 tokens each, and terms that cancel but for what fp32 cannot add to 2^25."""
    if path == "torch":
        pytest.skip("the torch path has no programs")
    from ppomax.kernels.gpu import ppo_loss as gpu
    from ppomax.kernels.gpu.launch import configuration, launch

    each = float(2**24 - 1)
    parts = torch.zeros(gpu.PARTS, 3)
    parts[16], parts[1] = each, each  # count, clipfrac_low
    parts[8] = torch.tensor([2.0**25, 3.0, -(2.0**25)])  # terms
    loss, policy, value, stats = torch.empty(()), torch.empty(()), torch.empty(()), torch.empty(gpu.STATS)
    launch(
        gpu.ppo_finish, (1,), configuration("ppo_finish", parts.device), parts_ptr=parts, normalizer_ptr=None,
        loss_ptr=loss, policy_loss_ptr=policy, value_loss_ptr=value, stats_ptr=stats, normalizer=0.5, programs=3,
        HAS_POLICY=True, HAS_VALUE=False, HAS_ENTROPY=False, TOKEN_MEAN=False,
    )  # fmt: skip
    assert (float(stats[8]), float(stats[1]), float(loss)) == pytest.approx((3 * each, 1.0, 6.0), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype: torch.dtype, tokens: Any) -> None:
    """Arithmetic is in fp32 whatever the inputs: only the gradients are rounded to their dtype."""
    fields = tokens(LENGTHS)
    half = fields.but(**{name: x.to(dtype) for name, x in fields.items()})
    ours, exact = outcome(ppo_loss, half, ALL), outcome(ppo_loss_ref, half, ALL)
    assert [x.dtype for x in ours[-3:]] == [dtype] * 3
    torch.testing.assert_close(ours[:-3], [x.float() for x in exact[:-3]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[-3:], exact[-3:], rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_float64_among_the_inputs(tokens: Any) -> None:
    fields = tokens(LENGTHS)
    fields["returns"] = fields["returns"].double()
    out = ppo_loss(*fields.policy(), *fields.critic(), fields.mask)
    assert (out.policy_loss.dtype, out.value_loss.dtype) == (torch.float32, torch.float64)
    assert out.value_stats.explained_variance.dtype == torch.float32


def test_strided_and_expanded_inputs(tokens: Any) -> None:
    fields = tokens(LENGTHS)
    wide = fields.but(**{name: torch.stack([x, -x], -1)[..., 0] for name, x in fields.items()})
    wide.mask = torch.stack([fields.mask, ~fields.mask], -1)[..., 0]
    for a, b in zip(outcome(ppo_loss, wide, ALL), outcome(ppo_loss, fields, ALL), strict=True):
        assert torch.equal(a, b)
    scores = torch.randn(len(LENGTHS), 1).expand(fields.mask.shape)
    expanded = policy_loss(*fields.but(advantages=scores).policy(), fields.mask)
    assert torch.equal(expanded.loss, policy_loss(*fields.but(advantages=scores.clone()).policy(), fields.mask).loss)


def test_the_entropy_bonus_has_a_gradient() -> None:
    """A loss that only reports the bonus trains nothing by it."""
    entropy = torch.tensor([0.5, 1.5, 2.5], requires_grad=True)
    x = torch.zeros(3)
    loss = policy_loss(x, x, x, entropy=entropy, entropy_coef=0.3, entropy_bound=1.5).loss
    torch.testing.assert_close(torch.autograd.grad(loss, entropy)[0], torch.tensor([-0.1, 0.0, 0.0]))


def test_wrong_arguments_raise() -> None:
    x, y = torch.zeros(4), torch.zeros(5)
    for match, call in {
        "unknown reduction": lambda: policy_loss(x, x, x, reduction="mean"),  # type: ignore[arg-type]
        "shapes differ": lambda: policy_loss(x, y, x),
        "per-token shapes": lambda: policy_loss(y, x, x),
        "mask has shape": lambda: policy_loss(x, x, x, torch.ones(5)),
        "entropy_coef needs": lambda: policy_loss(x, x, x, entropy_coef=0.1),
        "kl_coef needs": lambda: policy_loss(x, x, x, kl_coef=0.1),
        "unknown KL": lambda: policy_loss(x, x, x, kl_kind="k4"),  # type: ignore[arg-type]
        "dual_clip": lambda: policy_loss(x, x, x, dual_clip=1.0),
        "clip_eps_high must not": lambda: policy_loss(x, x, x, clip_eps=-0.1),
        "log_ratio_clamp": lambda: policy_loss(x, x, x, log_ratio_clamp=0.0),
        "cu_seqlens": lambda: policy_loss(x, x, x, reduction="seq-mean-token-mean"),
        "differ: ": lambda: value_loss(x, x, y),
        "clip_eps must not": lambda: value_loss(x, x, x, clip_eps=-1.0),
        "shapes differ: ": lambda: ppo_loss(x, x, x, y, y, y),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
