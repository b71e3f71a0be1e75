"""GAE in Triton; the maths is in `kernels/gae.py`.

A program takes one sequence, from its end to its start in blocks of BLOCK_T tokens. In a block one reverse scan
finds the next kept token of each (without a mask that is the neighbour), the value there comes from the cache,
and a second reverse scan composes the maps A -> a A + b: (decay, delta) for a kept token, the identity for a
masked one. Blocks begin at multiples of LINE tokens, so groups of GROUP tokens inside a sequence move in wide
accesses; only those at its ends take narrow ones. A sequence occupies one multiprocessor, block after block: few
very long ones are bound by the latency of a block, not by bytes.

For the moments in `shaped_gae` each program sums its advantages and their squares in fp64, where squares are exact
and nothing cancels that matters. The last program to finish, which a counter tells it, adds the programs' sums in a
fixed order: one launch, and the same bits whichever program that is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, configuration, launch
from .rows import KL_KINDS, kl_row

LINE = tl.constexpr(32)
GROUP = tl.constexpr(4)


@triton.jit
def sequence_span(cu_seqlens_ptr, sequence, length):
    """(base, start, stop) of a sequence: base a multiple of LINE, start and stop relative to it."""
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        stop = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    else:
        start = sequence * length
        stop = start + length
    base = start // LINE * LINE
    return base, (start - base).to(tl.int32), (stop - base).to(tl.int32)


@triton.jit
def tokens_of(offs_t, start, stop):
    """(tokens of the sequence, those in groups that it fills, the others of it)."""
    group = offs_t // GROUP * GROUP
    inside = (offs_t >= start) & (offs_t < stop)
    wide = (group >= start) & (group + GROUP <= stop)
    return inside, wide, inside & (wide == 0)


@triton.jit
def load_tokens(x_ptr, offs_t, wide, edge):
    x = tl.load(x_ptr + offs_t, mask=wide, other=0.0)
    return tl.load(x_ptr + offs_t, mask=edge, other=x).to(tl.float32)


@triton.jit
def store_tokens(x_ptr, offs_t, x, wide, edge):
    tl.store(x_ptr + offs_t, x, mask=wide)
    tl.store(x_ptr + offs_t, x, mask=edge)


@triton.jit
def smaller(x, y):
    return tl.minimum(x, y)


@triton.jit
def next_kept(mask_ptr, base, offs_t, start, stop, later):
    """(each token's next kept one, `stop` where there is none; the first kept one behind the block before).

    `later` is the first kept one behind this block and the token after it.
    """
    after = offs_t + 1
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + base + after, mask=(after >= start) & (after < stop), other=0) != 0
        after = tl.associative_scan(tl.where(kept, after, later), 0, smaller, reverse=True)
        later = tl.min(after, 0)
    return after, later


@triton.jit
def compose(a_late, b_late, a, b):
    """The map of a token after that of the tokens behind it."""
    return a * a_late, a * b_late + b


@triton.jit
def discounted(delta, decay, carry, BLOCK_T: tl.constexpr):
    """(A_t = delta_t + decay_t A_{t+1}, with `carry` behind the block's last; the first of them)."""
    a, b = tl.associative_scan((decay, delta), 0, compose, reverse=True)
    x = a * carry + b
    return x, tl.sum(tl.where(tl.arange(0, BLOCK_T) == 0, x, 0.0), 0)


@triton.jit
def merge_moments(parts_ptr, count_ptr, mean_ptr, m2_ptr, n_sequences, BLOCK_S: tl.constexpr):
    """The moments of all advantages from the sums of each sequence's."""
    count = tl.zeros((BLOCK_S,), tl.float64)
    total = tl.zeros((BLOCK_S,), tl.float64)
    squares = tl.zeros((BLOCK_S,), tl.float64)
    stride = n_sequences.to(tl.int64)
    for first in range(0, n_sequences, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        part, inside = parts_ptr + offs_s, offs_s < n_sequences
        # .cg: from the L2 cache, where the other programs' sums are
        count += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
        total += tl.load(part + stride, mask=inside, other=0.0, cache_modifier=".cg")
        squares += tl.load(part + 2 * stride, mask=inside, other=0.0, cache_modifier=".cg")
    n, sum_ = tl.sum(count, 0), tl.sum(total, 0)
    mean = sum_ / tl.maximum(n, 1.0)
    m2 = tl.sum(squares, 0) - sum_ * mean
    tl.store(count_ptr, n.to(tl.float32))
    tl.store(mean_ptr, mean.to(tl.float32))
    tl.store(m2_ptr, tl.where(m2 < 0, 0.0, m2).to(tl.float32))


@triton.jit(do_not_specialize=["length", "n_sequences"])
def gae_kernel(
    rewards_ptr,  # [N], written where KL_KIND is not 0
    values_ptr,  # [N]
    mask_ptr,  # [N] or None
    cu_seqlens_ptr,  # [S + 1], or None: sequences of `length`
    bootstrap_ptr,  # [S] or None
    advantages_ptr,  # [N]
    returns_ptr,  # [N]
    scores_ptr,  # [S]; this and what follows only where KL_KIND is not 0
    logprobs_ptr,  # [N]
    ref_logprobs_ptr,  # [N]
    kl_ptr,  # [N]
    parts_ptr,  # [3, S] fp64: number of advantages, their sum, the sum of their squares
    finished_ptr,  # programs that have finished, 0 at first
    count_ptr,
    mean_ptr,
    m2_ptr,
    gamma,
    decay,
    kl_coef,
    length,
    n_sequences,
    KL_KIND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    base, start, stop = sequence_span(cu_seqlens_ptr, sequence, length)
    bootstrap, score = 0.0, 0.0
    if bootstrap_ptr is not None:
        bootstrap = tl.load(bootstrap_ptr + sequence).to(tl.float32)
    if KL_KIND != 0:
        score = tl.load(scores_ptr + sequence).to(tl.float32)
        count = tl.zeros((), tl.int32)
        total = tl.zeros((), tl.float64)
        squares = tl.zeros((), tl.float64)
    carry, later = tl.zeros((), tl.float32), stop
    blocks = tl.where(start < stop, tl.cdiv(stop, BLOCK_T), 0)
    for done in range(blocks):
        offs_t = (blocks - 1 - done) * BLOCK_T + tl.arange(0, BLOCK_T)
        kept, wide, edge = tokens_of(offs_t, start, stop)
        if mask_ptr is not None:
            kept = load_tokens(mask_ptr + base, offs_t, wide, edge) != 0
        value = load_tokens(values_ptr + base, offs_t, wide, edge)
        after, later = next_kept(mask_ptr, base, offs_t, start, stop, later)
        if KL_KIND == 0:
            reward = load_tokens(rewards_ptr + base, offs_t, wide, edge)
        else:
            logprob = load_tokens(logprobs_ptr + base, offs_t, wide, edge)
            kl, _ = kl_row(logprob - load_tokens(ref_logprobs_ptr + base, offs_t, wide, edge), KL_KIND)
            reward = tl.where(after < stop, 0.0, score) - kl_coef * kl
            store_tokens(kl_ptr + base, offs_t, tl.where(kept, kl, 0.0), wide, edge)
            store_tokens(rewards_ptr + base, offs_t, tl.where(kept, reward, 0.0), wide, edge)
        next_value = tl.load(values_ptr + base + after, mask=kept & (after < stop), other=bootstrap).to(tl.float32)
        delta = tl.where(kept, reward + gamma * next_value - value, 0.0)
        advantage, carry = discounted(delta, tl.where(kept, decay, 1.0), carry, BLOCK_T)
        advantage = tl.where(kept, advantage, 0.0)
        store_tokens(advantages_ptr + base, offs_t, advantage, wide, edge)
        store_tokens(returns_ptr + base, offs_t, tl.where(kept, advantage + value, 0.0), wide, edge)
        if KL_KIND != 0:
            exact = advantage.to(tl.float64)
            count += tl.sum(kept.to(tl.int32), 0)
            total += tl.sum(exact, 0)
            squares += tl.sum(exact * exact, 0)
    if KL_KIND != 0:
        part, stride = parts_ptr + sequence, n_sequences.to(tl.int64)
        tl.store(part, count.to(tl.float64))
        tl.store(part + stride, total)
        tl.store(part + 2 * stride, squares)
        tl.debug_barrier()  # the sums are stored before the counter says so
        if tl.atomic_add(finished_ptr, 1, sem="acq_rel", scope="gpu") == n_sequences - 1:
            merge_moments(parts_ptr, count_ptr, mean_ptr, m2_ptr, n_sequences, BLOCK_S)


def _launch_gae(n_sequences: int, values: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """(advantages, returns)"""
    advantages, returns = (torch.empty_like(values, dtype=torch.float32) for _ in range(2))
    mean_length = cdiv(values.numel(), max(n_sequences, 1))
    shaped = arguments["KL_KIND"] != 0
    launch(
        gae_kernel,
        (n_sequences,),
        configuration("shaped_gae" if shaped else "gae", values.device, mean_length=mean_length),
        values_ptr=values,
        advantages_ptr=advantages,
        returns_ptr=returns,
        n_sequences=n_sequences,
        **arguments,
    )
    return advantages, returns


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap_values: Tensor | None,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), fp32, in the shape of the rewards; inputs contiguous, [B, T] or [N] with `cu_seqlens`."""
    return _launch_gae(
        rewards.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1,
        values,
        rewards_ptr=rewards,
        mask_ptr=mask,
        cu_seqlens_ptr=cu_seqlens,
        bootstrap_ptr=bootstrap_values,
        scores_ptr=None,
        logprobs_ptr=None,
        ref_logprobs_ptr=None,
        kl_ptr=None,
        parts_ptr=None,
        finished_ptr=None,
        count_ptr=None,
        mean_ptr=None,
        m2_ptr=None,
        gamma=gamma,
        decay=gamma * gae_lambda,
        kl_coef=0.0,
        length=rewards.shape[-1],
        KL_KIND=0,
    )


def shaped_gae(
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
    """(advantages [N], returns [N], rewards [N], kl [N], count, mean, m2), fp32; inputs contiguous."""
    n_sequences = scores.numel()
    rewards, kl = (torch.empty_like(values, dtype=torch.float32) for _ in range(2))
    parts = torch.empty(3, n_sequences, dtype=torch.float64, device=values.device)
    make = torch.empty if n_sequences else torch.zeros  # without a sequence no program runs
    count, mean, m2 = (make((), dtype=torch.float32, device=values.device) for _ in range(3))
    advantages, returns = _launch_gae(
        n_sequences,
        values,
        rewards_ptr=rewards,
        mask_ptr=mask,
        cu_seqlens_ptr=cu_seqlens,
        bootstrap_ptr=bootstrap_values,
        scores_ptr=scores,
        logprobs_ptr=logprobs,
        ref_logprobs_ptr=ref_logprobs,
        kl_ptr=kl,
        parts_ptr=parts,
        finished_ptr=torch.zeros(1, dtype=torch.int32, device=values.device),
        count_ptr=count,
        mean_ptr=mean,
        m2_ptr=m2,
        gamma=gamma,
        decay=gamma * gae_lambda,
        kl_coef=kl_coef,
        length=0,
        KL_KIND=KL_KINDS[kl_kind],
    )
    return advantages, returns, rewards, kl, count, mean, m2
