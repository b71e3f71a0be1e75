"""Policy and value losses: against loops written from the papers, in every reduction, packed, padded and in pieces."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ppomax.kernels.ppo_loss import (
    merge_policy_stats,
    merge_value_stats,
    policy_loss,
    policy_loss_ref,
    ppo_loss,
    ppo_loss_ref,
    value_loss,
    value_loss_ref,
)
from torch import Tensor

REDUCTIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
POLICY_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "asymmetric": {"clip_eps": 0.1, "clip_eps_high": 0.3},
    "dual": {"dual_clip": 1.5},
    "entropy": {"entropy_coef": 0.1},
    "bounded-entropy": {"entropy_coef": 0.1, "entropy_bound": 1.0},
    "k1": {"kl_coef": 0.2, "kl_kind": "k1"},
    "k2": {"kl_coef": 0.2, "kl_kind": "k2"},
    "k3": {"kl_coef": 0.2},
    "weighted": {"importance_weights": True},
    "all": {
        "clip_eps_high": 0.28, "dual_clip": 3.0, "entropy_coef": 0.01, "entropy_bound": 2.0, "kl_coef": 0.1,
        "importance_weights": True,
    },
}  # fmt: skip


class Fields(dict[str, Tensor]):
    """Per-token fields of a padded batch [B, T] with its mask."""

    def __init__(self, lengths: list[int], dtype: torch.dtype = torch.float64) -> None:
        b, t = len(lengths), max(lengths)
        super().__init__()
        self.mask = torch.arange(t) < torch.tensor(lengths)[:, None]
        self.mask &= torch.rand(b, t) > 0.2
        self.lengths = lengths
        self["logprobs"] = -torch.rand(b, t, dtype=dtype) * 3
        self["old_logprobs"] = self["logprobs"] + 0.4 * torch.randn(b, t, dtype=dtype)
        self["ref_logprobs"] = self["logprobs"] + 0.4 * torch.randn(b, t, dtype=dtype)
        self["advantages"] = torch.randn(b, t, dtype=dtype)
        self["importance_weights"] = torch.rand(b, t, dtype=dtype) * 2
        self["entropy"] = torch.rand(b, t, dtype=dtype) * 2
        self["values"] = torch.randn(b, t, dtype=dtype)
        self["old_values"] = self["values"] + 0.3 * torch.randn(b, t, dtype=dtype)
        self["returns"] = self["values"] + torch.randn(b, t, dtype=dtype)

    def packed(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(fields [N], mask [N], cu_seqlens [S+1])."""
        present = torch.arange(self.mask.shape[1]) < torch.tensor(self.lengths)[:, None]
        bounds = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        return {name: x[present] for name, x in self.items()}, self.mask[present], bounds


def policy(fields: dict[str, Tensor], mask: Tensor | None, function: Any = policy_loss, **options: Any) -> Any:
    """A policy loss of the fields, with those that the options ask for."""
    options = dict(options)
    if options.get("importance_weights") is True:
        options["importance_weights"] = fields["importance_weights"]
    if options.get("entropy_coef"):
        options["entropy"] = fields["entropy"]
    if options.get("kl_coef"):
        options["ref_logprobs"] = fields["ref_logprobs"]
    return function(fields["logprobs"], fields["old_logprobs"], fields["advantages"], mask, **options)


def policy_term(f: dict[str, float], options: dict[str, Any]) -> float:
    """One token, from the papers."""
    eps = options.get("clip_eps", 0.2)
    high = options.get("clip_eps_high", eps)
    ratio = math.exp(f["logprobs"] - f["old_logprobs"])
    a = f["advantages"]
    term = max(-a * ratio, -a * min(max(ratio, 1 - eps), 1 + high))
    if a < 0 and "dual_clip" in options:
        term = min(term, -a * options["dual_clip"])
    if "importance_weights" in options:
        term *= f["importance_weights"]
    if f["entropy"] < options.get("entropy_bound", math.inf):
        term -= options.get("entropy_coef", 0.0) * f["entropy"]
    d = f["logprobs"] - f["ref_logprobs"]
    kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[options.get("kl_kind", "k3")]
    return term + options.get("kl_coef", 0.0) * kl


def value_term(f: dict[str, float], eps: float | None) -> float:
    error = (f["values"] - f["returns"]) ** 2
    if eps is None:
        return 0.5 * error
    moved = min(max(f["values"] - f["old_values"], -eps), eps)
    return 0.5 * max(error, (f["old_values"] + moved - f["returns"]) ** 2)


def reduced(term: Callable[[dict[str, float]], float], fields: Fields, reduction: str) -> float:
    """The loss of the batch by a loop over sequences and tokens."""
    sums, counts = [], []
    for b in range(len(fields.lengths)):
        tokens = [t for t in range(fields.mask.shape[1]) if fields.mask[b, t]]
        sums.append(sum(term({name: float(x[b, t]) for name, x in fields.items()}) for t in tokens))
        counts.append(len(tokens))
    used = [(s, n) for s, n in zip(sums, counts, strict=True) if n]
    if reduction == "token-mean":
        return sum(sums) / sum(counts)
    if reduction == "token-sum":
        return sum(sums)
    if reduction == "seq-mean-token-sum":
        return sum(s for s, _ in used) / len(used)
    return sum(s / n for s, n in used) / len(used)


@pytest.fixture
def fields() -> Fields:
    made = Fields([7, 1, 12, 5])
    made.mask[1] = False  # a sequence without a token that counts
    return made


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", POLICY_OPTIONS.values(), ids=POLICY_OPTIONS.keys())
def test_policy_loss_is_the_papers(options: dict, reduction: str, fields: Fields) -> None:
    loss, _ = policy(fields, fields.mask, reduction=reduction, **options)
    assert float(loss) == pytest.approx(reduced(lambda f: policy_term(f, options), fields, reduction), rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("eps", [0.2, None])
def test_value_loss_is_the_papers(eps: float | None, reduction: str, fields: Fields) -> None:
    inputs = (fields["values"], fields["old_values"], fields["returns"])
    loss, _ = value_loss(*inputs, fields.mask, clip_eps=eps, reduction=reduction)
    assert float(loss) == pytest.approx(reduced(lambda f: value_term(f, eps), fields, reduction), rel=1e-12)


@pytest.mark.parametrize("options", POLICY_OPTIONS.values(), ids=POLICY_OPTIONS.keys())
def test_policy_gradcheck(options: dict, fields: Fields) -> None:
    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return policy({**fields, "logprobs": logprobs, "entropy": entropy}, fields.mask, **options).loss

    torch.autograd.gradcheck(loss, (fields["logprobs"].requires_grad_(), fields["entropy"].requires_grad_()))


@pytest.mark.parametrize("eps", [0.2, None])
def test_value_gradcheck(eps: float | None, fields: Fields) -> None:
    rest = (fields["old_values"], fields["returns"], fields.mask)
    torch.autograd.gradcheck(lambda v: value_loss(v, *rest, clip_eps=eps).loss, (fields["values"].requires_grad_(),))


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    """dL/dlogprob = -A / n: clamping at a tie must not halve it."""
    logprobs = -torch.rand(6, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -3.0, 0.5], dtype=torch.float64)
    x = logprobs.clone().requires_grad_()
    loss, stats = policy_loss(x, logprobs, advantages, dual_clip=3.0)
    loss.backward()
    torch.testing.assert_close(x.grad, -advantages / 6, rtol=1e-14, atol=0)
    assert (float(stats.ratio_mean), float(stats.ratio_max), float(stats.approx_kl)) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_equals_padded(reduction: str, fields: Fields) -> None:
    flat, mask, bounds = fields.packed()
    options = {"reduction": reduction, **POLICY_OPTIONS["all"]}
    padded = policy(fields, fields.mask, **options)
    packed = policy(flat, mask, cu_seqlens=bounds, **options)
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(packed.stats, padded.stats)
    names = ("values", "old_values", "returns")
    a = value_loss(*(fields[n] for n in names), fields.mask, reduction=reduction)
    b = value_loss(*(flat[n] for n in names), mask, reduction=reduction, cu_seqlens=bounds)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_add_up(reduction: str) -> None:
    fields = Fields([6, 3, 9, 4, 8])
    whole = policy(fields, fields.mask, reduction=reduction, **POLICY_OPTIONS["all"])
    normalizer = {"token-mean": fields.mask.sum(), "token-sum": 1.0}.get(reduction, (fields.mask.any(1)).sum())
    parts = [
        policy(
            {name: x[rows] for name, x in fields.items()},
            fields.mask[rows],
            reduction=reduction,
            normalizer=normalizer,
            **POLICY_OPTIONS["all"],
        )
        for rows in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(merge_policy_stats([p.stats for p in parts]), whole.stats)


def test_value_stats_merge() -> None:
    fields = Fields([6, 3, 9, 4, 8])
    inputs = [fields[n] for n in ("values", "old_values", "returns")]
    whole = value_loss(*inputs, fields.mask)
    parts = [value_loss(*(x[i : i + 1] for x in inputs), fields.mask[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(merge_value_stats([p.stats for p in parts]), whole.stats)
    r, v = fields["returns"][fields.mask], fields["values"][fields.mask]
    explained = 1 - float((r - v).var() / r.var())
    assert float(whole.stats.explained_variance) == pytest.approx(explained, rel=1e-5)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_masked_tokens_may_hold_anything(garbage: float, fields: Fields) -> None:
    dirty = {name: torch.where(fields.mask, x, garbage) for name, x in fields.items()}
    whiten = (torch.tensor(0.3), torch.tensor(1.7))

    def run(f: dict[str, Tensor]) -> tuple[Any, Any, list[Tensor]]:
        leaves = [f[n].clone().requires_grad_() for n in ("logprobs", "entropy", "values")]
        p = policy(
            {**f, "logprobs": leaves[0], "entropy": leaves[1]}, fields.mask, whiten=whiten, **POLICY_OPTIONS["all"]
        )
        v = value_loss(leaves[2], f["old_values"], f["returns"], fields.mask)
        return p, v, list(torch.autograd.grad(p.loss + v.loss, leaves))

    for a, b in zip(run(fields), run(dirty), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for g in run(dirty)[2]:
        assert torch.equal(g[~fields.mask], torch.zeros_like(g[~fields.mask]))


def test_nothing_unmasked(fields: Fields) -> None:
    none = torch.zeros_like(fields.mask)
    x = fields["logprobs"].requires_grad_()
    loss, stats = policy({**fields, "logprobs": x}, none, **POLICY_OPTIONS["all"])
    loss.backward()
    assert float(loss) == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert all(float(s) == 0.0 for s in stats)
    empty = torch.zeros(0)
    assert float(policy_loss(empty, empty, empty).loss) == 0.0
    assert float(value_loss(empty, empty, empty).loss) == 0.0


def test_statistics(fields: Fields) -> None:
    _, stats = policy(fields, fields.mask, dual_clip=1.5, entropy_coef=0.1)
    log_ratio = (fields["logprobs"] - fields["old_logprobs"])[fields.mask]
    ratio, a = log_ratio.exp(), fields["advantages"][fields.mask]
    low, high, dual = (a < 0) & (ratio < 0.8), (a > 0) & (ratio > 1.2), (a < 0) & (ratio > 1.5)
    expected = {
        "clipfrac": (low | high), "clipfrac_low": low, "clipfrac_dual": dual, "approx_kl": (ratio - 1) - log_ratio,
        "ratio_mean": ratio, "entropy": fields["entropy"][fields.mask], "active_fraction": ~(low | high | dual),
    }  # fmt: skip
    for name, x in expected.items():
        assert float(getattr(stats, name)) == pytest.approx(float(x.double().mean()), rel=1e-5), name
    assert float(stats.ratio_max) == pytest.approx(float(ratio.max()))
    assert float(stats.count) == int(fields.mask.sum())
    assert all(s.dtype == torch.float32 and s.dim() == 0 for s in stats)


def test_fp32_is_no_worse_than_plain_torch(no_worse: Any) -> None:
    fields = Fields([40, 25, 31], torch.float32)

    def plain(logprobs: Tensor, values: Tensor) -> Tensor:
        ratio = torch.exp(logprobs - fields["old_logprobs"])
        a = fields["advantages"]
        pg = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
        moved = fields["old_values"] + (values - fields["old_values"]).clamp(-0.2, 0.2)
        v = 0.5 * torch.maximum((values - fields["returns"]) ** 2, (moved - fields["returns"]) ** 2)
        return ((pg + v) * fields.mask).sum() / fields.mask.sum()

    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")

    def fused(function: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def run(logprobs: Tensor, values: Tensor) -> Tensor:
            f = {**fields, "logprobs": logprobs, "values": values}
            return function(*(f[n] for n in names), fields.mask).loss

        return run

    results = []
    for function in (fused(ppo_loss), plain, fused(ppo_loss_ref)):
        leaves = [fields[n].clone().requires_grad_() for n in ("logprobs", "values")]
        loss = function(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    no_worse(*results)


def test_ppo_loss_is_the_sum_of_its_parts(fields: Fields) -> None:
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    both = ppo_loss(*(fields[n] for n in names), fields.mask, dual_clip=3.0, value_clip_eps=0.1, value_coef=0.7)
    p = policy(fields, fields.mask, dual_clip=3.0)
    v = value_loss(fields["values"], fields["old_values"], fields["returns"], fields.mask, clip_eps=0.1, coef=0.7)
    torch.testing.assert_close(both, (p.loss + v.loss, p.loss, v.loss, p.stats, v.stats), equal_nan=True)
    torch.testing.assert_close(policy(fields, fields.mask, policy_loss_ref).loss, policy(fields, fields.mask).loss)
    args = (fields["values"], fields["old_values"], fields["returns"], fields.mask)
    torch.testing.assert_close(value_loss_ref(*args).loss, value_loss(*args).loss)


def test_whitening_is_applied_to_advantages(fields: Fields) -> None:
    mean, rstd = torch.tensor(0.4, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    lazily = policy(fields, fields.mask, whiten=(mean, rstd))
    before = policy({**fields, "advantages": (fields["advantages"] - mean) * rstd}, fields.mask)
    torch.testing.assert_close(lazily, before, equal_nan=True)


def test_log_ratio_clamp() -> None:
    logprobs = torch.tensor([0.0, -1.0], requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.tensor([-300.0, -1.0]), torch.tensor([-1.0, 1.0]), log_ratio_clamp=20.0)
    loss.backward()
    assert bool(loss.isfinite())
    assert logprobs.grad.tolist() == [0.0, -0.5]


def test_wrong_arguments_raise() -> None:
    x, y = torch.zeros(4), torch.zeros(5)
    for match, call in {
        "unknown reduction": lambda: policy_loss(x, x, x, reduction="mean"),  # type: ignore[arg-type]
        "shapes differ": lambda: policy_loss(x, y, x),
        "per-token shapes": lambda: policy_loss(y, x, x),
        "mask has shape": lambda: policy_loss(x, x, x, torch.ones(5)),
        "entropy_coef needs": lambda: policy_loss(x, x, x, entropy_coef=0.1),
        "kl_coef needs": lambda: policy_loss(x, x, x, kl_coef=0.1),
        "unknown KL": lambda: policy_loss(x, x, x, kl_coef=0.1, ref_logprobs=x, kl_kind="k4"),  # type: ignore[arg-type]
        "dual_clip": lambda: policy_loss(x, x, x, dual_clip=1.1),
        "negative": lambda: policy_loss(x, x, x, clip_eps=-0.1),
        "cu_seqlens": lambda: policy_loss(x, x, x, reduction="seq-mean-token-mean"),
        "differ: ": lambda: value_loss(x, x, y),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
