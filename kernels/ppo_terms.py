"""The terms of the PPO losses over per-token vectors. The torch functions here are the one definition of their maths.

Policy, per token, with rho = exp(logprob - old_logprob), advantage A and clip range [1 - eps, 1 + eps_high]:

    pg = max(-A rho, -A clip(rho, 1 - eps, 1 + eps_high))       PPO, arXiv 1707.06347, equation 7
    pg = min(pg, -A c) where A < 0                              dual clip, arXiv 1912.09729, equation 5

which is `-A clamp(rho, lower, upper)` with (lower, upper) = (0, 1 + eps_high) where A >= 0 and (1 - eps, c)
where A < 0, for any c > 1. Then `term = importance_weight * pg - entropy_coef * entropy + kl_coef * kl(logprob,
ref_logprob)`; with an `entropy_bound` the bonus counts only in tokens whose entropy is below it (the clipped
bonus of arXiv 2307.04964).

Critic, per token, with values V, old values V_old, returns R (arXiv 2307.04964, section 5.4; coef 1/2):

    term = coef * max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2)

In float64 these functions are the reference of every fused operation that contains them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kl import KLKind, check_kind, kl_terms
from .reductions import keep_constant, ones_of


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
        if self.dual_clip is not None and self.dual_clip <= 1.0:
            raise ValueError(f"dual_clip is a bound on the ratio above 1, got {self.dual_clip}")
        if self.log_ratio_clamp is not None and self.log_ratio_clamp <= 0:
            raise ValueError(f"log_ratio_clamp must be positive, got {self.log_ratio_clamp}")
        check_kind(self.kl_kind)

    @property
    def upper(self) -> float:
        return 1.0 + (self.clip_eps if self.clip_eps_high is None else self.clip_eps_high)

    @property
    def lower(self) -> float:
        return 1.0 - self.clip_eps

    @property
    def dual(self) -> float:
        return _or_off(self.dual_clip)


@dataclass(frozen=True)
class ValueOptions:
    """What `value_loss` is told beside its tensors."""

    clip_eps: float | None = 0.2
    coef: float = 0.5

    def __post_init__(self) -> None:
        if self.clip_eps is not None and self.clip_eps < 0:
            raise ValueError("clip_eps must not be negative")


class RowNumbers(NamedTuple):
    """The numbers of both losses as kernels take them; bounds that are off are inf."""

    lower: float
    upper: float
    dual: float
    log_ratio_clamp: float
    entropy_coef: float
    entropy_bound: float
    kl_coef: float
    value_clip: float
    value_coef: float


def row_numbers(policy: PolicyOptions, value: ValueOptions) -> RowNumbers:
    return RowNumbers(
        policy.lower,
        policy.upper,
        policy.dual,
        _or_off(policy.log_ratio_clamp),
        policy.entropy_coef,
        _or_off(policy.entropy_bound),
        policy.kl_coef,
        _or_off(value.clip_eps),
        value.coef,
    )


def _or_off(bound: float | None) -> float:
    return math.inf if bound is None else float(bound)


class PolicyTensors(NamedTuple):
    """What `policy_loss` is given per token, one shape, and the scalars that whiten its advantages."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    importance_weights: Tensor | None
    entropy: Tensor | None
    ref_logprobs: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None


class ValueTensors(NamedTuple):
    """What `value_loss` is given per token, one shape."""

    values: Tensor
    old_values: Tensor
    returns: Tensor


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
    check_shapes(advantages, old_logprobs, importance_weights, ref_logprobs)
    return PolicyInputs(
        keep_constant(old_logprobs, mask, dtype),
        keep_constant(advantages, mask, dtype),
        None if importance_weights is None else keep_constant(importance_weights, mask, dtype),
        None if ref_logprobs is None else keep_constant(ref_logprobs, mask, dtype),
    )


def check_shapes(like: Tensor, *others: Tensor | None) -> None:
    for t in others:
        if t is not None and t.shape != like.shape:
            raise ValueError(f"per-token shapes differ: {tuple(t.shape)} and {tuple(like.shape)}")


def check_coefficients(options: PolicyOptions, entropy: Tensor | None, ref_logprobs: Tensor | None) -> None:
    if options.entropy_coef != 0.0 and entropy is None:
        raise ValueError("entropy_coef needs entropy")
    if options.kl_coef != 0.0 and ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs")


def policy_terms(
    logprobs: Tensor, entropy: Tensor | None, inputs: PolicyInputs, options: PolicyOptions
) -> tuple[Tensor, Tensor]:
    """(per-token loss term, ratio): the definition of the policy loss, any shape."""
    log_ratio = logprobs - inputs.old_logprobs
    if options.log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-options.log_ratio_clamp, options.log_ratio_clamp)
    ratio = torch.exp(log_ratio.detach())
    terms = -inputs.advantages * _clipped_ratio(log_ratio, ratio, *clip_bounds(inputs.advantages, options))
    if inputs.importance_weights is not None:
        terms = terms * inputs.importance_weights
    if options.entropy_coef != 0.0 and entropy is not None:
        terms = terms - options.entropy_coef * bounded_entropy(entropy, options.entropy_bound)
    if options.kl_coef != 0.0 and inputs.ref_logprobs is not None:
        terms = terms + options.kl_coef * kl_terms(logprobs - inputs.ref_logprobs, options.kl_kind)
    return terms, ratio


class _WithSlope(torch.autograd.Function):
    """`value`, whose derivative by x is `slope`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream * ctx.saved_tensors[0], None, None


def _clipped_ratio(log_ratio: Tensor, ratio: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """`exp(log_ratio)` held in [lower, upper]; where it is, the gradient is 0 even if the ratio overflows."""
    clipped = ratio.clamp(lower, upper)
    if not log_ratio.requires_grad:
        return clipped
    return _WithSlope.apply(log_ratio, clipped, clipped * ones_of(ratio == clipped, ratio.dtype))  # NaN stays NaN


def clip_bounds(advantages: Tensor, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """(lower, upper) of the ratio for each token, by the sign of its advantage."""
    negative = ones_of(advantages < 0, advantages.dtype)
    if math.isinf(options.dual):  # which times 0 were no number; over 0 the upper bound is infinite
        return negative * options.lower, options.upper / (1.0 - negative)
    return negative * options.lower, negative * options.dual + (1.0 - negative) * options.upper


def bounded_entropy(entropy: Tensor, bound: float | None) -> Tensor:
    """The entropies that are rewarded: all, or those below `bound`."""
    return entropy if bound is None else torch.where(entropy >= bound, 0.0, entropy)


def value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_eps: float | None, coef: float
) -> tuple[Tensor, Tensor]:
    """(per-token loss term, where the clipped error is the larger): the definition of the critic's loss."""
    error = (values - returns).square()
    if clip_eps is None:
        return coef * error, torch.zeros_like(error, dtype=torch.bool)
    clipped = values.clamp(old_values - clip_eps, old_values + clip_eps)
    clipped_error = (clipped - returns).square()
    return coef * torch.maximum(error, clipped_error), clipped_error > error
