"""The losses of PPO over per-token vectors: `sum_i w_i term_i`, terms as in `ppo_terms.py`, weights as in
`reductions.py`, statistics as in `ppo_stats.py`.

On a GPU one Triton kernel reads the inputs once and forms losses, gradients and statistics (`gpu/ppo_loss.py`). In
torch autograd runs over the elementwise definitions; in float64 they are the reference of every fused operation
that contains them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import uses_triton
from .kl import KLKind
from .ppo_fused import fused_ppo_loss
from .ppo_stats import PolicyStats, ValueStats, policy_statistics, value_statistics
from .ppo_terms import (
    PolicyOptions,
    PolicyTensors,
    ValueOptions,
    ValueTensors,
    check_coefficients,
    check_shapes,
    policy_inputs,
    policy_terms,
    value_terms,
)
from .reductions import (
    Reduction,
    Weighting,
    check_mask,
    check_reduction,
    keep,
    keep_constant,
    loss_dtype,
    token_weights,
)


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


def policy_loss_ref(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None = None, **options: Any
) -> PolicyLoss:
    """`policy_loss` in float64."""
    for name in ("importance_weights", "entropy", "ref_logprobs"):
        extra = options.get(name)
        if isinstance(extra, Tensor):
            options[name] = extra.double()
    return policy_loss(logprobs.double(), old_logprobs.double(), advantages.double(), mask, **options)


def value_loss_ref(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None = None, **options: Any
) -> ValueLoss:
    """`value_loss` in float64."""
    return value_loss(values.double(), old_values.double(), returns.double(), mask, **options)


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


def _weights(tensors: PolicyTensors | ValueTensors, mask: Tensor | None, weighting: Weighting) -> Tensor:
    """Weights of the terms in the dtype of their arithmetic."""
    like = tensors[2]
    return token_weights(mask, like.to(loss_dtype(*tensors[:3])), **weighting._asdict())


def _policy_loss(tensors: PolicyTensors, mask: Tensor | None, options: PolicyOptions, weights: Tensor) -> PolicyLoss:
    """The policy loss in torch."""
    dtype = weights.dtype
    inputs = policy_inputs(
        tensors.old_logprobs,
        tensors.advantages,
        mask,
        dtype,
        importance_weights=tensors.importance_weights,
        ref_logprobs=tensors.ref_logprobs,
        whiten=None if tensors.mean is None or tensors.rstd is None else (tensors.mean, tensors.rstd),
    )
    logprobs = keep(tensors.logprobs, mask, dtype)
    entropy = None if tensors.entropy is None else keep(tensors.entropy, mask, dtype)
    terms, ratio = policy_terms(logprobs, entropy, inputs, options)
    with torch.no_grad():
        stats = policy_statistics(logprobs, entropy, ratio, mask, inputs, options)
    return PolicyLoss((terms * weights).sum(), stats)


def _value_loss(tensors: ValueTensors, mask: Tensor | None, options: ValueOptions, weights: Tensor) -> ValueLoss:
    """The value loss in torch."""
    dtype = weights.dtype
    values = keep(tensors.values, mask, dtype)
    old_values, returns = (keep_constant(x, mask, dtype) for x in (tensors.old_values, tensors.returns))
    terms, clipped = value_terms(values, old_values, returns, options.clip_eps, options.coef)
    with torch.no_grad():
        stats = value_statistics(values, returns, clipped, mask)
    return ValueLoss((terms * weights).sum(), stats)


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
    tensors = PolicyTensors(
        logprobs, old_logprobs, advantages, importance_weights, entropy, ref_logprobs, *(whiten or (None, None))
    )
    mask = _check_policy(tensors, mask, options, reduction)
    weighting = Weighting(reduction, normalizer, cu_seqlens)
    if not uses_triton(*tensors[:6]):
        return _policy_loss(tensors, mask, options, _weights(tensors, mask, weighting))
    fused = fused_ppo_loss(tensors, None, mask, options, ValueOptions(), weighting)
    return PolicyLoss(fused.loss, fused.policy_stats)


def _check_policy(tensors: PolicyTensors, mask: Tensor | None, options: PolicyOptions, reduction: str) -> Tensor | None:
    """The mask as bool; raises where arguments do not fit."""
    check_coefficients(options, tensors.entropy, tensors.ref_logprobs)
    check_reduction(reduction)
    check_shapes(tensors.advantages, *tensors[:6])
    return check_mask(mask, tensors.advantages.shape)


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
    tensors, options = ValueTensors(values, old_values, returns), ValueOptions(clip_eps, coef)
    mask = _check_value(tensors, mask, reduction)
    weighting = Weighting(reduction, normalizer, cu_seqlens)
    if not uses_triton(*tensors):
        return _value_loss(tensors, mask, options, _weights(tensors, mask, weighting))
    fused = fused_ppo_loss(None, tensors, mask, PolicyOptions(), options, weighting)
    return ValueLoss(fused.loss, fused.value_stats)


def _check_value(tensors: ValueTensors, mask: Tensor | None, reduction: str) -> Tensor | None:
    """The mask as bool; raises where arguments do not fit."""
    check_reduction(reduction)
    check_shapes(tensors.returns, *tensors)
    return check_mask(mask, tensors.returns.shape)


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
    options = PolicyOptions(
        clip_eps, clip_eps_high, dual_clip, entropy_coef, entropy_bound, kl_coef, kl_kind, log_ratio_clamp
    )
    value_options = ValueOptions(value_clip_eps, value_coef)
    policy = PolicyTensors(
        logprobs, old_logprobs, advantages, importance_weights, entropy, ref_logprobs, *(whiten or (None, None))
    )
    value = ValueTensors(values, old_values, returns)
    check_shapes(advantages, *value)
    mask = _check_policy(policy, mask, options, reduction)
    weighting = Weighting(reduction, normalizer, cu_seqlens)
    if not uses_triton(*policy[:6], *value):
        weights = _weights(policy, mask, weighting)
        p = _policy_loss(policy, mask, options, weights)
        same = loss_dtype(*value) == weights.dtype
        v = _value_loss(value, mask, value_options, weights if same else _weights(value, mask, weighting))
        return PPOLoss(p.loss + v.loss, p.loss, v.loss, p.stats, v.stats)
    fused = fused_ppo_loss(policy, value, mask, options, value_options, weighting)
    return PPOLoss(fused.loss, fused.policy_loss, fused.value_loss, fused.policy_stats, fused.value_stats)
