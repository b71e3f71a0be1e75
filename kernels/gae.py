"""Generalised advantage estimation over padded or packed sequences.

    delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lambda A_{t+1}          R_t = A_t + V_t

`t + 1` is the next unmasked token: masked tokens are transparent. After the last one V is the sequence's
bootstrap value (0 without one) and A is 0. Source: arXiv 1506.02438, equations 11-16; rewards of language
models as in arXiv 2307.04964, `r_t = -kl_coef kl_t`, plus the sequence's score at its last unmasked token.

On a GPU one Triton kernel goes over each sequence from its end (`gpu/gae.py`). In torch the unmasked tokens are
gathered, so that the recurrence has one constant decay, and solved by `discounting.py`. Neither ever divides by
a power of the decay: gamma = lambda = 1 is as stable as any.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .discounting import discounted_advantages, spread, take, unmasked
from .dispatch import dense, uses_triton
from .kl import KLKind, kl_penalty, kl_terms
from .reductions import check_mask, loss_dtype


class GAE(NamedTuple):
    """`advantages` and `returns` in the shape of the rewards, fp32 (fp64 where an input is); 0 where masked."""

    advantages: Tensor
    returns: Tensor


class ShapedGAE(NamedTuple):
    """Per token [N], 0 where masked: advantages, returns, rewards (penalty and score), kl (the estimate, not
    times kl_coef). Moments of the unmasked advantages, 0-dim: count, mean, m2 = sum (A - mean)^2 (see
    `whiten.whitening`)."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    kl: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    mean: Tensor
    m2: Tensor


def gae_ref(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> GAE:
    """`gae` in float64, one sequence at a time, one token at a time."""
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    bounds = _bounds(rewards, cu_seqlens).tolist()
    flat_rewards, flat_values, flat_mask = (t.double().flatten().tolist() for t in (rewards, values, mask))
    advantages = [0.0] * len(flat_rewards)
    for s, (start, stop) in enumerate(pairwise(bounds)):
        next_value = 0.0 if bootstrap_values is None else float(bootstrap_values[s])
        carry = 0.0
        for t in reversed(range(start, stop)):
            if flat_mask[t]:
                carry = flat_rewards[t] + gamma * next_value - flat_values[t] + gamma * gae_lambda * carry
                advantages[t], next_value = carry, flat_values[t]
    result = torch.tensor(advantages, dtype=torch.float64, device=rewards.device).view(rewards.shape)
    return GAE(result, torch.where(mask, result + values.double(), 0.0))


def _bounds(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[S+1] int64 sequence boundaries of the flattened input."""
    if cu_seqlens is not None:
        return cu_seqlens.long()
    return torch.arange(like.shape[0] + 1, device=like.device) * like.shape[1]


@torch.library.custom_op("ppomax::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap_values: Tensor | None,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns)"""
    if uses_triton(rewards, values, bootstrap_values):
        from .gpu import gae as triton_path

        r, v, sequences = rewards.contiguous(), values.contiguous(), dense(cu_seqlens)
        return triton_path.gae(r, v, dense(mask), sequences, dense(bootstrap_values), gamma, gae_lambda)
    dtype = loss_dtype(rewards, values)
    positions, lengths = unmasked(mask, _bounds(rewards, cu_seqlens))
    r, v = take(rewards, positions, dtype), take(values, positions, dtype)
    advantages = discounted_advantages(r, v, lengths, bootstrap_values, gamma, gae_lambda)
    return spread(advantages, positions, rewards.shape), spread(advantages + v, positions, rewards.shape)


@_gae.register_fake
def _(rewards: Tensor, values: Tensor, *others: Tensor | float | None) -> tuple[Tensor, Tensor]:
    dtype = loss_dtype(rewards, values)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> GAE:
    """Advantages and returns, formulas in the module's docstring. No gradient flows.

    Args:
        rewards, values: [B, T], or packed [N] with `cu_seqlens`.
        mask: the same shape, True = keep; other tokens are transparent and may hold anything.
        cu_seqlens: [S+1] sequence boundaries of packed inputs.
        bootstrap_values: [B] or [S], the value after each sequence's last token; None is 0.
        gamma, gae_lambda: discount and GAE's lambda.

    Returns:
        GAE(advantages, returns).

    Raises:
        ValueError: shapes differ or are neither [B, T] nor packed.
    """
    if rewards.shape != values.shape:
        raise ValueError(f"shapes differ: rewards {tuple(rewards.shape)}, values {tuple(values.shape)}")
    mask = check_mask(mask, rewards.shape)
    _check_bootstrap(bootstrap_values, _n_sequences(rewards, cu_seqlens))
    return GAE(*_gae(rewards, values, mask, cu_seqlens, bootstrap_values, gamma, gae_lambda))


def _n_sequences(like: Tensor, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is not None:
        if like.dim() != 1:
            raise ValueError(f"with cu_seqlens inputs are packed [N], got {tuple(like.shape)}")
        return cu_seqlens.numel() - 1
    if like.dim() != 2:
        raise ValueError(f"inputs are [B, T], or packed [N] with cu_seqlens; got {tuple(like.shape)}")
    return like.shape[0]


def _check_bootstrap(bootstrap_values: Tensor | None, n_sequences: int) -> None:
    if bootstrap_values is not None and bootstrap_values.shape != (n_sequences,):
        raise ValueError(f"bootstrap_values has shape {tuple(bootstrap_values.shape)}, for {n_sequences} sequences")


def shaped_gae_ref(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    kl_coef: float,
    kl_kind: KLKind = "k1",
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> ShapedGAE:
    """`shaped_gae` in float64, one sequence at a time."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    kl = torch.where(mask, kl_penalty(logprobs.double(), ref_logprobs.double(), kl_kind), 0.0)
    rewards = -kl_coef * kl
    for s, score in enumerate(scores.double()):
        start, stop = int(cu_seqlens[s]), int(cu_seqlens[s + 1])
        tokens = mask[start:stop].nonzero()
        if tokens.numel():
            rewards[start + int(tokens[-1])] += score
    advantages, returns = gae_ref(
        rewards,
        values,
        mask=mask,
        cu_seqlens=cu_seqlens,
        bootstrap_values=bootstrap_values,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    kept = advantages[mask]
    mean = kept.mean() if kept.numel() else kept.new_zeros(())
    count = torch.tensor(float(kept.numel()), dtype=torch.float64)
    return ShapedGAE(advantages, returns, rewards, kl, count, mean, (kept - mean).square().sum())


@torch.library.custom_op("ppomax::shaped_gae", mutates_args=())
def _shaped_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap_values: Tensor | None,
    kl_coef: float,
    kl_kind: str,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ShapedGAE."""
    if uses_triton(scores, logprobs, ref_logprobs, values, bootstrap_values):
        from .gpu import gae as triton_path

        return triton_path.shaped_gae(
            scores.contiguous(), logprobs.contiguous(), ref_logprobs.contiguous(), values.contiguous(),
            cu_seqlens.contiguous(), dense(mask), dense(bootstrap_values), kl_coef, kl_kind, gamma, gae_lambda,
        )  # fmt: skip
    dtype = loss_dtype(scores, logprobs, ref_logprobs, values)
    positions, lengths = unmasked(mask, _bounds(values, cu_seqlens))
    lp, ref, v = (take(t, positions, dtype) for t in (logprobs, ref_logprobs, values))
    kl = kl_penalty(lp, ref, kl_kind)  # type: ignore[arg-type]  # a KLKind: ops know only str
    rewards = -kl_coef * kl
    some = lengths > 0
    rewards[(lengths.cumsum(0) - 1)[some]] += scores.to(dtype)[some]
    advantages = discounted_advantages(rewards, v, lengths, bootstrap_values, gamma, gae_lambda)
    count = torch.full((), float(advantages.numel()), dtype=dtype, device=v.device)
    mean = advantages.sum() / count.clamp(min=1)
    m2 = (advantages - mean).square().sum()
    a, r, w, k = (spread(x, positions, values.shape) for x in (advantages, advantages + v, rewards, kl))
    return a, r, w, k, count, mean, m2


@_shaped_gae.register_fake
def _(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, *others: Tensor | float | str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = loss_dtype(scores, logprobs, ref_logprobs, values)
    a, r, w, k = (values.new_empty(values.shape, dtype=dtype) for _ in range(4))
    count, mean, m2 = (values.new_empty((), dtype=dtype) for _ in range(3))
    return a, r, w, k, count, mean, m2


@torch.no_grad()
def shaped_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    kl_coef: float,
    kl_kind: KLKind = "k1",
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> ShapedGAE:
    """KL penalty, placement of the scores, GAE, returns and the advantages' moments in one pass. No gradient flows.

    Args:
        scores: [S]; each enters at the last unmasked token of its sequence (a sequence without one
            contributes nothing).
        logprobs, ref_logprobs, values: packed [N], the responses' tokens.
        cu_seqlens: [S+1] boundaries of the responses.
        mask: [N], True = keep; other tokens are transparent and may hold anything.
        bootstrap_values: [S], the value after each response's last token; None is 0.
        kl_coef, kl_kind: r_t = -kl_coef * kl_t, estimators as in `kl.py`.
        gamma, gae_lambda: as in `gae`.

    Returns:
        ShapedGAE(advantages, returns, rewards, kl, count, mean, m2), fp32 (fp64 where an input is).

    Raises:
        ValueError: shapes that do not fit, or an unknown estimator.
    """
    if not logprobs.shape == ref_logprobs.shape == values.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (logprobs, ref_logprobs, values))
        raise ValueError(f"shapes differ: {shapes}")
    kl_terms(logprobs[:0], kl_kind)  # raises where the estimator is unknown
    mask = check_mask(mask, values.shape)
    n_sequences = _n_sequences(values, cu_seqlens)
    if scores.shape != (n_sequences,):
        raise ValueError(f"scores has shape {tuple(scores.shape)}, for {n_sequences} sequences")
    _check_bootstrap(bootstrap_values, n_sequences)
    sequences = (scores, logprobs, ref_logprobs, values, cu_seqlens, mask, bootstrap_values)
    return ShapedGAE(*_shaped_gae(*sequences, kl_coef, kl_kind, gamma, gae_lambda))
