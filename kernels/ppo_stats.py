"""What the PPO losses report about their tokens, and how the reports of several calls are joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .ppo_terms import PolicyInputs, PolicyOptions
from .reductions import average, keep


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
