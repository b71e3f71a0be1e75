"""What the PPO losses report about their tokens, and how the reports of several calls are joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .ppo_terms import PolicyInputs, PolicyOptions
from .reductions import averages, keep_constant


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

    clipfrac: tokens where the clipped error is the larger. explained_variance: 1 - Var(R - V) / Var(R); 0
    where Var(R) is 0. The means and (biased) variances of returns and errors R - V let `merge_value_stats`
    join calls exactly.
    """

    clipfrac: Tensor
    explained_variance: Tensor
    value_mean: Tensor
    return_mean: Tensor
    return_var: Tensor
    error_mean: Tensor
    error_var: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count


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
    negative = advantages < 0
    low = torch.count_nonzero(negative & (ratio < options.lower))
    clipped = low + torch.count_nonzero((advantages > 0) & (ratio > options.upper))
    dual = torch.zeros_like(low) if math.isinf(options.dual) else torch.count_nonzero(negative & (ratio > options.dual))
    active = torch.count_nonzero(advantages) - clipped - dual
    log_ratio = logprobs - inputs.old_logprobs
    kl = torch.expm1(log_ratio).sub_(log_ratio)
    kept_ratio = keep_constant(ratio, mask, ratio.dtype)
    given = () if entropy is None else (entropy,)
    means = averages(count, clipped, low, dual, active, kl, kept_ratio, *given)
    clipfrac, clipfrac_low, clipfrac_dual, active_fraction, approx_kl, ratio_mean, *entropy_mean = means
    return PolicyStats(
        clipfrac,
        clipfrac_low,
        clipfrac_dual,
        approx_kl,
        ratio_mean,
        ratio_max=kept_ratio.amax().float() if ratio.numel() else count.new_zeros(()),
        entropy=entropy_mean[0] if entropy_mean else count.new_full((), torch.nan),
        active_fraction=active_fraction,
        count=count,
    )


def value_statistics(values: Tensor, returns: Tensor, clipped: Tensor, mask: Tensor | None) -> ValueStats:
    """See `ValueStats`. Tensors are 0 at masked positions."""
    count = _count(mask, values)
    error = returns - values
    n_clipped = torch.count_nonzero(clipped)
    value_mean, return_mean, error_mean, clipfrac = averages(count, values, returns, error, n_clipped)
    deviations = (keep_constant(x - mean, mask, x.dtype) for x, mean in ((returns, return_mean), (error, error_mean)))
    return_var, error_var = averages(count, *(x.square_() for x in deviations))
    explained = _explained_variance(return_var, error_var)
    return ValueStats(clipfrac, explained, value_mean, return_mean, return_var, error_mean, error_var, count)


def _count(mask: Tensor | None, like: Tensor) -> Tensor:
    if mask is None:
        return torch.full((), float(like.numel()), device=like.device)
    return torch.count_nonzero(mask).float()


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
