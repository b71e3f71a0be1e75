"""The sums that the programs of `ppo_loss.py` leave, and the launch of one program that makes losses and statistics
of them: in fp64, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import merge_moments

# Sums of a program: the first eight fields of PolicyStats and the terms; `value_tile`'s seven; the count.
PARTS = 17
RATIO, RATIO_MAX, ENTROPY, TERMS = (tl.constexpr(i) for i in (4, 5, 6, 8))
VALUE, COUNT = tl.constexpr(9), tl.constexpr(16)
# The statistics: PolicyStats, ValueStats, 1 / normalizer.
STATS = 18
INVERSE = tl.constexpr(17)


@triton.jit(do_not_specialize=["programs"])
def ppo_finish(
    parts_ptr,  # [PARTS, programs]
    normalizer_ptr,  # scalar or None
    loss_ptr,  # scalars
    policy_loss_ptr,
    value_loss_ptr,
    stats_ptr,  # [STATS]
    normalizer,
    programs,
    HAS_POLICY: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    TOKEN_MEAN: tl.constexpr,  # the normalizer is the count
    BLOCK_P: tl.constexpr,
):
    # Every load comes before the first reduction, which would hold it back.
    counts = field(parts_ptr, COUNT, programs, BLOCK_P)
    if HAS_POLICY:
        policy = fields(parts_ptr, programs, BLOCK_P)
        terms = field(parts_ptr, TERMS, programs, BLOCK_P)
    if HAS_VALUE:
        value = fields(parts_ptr + VALUE * programs, programs, BLOCK_P)
    count = tl.sum(counts, 0)
    share = 1.0 / tl.maximum(count, 1.0)
    inverse = share
    if normalizer_ptr is not None:
        inverse = 1.0 / tl.load(normalizer_ptr).to(tl.float64)
    elif not TOKEN_MEAN:
        inverse = 1.0 / tl.full((), normalizer, tl.float64)
    policy_loss, value_loss = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    if HAS_POLICY:
        policy_loss = tl.sum(terms, 0) * inverse
        for i in tl.static_range(TERMS):
            if i == RATIO_MAX:  # a maximum drops NaN, a sum does not
                largest, ratio = tl.max(policy[i], 0), tl.sum(policy[RATIO], 0)
                tl.store(stats_ptr + i, tl.where(ratio == ratio, largest, ratio))
            elif i == ENTROPY and not HAS_ENTROPY:
                tl.store(stats_ptr + i, float("nan"))
            else:
                tl.store(stats_ptr + i, tl.sum(policy[i], 0) * share)
        tl.store(stats_ptr + TERMS, count)
    if HAS_VALUE:
        value_loss = tl.sum(value[1], 0) * inverse
        _, return_mean, return_m2 = merge_moments(counts, value[3], value[4])
        _, error_mean, error_m2 = merge_moments(counts, value[5], value[6])
        some = return_m2 > 0
        tl.store(stats_ptr + VALUE, tl.sum(value[0], 0) * share)
        tl.store(stats_ptr + VALUE + 1, tl.where(some, 1.0 - error_m2 / tl.where(some, return_m2, 1.0), 0.0))
        tl.store(stats_ptr + VALUE + 2, tl.sum(value[2], 0) * share)
        tl.store(stats_ptr + VALUE + 3, return_mean)
        tl.store(stats_ptr + VALUE + 4, return_m2 * share)
        tl.store(stats_ptr + VALUE + 5, error_mean)
        tl.store(stats_ptr + VALUE + 6, error_m2 * share)
        tl.store(stats_ptr + VALUE + 7, count)
    tl.store(stats_ptr + INVERSE, inverse)
    tl.store(policy_loss_ptr, policy_loss)
    tl.store(value_loss_ptr, value_loss)
    tl.store(loss_ptr, policy_loss + value_loss)


@triton.jit
def field(parts_ptr, index, programs, BLOCK_P: tl.constexpr):
    """A sum of all programs in fp64, 0 where there is no program."""
    offs_p = tl.arange(0, BLOCK_P)
    return tl.load(parts_ptr + index * programs + offs_p, mask=offs_p < programs, other=0.0).to(tl.float64)


@triton.jit
def fields(parts_ptr, programs, BLOCK_P: tl.constexpr):
    """The first eight."""
    return (
        field(parts_ptr, 0, programs, BLOCK_P), field(parts_ptr, 1, programs, BLOCK_P),
        field(parts_ptr, 2, programs, BLOCK_P), field(parts_ptr, 3, programs, BLOCK_P),
        field(parts_ptr, 4, programs, BLOCK_P), field(parts_ptr, 5, programs, BLOCK_P),
        field(parts_ptr, 6, programs, BLOCK_P), field(parts_ptr, 7, programs, BLOCK_P),
    )  # fmt: skip
