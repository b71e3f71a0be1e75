"""The losses of PPO over per-token vectors. The torch functions here are the one definition of the loss maths.

Policy, per token, with rho = exp(logprob - old_logprob), advantage A and clip range [1 - eps, 1 + eps_high]:

    pg = max(-A rho, -A clip(rho, 1 - eps, 1 + eps_high))       PPO, arXiv 1707.06347, equation 7
    pg = min(pg, -A c) where A < 0                              dual clip, arXiv 1912.09729, equation 5

which is `-A clamp(rho, lower, upper)` with (lower, upper) = (0, 1 + eps_high) where A >= 0 and (1 - eps, c)
where A < 0. Then `term = importance_weight * pg - entropy_coef * entropy + kl_coef * kl(logprob,
ref_logprob)`; with an `entropy_bound` the bonus counts only in tokens whose entropy is below it (the clipped
bonus of arXiv 2307.04964).

Critic, per token, with values V, old values V_old, returns R (arXiv 2307.04964, section 5.4; coef 1/2):

    term = coef * max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2)

A loss is the weighted sum of its terms, weights as in `reductions.py`. In float64 these functions are the
reference of every fused operation that contains them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kl import KLKind, kl_terms
from .reductions import Reduction, average, check_mask, keep, loss_dtype, token_weights


@dataclass(frozen=True)
class PolicyOptions:
    """What `policy_loss` is told beside its tensors."""

    clip_eps: float = 0.2
    clip_eps_high: float | None = None
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    entropy_bound: float | None = None
    kl_coef: float = 0.0
    kl_kind: KLKind = "k3"
    log_ratio_clamp: float | None = None

    def __post_init__(self) -> None:
        if self.clip_eps < 0 or (self.clip_eps_high is not None and self.clip_eps_high < 0):
            raise ValueError("clip_eps and clip_eps_high must not be negative")
        if self.dual_clip is not None and self.dual_clip <= 1.0 + self.clip_eps:
            raise ValueError(f"dual_clip is a bound on the ratio above 1 + clip_eps, got {self.dual_clip}")

    @property
    def upper(self) -> float:
        return 1.0 + (self.clip_eps if self.clip_eps_high is None else self.clip_eps_high)

    @property
    def lower(self) -> float:
        return 1.0 - self.clip_eps

    @property
    def dual(self) -> float:
        return math.inf if self.dual_clip is None else self.dual_clip


class PolicyInputs(NamedTuple):
    """Per-token constants of the policy loss, one dtype, 0 at masked positions."""

    old_logprobs: Tensor
    advantages: Tensor
    importance_weights: Tensor | None
    ref_logprobs: Tensor | None

    def rows(self, rows: slice | Tensor) -> PolicyInputs:
        weights, ref = self.importance_weights, self.ref_logprobs
        return PolicyInputs(
            self.old_logprobs[rows],
            self.advantages[rows],
            None if weights is None else weights[rows],
            None if ref is None else ref[rows],
        )


class PolicyStats(NamedTuple):
    """Means over the unmasked tokens of the call, fp32 scalars; 0 where there are none.

    clipfrac: tokens held by the clip range; clipfrac_low: those of them held at 1 - eps (A < 0).
    clipfrac_dual: tokens held by the dual clip.
    approx_kl: mean of (ratio - 1) - log ratio, the k3 estimate of KL(old, new) from tokens of the old policy.
    ratio_mean, ratio_max: of rho. entropy: NaN where no entropy was given.
    active_fraction: tokens that receive a policy gradient (not clipped, A != 0). count: unmasked tokens.
    """

    clipfrac: Tensor
    clipfrac_low: Tensor
    clipfrac_dual: Tensor
    approx_kl: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    entropy: Tensor
    active_fraction: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count


class ValueStats(NamedTuple):
    """Over the unmasked tokens of the call, fp32 scalars.

    clipfrac: tokens where the clipped error is the larger. explained_variance: 1 - Var(R - V) / Var(R), 0
        where Var(R) is
    0. The means and (biased) variances of returns and errors R - V let `merge_value_stats` join calls
    exactly.
    """

    clipfrac: Tensor
    explained_variance: Tensor
    value_mean: Tensor
    return_mean: Tensor
    return_var: Tensor
    error_mean: Tensor
    error_var: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count


class PolicyLoss(NamedTuple):
    loss: Tensor
    stats: PolicyStats


class ValueLoss(NamedTuple):
    loss: Tensor
    stats: ValueStats


class PPOLoss(NamedTuple):
    """`loss` = `policy_loss` + `value_loss`; entropy bonus and KL loss are in `policy_loss`."""

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    policy_stats: PolicyStats
    value_stats: ValueStats


def policy_terms(
    logprobs: Tensor, entropy: Tensor | None, inputs: PolicyInputs, options: PolicyOptions
) -> tuple[Tensor, Tensor]:
    """(per-token loss term, ratio): the definition of the policy loss, any shape."""
    log_ratio = logprobs - inputs.old_logprobs
    if options.log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-options.log_ratio_clamp, options.log_ratio_clamp)
    ratio = torch.exp(log_ratio)
    lower, upper = clip_bounds(inputs.advantages, options)
    terms = -inputs.advantages * ratio.clamp(lower, upper)
    if inputs.importance_weights is not None:
        terms = terms * inputs.importance_weights
    if options.entropy_coef != 0.0 and entropy is not None:
        terms = terms - options.entropy_coef * bounded_entropy(entropy, options.entropy_bound)
    if options.kl_coef != 0.0 and inputs.ref_logprobs is not None:
        terms = terms + options.kl_coef * kl_terms(logprobs - inputs.ref_logprobs, options.kl_kind)
    return terms, ratio


def clip_bounds(advantages: Tensor, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """(lower, upper) of the ratio for each token, by the sign of its advantage."""
    negative = advantages < 0
    lower = torch.where(negative, options.lower, advantages.new_zeros(()))
    upper = torch.where(negative, options.dual, advantages.new_full((), options.upper))
    return lower, upper


def bounded_entropy(entropy: Tensor, bound: float | None) -> Tensor:
    """The entropies that are rewarded: all, or those below `bound`."""
    return entropy if bound is None else torch.where(entropy < bound, entropy, 0.0)


def policy_statistics(
    logprobs: Tensor,
    entropy: Tensor | None,
    ratio: Tensor,
    mask: Tensor | None,
    inputs: PolicyInputs,
    options: PolicyOptions,
) -> PolicyStats:
    """See `PolicyStats`. `entropy` is 0 at masked positions, as the inputs are."""
    count = _count(mask, ratio)
    advantages = inputs.advantages
    low = (advantages < 0) & (ratio < options.lower)
    high = (advantages > 0) & (ratio > options.upper)
    dual = (advantages < 0) & (ratio > options.dual)
    log_ratio = logprobs - inputs.old_logprobs
    kept_ratio = ratio if mask is None else torch.where(mask, ratio, 0.0)
    return PolicyStats(
        clipfrac=average(low | high, count),
        clipfrac_low=average(low, count),
        clipfrac_dual=average(dual, count),
        approx_kl=average(torch.expm1(log_ratio) - log_ratio, count),
        ratio_mean=average(kept_ratio, count),
        ratio_max=kept_ratio.amax().float() if ratio.numel() else count.new_zeros(()),
        entropy=count.new_full((), torch.nan) if entropy is None else average(entropy, count),
        active_fraction=average((advantages != 0) & ~(low | high | dual), count),
        count=count,
    )


def value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_eps: float | None, coef: float
) -> tuple[Tensor, Tensor]:
    """(per-token loss term, where the clipped error is the larger): the definition of the critic's loss."""
    error = (values - returns).square()
    if clip_eps is None:
        return coef * error, torch.zeros_like(error, dtype=torch.bool)
    clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    clipped_error = (clipped - returns).square()
    return coef * torch.maximum(error, clipped_error), clipped_error > error


def value_statistics(values: Tensor, returns: Tensor, clipped: Tensor, mask: Tensor | None) -> ValueStats:
    """See `ValueStats`. Tensors are 0 at masked positions."""
    count = _count(mask, values)
    error = returns - values
    value_mean, return_mean, error_mean = (average(x, count) for x in (values, returns, error))
    return_var = average(keep(returns - return_mean, mask, returns.dtype).square(), count)
    error_var = average(keep(error - error_mean, mask, error.dtype).square(), count)
    explained = _explained_variance(return_var, error_var)
    clipfrac = average(clipped, count)
    return ValueStats(clipfrac, explained, value_mean, return_mean, return_var, error_mean, error_var, count)


def _count(mask: Tensor | None, like: Tensor) -> Tensor:
    if mask is None:
        return torch.full((), float(like.numel()), device=like.device)
    return mask.sum(dtype=torch.float32)


def _explained_variance(return_var: Tensor, error_var: Tensor) -> Tensor:
    return torch.where(return_var > 0, 1.0 - error_var / return_var.clamp(min=1e-38), 0.0)


def merge_policy_stats(stats: Sequence[PolicyStats]) -> PolicyStats:
    """The statistics of several calls' tokens together: means weighted by count, the maximum of `ratio_max`."""
    count = torch.stack([s.count for s in stats])
    merged = {name: _merge_means([getattr(s, name) for s in stats], count) for name in PolicyStats._fields}
    merged["ratio_max"] = torch.stack([s.ratio_max for s in stats]).amax()
    merged["count"] = count.sum()
    return PolicyStats(**merged)


def merge_value_stats(stats: Sequence[ValueStats]) -> ValueStats:
    """The statistics of several calls' tokens together, explained variance included."""
    count = torch.stack([s.count for s in stats])
    merged = {name: _merge_means([getattr(s, name) for s in stats], count) for name in ValueStats._fields}
    for name in ("return", "error"):
        means = torch.stack([getattr(s, f"{name}_mean") for s in stats])
        between = _merge_means(list((means - merged[f"{name}_mean"]).square()), count)
        merged[f"{name}_var"] = merged[f"{name}_var"] + between
    merged["explained_variance"] = _explained_variance(merged["return_var"], merged["error_var"])
    merged["count"] = count.sum()
    return ValueStats(**merged)


def _merge_means(means: list[Tensor], count: Tensor) -> Tensor:
    return (torch.stack(means) * count).sum() / count.sum().clamp(min=1)


def policy_inputs(
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    *,
    importance_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    whiten: tuple[Tensor, Tensor] | None = None,
) -> PolicyInputs:
    """Constants of the policy loss, detached, whitened, with garbage at masked positions replaced by 0."""
    if whiten is not None:
        mean, rstd = whiten
        advantages = (advantages.to(dtype) - mean.to(dtype)) * rstd.to(dtype)
    for t in (old_logprobs, importance_weights, ref_logprobs):
        if t is not None and t.shape != advantages.shape:
            raise ValueError(f"per-token shapes differ: {tuple(t.shape)} and {tuple(advantages.shape)}")
    return PolicyInputs(
        keep(old_logprobs.detach(), mask, dtype),
        keep(advantages.detach(), mask, dtype),
        None if importance_weights is None else keep(importance_weights.detach(), mask, dtype),
        None if ref_logprobs is None else keep(ref_logprobs.detach(), mask, dtype),
    )


def policy_loss_ref(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None = None, **options: Any
) -> PolicyLoss:
    """`policy_loss` in float64."""
    for name in ("importance_weights", "entropy", "ref_logprobs"):
        extra = options.get(name)
        if isinstance(extra, Tensor):
            options[name] = extra.double()
    return policy_loss(logprobs.double(), old_logprobs.double(), advantages.double(), mask, **options)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
    importance_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    entropy_bound: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: KLKind = "k3",
    log_ratio_clamp: float | None = None,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    whiten: tuple[Tensor, Tensor] | None = None,
) -> PolicyLoss:
    """The clipped policy loss of the module's docstring; differentiable in `logprobs` and `entropy`.

    Args:
        logprobs, old_logprobs, advantages: [B, T] or packed [N].
        mask: the same shape, True = keep; other tokens may hold anything.
        clip_eps, clip_eps_high: the clip range 1 - clip_eps .. 1 + clip_eps_high (None: clip_eps).
        dual_clip: bound c > 1 on the ratio where the advantage is negative; None is off.
        importance_weights: factor of each token's policy term, e.g. truncated rollout corrections.
        entropy, entropy_coef, entropy_bound: the bonus, and the bound below which it counts.
        ref_logprobs, kl_coef, kl_kind: a KL term in the loss, estimators as in `kl.py`.
        log_ratio_clamp: clamp the log-ratio to +- this before exp.
        reduction, normalizer: see `reductions.py`.
        cu_seqlens: [S+1] sequence boundaries of packed inputs, for the seq-* reductions.
        whiten: (mean, rstd), 0-dim tensors: A = (advantages - mean) * rstd.

    Returns:
        PolicyLoss(loss, PolicyStats), fp32 (loss fp64 where an input is).

    Raises:
        ValueError: shapes differ, an unknown reduction or estimator, a coefficient without its tensor.
    """
    options = PolicyOptions(
        clip_eps, clip_eps_high, dual_clip, entropy_coef, entropy_bound, kl_coef, kl_kind, log_ratio_clamp
    )
    check_coefficients(options, entropy, ref_logprobs)
    dtype = loss_dtype(logprobs, old_logprobs, advantages)
    mask = check_mask(mask, advantages.shape)
    inputs = policy_inputs(
        old_logprobs,
        advantages,
        mask,
        dtype,
        importance_weights=importance_weights,
        ref_logprobs=ref_logprobs,
        whiten=whiten,
    )
    if logprobs.shape != advantages.shape:
        raise ValueError(f"per-token shapes differ: {tuple(logprobs.shape)} and {tuple(advantages.shape)}")
    logprobs = keep(logprobs, mask, dtype)
    entropy = None if entropy is None else keep(entropy, mask, dtype)
    weights = token_weights(mask, inputs.advantages, reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens)
    terms, ratio = policy_terms(logprobs, entropy, inputs, options)
    with torch.no_grad():
        stats = policy_statistics(logprobs, entropy, ratio, mask, inputs, options)
    return PolicyLoss((terms * weights).sum(), stats)


def check_coefficients(options: PolicyOptions, entropy: Tensor | None, ref_logprobs: Tensor | None) -> None:
    if options.entropy_coef != 0.0 and entropy is None:
        raise ValueError("entropy_coef needs entropy")
    if options.kl_coef != 0.0 and ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs")


def value_loss_ref(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None = None, **options: Any
) -> ValueLoss:
    """`value_loss` in float64."""
    return value_loss(values.double(), old_values.double(), returns.double(), mask, **options)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip_eps: float | None = 0.2,
    coef: float = 0.5,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> ValueLoss:
    """The clipped critic loss of the module's docstring; differentiable in `values`.

    Args:
        values, old_values, returns: [B, T] or packed [N].
        mask: the same shape, True = keep; other tokens may hold anything.
        clip_eps: how far a value may move from its old value before the error stops falling; None is
            unclipped.
        coef: factor of the squared error.
        reduction, normalizer, cu_seqlens: as in `policy_loss`.

    Returns:
        ValueLoss(loss, ValueStats), fp32 (loss fp64 where an input is).

    Raises:
        ValueError: shapes differ, or an unknown reduction.
    """
    if not values.shape == old_values.shape == returns.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (values, old_values, returns))
        raise ValueError(f"per-token shapes differ: {shapes}")
    dtype = loss_dtype(values, old_values, returns)
    mask = check_mask(mask, values.shape)
    values, old_values, returns = (
        keep(values, mask, dtype),
        keep(old_values.detach(), mask, dtype),
        keep(returns.detach(), mask, dtype),
    )
    weights = token_weights(mask, returns, reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens)
    terms, clipped = value_terms(values, old_values, returns, clip_eps, coef)
    with torch.no_grad():
        stats = value_statistics(values, returns, clipped, mask)
    return ValueLoss((terms * weights).sum(), stats)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
    importance_weights: Tensor | None = None,
    entropy_coef: float = 0.0,
    entropy_bound: float | None = None,
    kl_coef: float = 0.0,
    kl_kind: KLKind = "k3",
    log_ratio_clamp: float | None = None,
    value_clip_eps: float | None = 0.2,
    value_coef: float = 0.5,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    whiten: tuple[Tensor, Tensor] | None = None,
) -> PPOLoss:
    """`policy_loss` and `value_loss` of the same tokens and their sum; arguments as there.

    `value_clip_eps` and `value_coef` are `clip_eps` and `coef` of `value_loss`.
    """
    policy = policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_eps=clip_eps,
        clip_eps_high=clip_eps_high,
        dual_clip=dual_clip,
        importance_weights=importance_weights,
        entropy=entropy,
        entropy_coef=entropy_coef,
        entropy_bound=entropy_bound,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
        log_ratio_clamp=log_ratio_clamp,
        reduction=reduction,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
        whiten=whiten,
    )
    value = value_loss(
        values,
        old_values,
        returns,
        mask,
        clip_eps=value_clip_eps,
        coef=value_coef,
        reduction=reduction,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
    )
    return PPOLoss(policy.loss + value.loss, policy.loss, value.loss, policy.stats, value.stats)


def ppo_loss_ref(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    **options: Any,
) -> PPOLoss:
    """`ppo_loss` in float64."""
    policy = (logprobs.double(), old_logprobs.double(), advantages.double())
    critic = (values.double(), old_values.double(), returns.double())
    for name in ("importance_weights", "entropy", "ref_logprobs"):
        extra = options.get(name)
        if isinstance(extra, Tensor):
            options[name] = extra.double()
    return ppo_loss(*policy, *critic, mask, **options)
