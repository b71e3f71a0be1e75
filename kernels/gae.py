"""Generalised advantage estimation over padded or packed sequences.

    delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lambda A_{t+1}          R_t = A_t + V_t

`t + 1` is the next unmasked token: masked tokens are transparent. After the last one V is the sequence's
bootstrap value (0 without one) and A is 0. Source: arXiv 1506.02438, equations 11-16; rewards of language
models as in arXiv 2307.04964, `r_t = -kl_coef kl_t`, plus the sequence's score at its last unmasked token.

Unmasked tokens are gathered, so the recurrence has one constant decay. It is solved in blocks: each block by
one product with the triangular matrix `decay^(j - i)`, the carries between blocks by the same method on the
blocks' first elements. No power is ever divided by, so gamma = lambda = 1 is as stable as any.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .kl import KLKind, kl_penalty
from .matmul import full_precision
from .reductions import check_mask, loss_dtype

BLOCK = 64


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
        if like.dim() != 1:
            raise ValueError(f"with cu_seqlens inputs are packed [N], got {tuple(like.shape)}")
        return cu_seqlens.long()
    if like.dim() != 2:
        raise ValueError(f"inputs are [B, T], or packed [N] with cu_seqlens; got {tuple(like.shape)}")
    return torch.arange(like.shape[0] + 1, device=like.device) * like.shape[1]


@full_precision
def decayed_sums(x: Tensor, lengths: Tensor, decay: float) -> Tensor:
    """y_i = sum_{j >= i, same sequence} decay^(j - i) x_j over packed sequences; x [N], lengths [S] int64."""
    if x.numel() == 0:
        return x.clone()
    blocks_of = (lengths + (BLOCK - 1)) // BLOCK  # [S]
    n_blocks = int(blocks_of.sum())
    slots = _block_slots(lengths, blocks_of, x.numel())
    blocks = _scatter(x, slots, n_blocks)
    powers = decay ** torch.arange(BLOCK + 1, dtype=x.dtype, device=x.device)
    y = blocks @ _triangle(powers[:BLOCK])
    if int(blocks_of.max()) > 1:
        heads = decayed_sums(y[:, 0].contiguous(), blocks_of, decay**BLOCK)
        carry = torch.cat([heads[1:], heads.new_zeros(1)])
        last = blocks_of.cumsum(0) - 1
        carry[last[blocks_of > 0]] = 0.0
        y.addcmul_(carry[:, None], powers[1:].flip(0))
    return y.flatten() if slots is None else y.flatten()[slots]


def _block_slots(lengths: Tensor, blocks_of: Tensor, total: int) -> Tensor | None:
    """Where each element lies once every sequence is padded to whole blocks; None where that changes nothing."""
    padding = blocks_of * BLOCK - lengths
    before = padding.cumsum(0) - padding
    if int(before[-1]) == 0 and int(padding[-1]) == 0:
        return None
    return torch.arange(total, device=lengths.device) + torch.repeat_interleave(before, lengths, output_size=total)


def _scatter(x: Tensor, slots: Tensor | None, n_blocks: int) -> Tensor:
    if slots is None:
        return x.view(n_blocks, BLOCK)
    return x.new_zeros(n_blocks * BLOCK).index_copy_(0, slots, x).view(n_blocks, BLOCK)


def _triangle(powers: Tensor) -> Tensor:
    """M[j, i] = powers[j - i] for j >= i, else 0."""
    index = torch.arange(powers.numel(), device=powers.device)
    gap = index[:, None] - index[None, :]
    return torch.where(gap >= 0, powers[gap.clamp(min=0)], 0.0)


def _unmasked(mask: Tensor | None, bounds: Tensor) -> tuple[Tensor | None, Tensor]:
    """(flat positions of unmasked tokens or None for all, their number per sequence [S])."""
    if mask is None:
        return None, bounds.diff()
    flat = mask.flatten()
    before = torch.cat([flat.new_zeros(1, dtype=torch.int64), flat.cumsum(0)])
    return flat.nonzero().squeeze(1), before[bounds].diff()


def _advantages(
    rewards: Tensor,
    values: Tensor,
    lengths: Tensor,
    bootstrap_values: Tensor | None,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Advantages of the unmasked tokens, packed [n], with `lengths` of them per sequence."""
    if rewards.numel() == 0:
        return rewards.clone()
    next_values = torch.cat([values[1:], values.new_zeros(1)])
    some = lengths > 0
    last = (lengths.cumsum(0) - 1)[some]
    next_values[last] = 0.0 if bootstrap_values is None else bootstrap_values.to(values.dtype)[some]
    deltas = torch.add(rewards, next_values, alpha=gamma).sub_(values)
    return decayed_sums(deltas, lengths, gamma * gae_lambda)


def _spread(x: Tensor, positions: Tensor | None, shape: torch.Size) -> Tensor:
    if positions is None:
        return x.view(shape)
    return x.new_zeros(shape.numel()).index_copy_(0, positions, x).view(shape)


def _take(x: Tensor, positions: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.detach().flatten()
    return (x if positions is None else x[positions]).to(dtype)


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
    dtype = loss_dtype(rewards, values)
    positions, lengths = _unmasked(check_mask(mask, rewards.shape), _bounds(rewards, cu_seqlens))
    _check_bootstrap(bootstrap_values, lengths)
    r, v = _take(rewards, positions, dtype), _take(values, positions, dtype)
    advantages = _advantages(r, v, lengths, bootstrap_values, gamma, gae_lambda)
    return GAE(*(_spread(x, positions, rewards.shape) for x in (advantages, advantages + v)))


def _check_bootstrap(bootstrap_values: Tensor | None, lengths: Tensor) -> None:
    if bootstrap_values is not None and bootstrap_values.shape != lengths.shape:
        raise ValueError(f"bootstrap_values has shape {tuple(bootstrap_values.shape)}, for {lengths.numel()} sequences")


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
    dtype = loss_dtype(scores, logprobs, ref_logprobs, values)
    positions, lengths = _unmasked(check_mask(mask, values.shape), _bounds(values, cu_seqlens))
    if scores.shape != lengths.shape:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, for {lengths.numel()} sequences")
    _check_bootstrap(bootstrap_values, lengths)
    lp, ref, v = (_take(t, positions, dtype) for t in (logprobs, ref_logprobs, values))
    kl = kl_penalty(lp, ref, kl_kind)
    rewards = -kl_coef * kl
    some = lengths > 0
    rewards[(lengths.cumsum(0) - 1)[some]] += scores.to(dtype)[some]
    advantages = _advantages(rewards, v, lengths, bootstrap_values, gamma, gae_lambda)
    count = torch.full((), float(advantages.numel()), dtype=dtype, device=v.device)
    mean = advantages.sum() / count.clamp(min=1)
    m2 = (advantages - mean).square().sum()
    spread = [_spread(x, positions, values.shape) for x in (advantages, advantages + v, rewards, kl)]
    return ShapedGAE(spread[0], spread[1], spread[2], spread[3], count, mean, m2)
