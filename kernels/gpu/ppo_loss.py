"""The PPO losses in Triton; the maths is in `kernels/ppo_terms.py`, the statistics in `kernels/ppo_stats.py`.

One launch reads every per-token input once. It writes the gradients as they are before the normalizer and the
upstream gradient, which need not be known yet, and each program's sums; one more program adds these in fp64, in a
fixed order. The backward multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ppo_terms import RowNumbers
from .launch import cdiv, configuration, launch, multiprocessors
from .ppo_finish import COUNT, INVERSE, PARTS, RATIO_MAX, STATS, TERMS, VALUE, ppo_finish
from .rows import KL_KINDS, exp_minus_linear, policy_row, value_row
from .tiles import add_moments, kept_tokens, load_kept, load_tile, merge_moments, store_tile, tile_offsets

PROGRAMS = 2  # per multiprocessor


@triton.jit
def lane_sum(x):
    return tl.sum(x, 1)


@triton.jit
def lane_count(x):
    return tl.sum(tl.where(x, 1.0, 0.0), 1)


@triton.jit
def load_policy(
    logprobs_ptr, old_logprobs_ptr, advantages_ptr, importance_ptr, entropy_ptr, ref_logprobs_ptr, mean_ptr, rstd_ptr,
    start, offs_n, inside, kept, KL_KIND: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The first arguments of `policy_row` for a tile."""
    logprob = load_kept(logprobs_ptr + start, offs_n, inside, kept, WHOLE)
    old_logprob = load_kept(old_logprobs_ptr + start, offs_n, inside, kept, WHOLE)
    advantage = load_tile(advantages_ptr + start, offs_n, inside, WHOLE).to(tl.float32)
    if mean_ptr is not None:
        advantage = (advantage - tl.load(mean_ptr).to(tl.float32)) * tl.load(rstd_ptr).to(tl.float32)
    advantage = tl.where(kept, advantage, 0.0)
    importance, entropy, ref_logprob = 1.0, tl.zeros_like(advantage), 0.0
    if importance_ptr is not None:
        importance = load_kept(importance_ptr + start, offs_n, inside, kept, WHOLE)
    if entropy_ptr is not None:
        entropy = load_kept(entropy_ptr + start, offs_n, inside, kept, WHOLE)
    if KL_KIND != 0:
        ref_logprob = load_kept(ref_logprobs_ptr + start, offs_n, inside, kept, WHOLE)
    return logprob, old_logprob, advantage, importance, entropy, ref_logprob


@triton.jit
def policy_tile(
    sums, tokens, dlogprobs_ptr, dentropy_ptr, start, offs_n, inside, kept, weight,
    lower, upper, dual, log_ratio_clamp, entropy_coef, entropy_bound, kl_coef,
    BONUS: tl.constexpr, KL_KIND: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a tile's tokens; returns the sums per lane with theirs added."""
    logprob, old_logprob, advantage, importance, entropy, ref_logprob = tokens
    term, ratio, slope, entropy_slope, low, high, held = policy_row(
        logprob, old_logprob, advantage, importance, entropy, ref_logprob, lower, upper, dual, log_ratio_clamp,
        entropy_coef, entropy_bound, kl_coef, BONUS, KL_KIND,
    )  # fmt: skip
    if dlogprobs_ptr is not None:
        store_tile(dlogprobs_ptr + start, offs_n, tl.where(kept, slope * weight, 0.0), inside, WHOLE)
    if dentropy_ptr is not None:
        store_tile(dentropy_ptr + start, offs_n, tl.where(kept, entropy_slope * weight, 0.0), inside, WHOLE)
    ratio = tl.where(kept, ratio, 0.0)
    active = (advantage != 0) & ((low | high | held) == 0)
    return (
        sums[0] + lane_count(low | high),
        sums[1] + lane_count(low),
        sums[2] + lane_count(held),
        sums[3] + lane_sum(exp_minus_linear(logprob - old_logprob)),
        sums[4] + lane_sum(ratio),
        tl.maximum(sums[5], tl.max(ratio, 1)),
        sums[6] + lane_sum(entropy),
        sums[7] + lane_count(active),
        sums[8] + lane_sum(term * weight),
    )


@triton.jit
def load_value(values_ptr, old_values_ptr, returns_ptr, start, offs_n, inside, kept, WHOLE: tl.constexpr):
    """The first arguments of `value_row` for a tile."""
    value = load_kept(values_ptr + start, offs_n, inside, kept, WHOLE)
    old_value = load_kept(old_values_ptr + start, offs_n, inside, kept, WHOLE)
    return value, old_value, load_kept(returns_ptr + start, offs_n, inside, kept, WHOLE)


@triton.jit
def value_tile(
    sums, count, tokens, dvalues_ptr, start, offs_n, inside, kept, weight,
    value_clip, value_coef, CLIP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of a tile's tokens; returns the sums per lane with theirs added: clipped tokens, terms,
    values, and (mean, m2) of the returns and of the errors; `count` tokens are in them already."""
    value, old_value, target = tokens
    term, slope, clipped = value_row(value, old_value, target, value_clip, value_coef, CLIP)
    if dvalues_ptr is not None:
        store_tile(dvalues_ptr + start, offs_n, slope * weight, inside, WHOLE)
    return_mean, return_m2 = add_moments(count, sums[3], sums[4], target, kept)
    error_mean, error_m2 = add_moments(count, sums[5], sums[6], target - value, kept)
    return (
        sums[0] + lane_count(clipped),
        sums[1] + lane_sum(term * weight),
        sums[2] + lane_sum(value),
        return_mean,
        return_m2,
        error_mean,
        error_m2,
    )


@triton.jit(do_not_specialize=["n_tokens"])
def ppo_forward(
    logprobs_ptr,  # [N]; None without a policy loss
    old_logprobs_ptr,  # [N]
    advantages_ptr,  # [N]
    importance_ptr,  # [N] or None
    entropy_ptr,  # [N] or None
    ref_logprobs_ptr,  # [N] or None
    mean_ptr,  # scalar or None: A = (advantages - mean) * rstd
    rstd_ptr,
    values_ptr,  # [N]; None without a value loss
    old_values_ptr,  # [N]
    returns_ptr,  # [N]
    mask_ptr,  # [N] or None
    weights_ptr,  # [N], of the terms; None is 1
    dlogprobs_ptr,  # [N], as the next two; None where it is not wanted
    dentropy_ptr,
    dvalues_ptr,
    parts_ptr,  # [PARTS, programs]
    lower,
    upper,
    dual,
    log_ratio_clamp,
    entropy_coef,
    entropy_bound,
    kl_coef,
    value_clip,
    value_coef,
    n_tokens,
    BONUS: tl.constexpr,  # entropy_coef is not 0
    KL_KIND: tl.constexpr,  # 0: no KL term
    VALUE_CLIP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    offs_n = tile_offsets(BLOCK_N)
    zero = tl.sum(offs_n * 0.0, 1)
    count = zero
    policy = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    value = (zero, zero, zero, zero, zero, zero, zero)
    whole = n_tokens // BLOCK_N
    for part in tl.static_range(2):  # whole tiles in turn, then what is left
        first, last = program, whole
        if part == 1:
            first, last = tl.where(program == whole % programs, whole, whole + 1), tl.cdiv(n_tokens, BLOCK_N)
        for tile in range(first, last, programs):
            start = tile * BLOCK_N
            inside = offs_n < n_tokens - start
            kept = kept_tokens(mask_ptr, start, offs_n, inside, part == 0)
            weight = 1.0
            if weights_ptr is not None:
                weight = load_kept(weights_ptr + start, offs_n, inside, kept, part == 0)
            if logprobs_ptr is not None:
                policy_tokens = load_policy(
                    logprobs_ptr, old_logprobs_ptr, advantages_ptr, importance_ptr, entropy_ptr, ref_logprobs_ptr,
                    mean_ptr, rstd_ptr, start, offs_n, inside, kept, KL_KIND, part == 0,
                )  # fmt: skip
            if values_ptr is not None:
                value_tokens = load_value(
                    values_ptr, old_values_ptr, returns_ptr, start, offs_n, inside, kept, part == 0
                )
            if logprobs_ptr is not None:
                policy = policy_tile(
                    policy, policy_tokens, dlogprobs_ptr, dentropy_ptr, start, offs_n, inside, kept, weight,
                    lower, upper, dual, log_ratio_clamp, entropy_coef, entropy_bound, kl_coef,
                    BONUS, KL_KIND, part == 0,
                )  # fmt: skip
            if values_ptr is not None:
                value = value_tile(
                    value, count, value_tokens, dvalues_ptr, start, offs_n, inside, kept, weight,
                    value_clip, value_coef, VALUE_CLIP, part == 0,
                )  # fmt: skip
            count += lane_count(kept)
    parts_ptr += program
    if logprobs_ptr is not None:
        for i in tl.static_range(TERMS + 1):
            total = tl.max(policy[i], 0) if i == RATIO_MAX else tl.sum(policy[i], 0)
            tl.store(parts_ptr + i * programs, total)
    if values_ptr is not None:
        for i in tl.static_range(3):
            tl.store(parts_ptr + (VALUE + i) * programs, tl.sum(value[i], 0))
        for i in tl.static_range(3, 7, 2):
            _, mean, m2 = merge_moments(count, value[i], value[i + 1])
            tl.store(parts_ptr + (VALUE + i) * programs, mean)
            tl.store(parts_ptr + (VALUE + i + 1) * programs, m2)
    tl.store(parts_ptr + COUNT * programs, tl.sum(count, 0))


@triton.jit(do_not_specialize=["n_tokens"])
def ppo_backward(
    dlogprobs_ptr,  # [N], as the next two: gradients of the forward, None where they are not wanted
    dentropy_ptr,
    dvalues_ptr,
    stats_ptr,  # [STATS]
    upstream_ptr,  # dL/dloss, as the next two: a scalar, None is 0
    policy_upstream_ptr,
    value_upstream_ptr,
    out_logprobs_ptr,  # [N], as the next two
    out_entropy_ptr,
    out_values_ptr,
    n_tokens,
    BLOCK_N: tl.constexpr,
):
    policy_scale, value_scale = 0.0, 0.0
    if upstream_ptr is not None:
        policy_scale += tl.load(upstream_ptr)
        value_scale += tl.load(upstream_ptr)
    if policy_upstream_ptr is not None:
        policy_scale += tl.load(policy_upstream_ptr)
    if value_upstream_ptr is not None:
        value_scale += tl.load(value_upstream_ptr)
    inverse = tl.load(stats_ptr + INVERSE)
    policy_scale *= inverse
    value_scale *= inverse
    offs_n = tile_offsets(BLOCK_N)
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    inside = offs_n < n_tokens - start
    if start + BLOCK_N <= n_tokens:
        scale_tile(dlogprobs_ptr, out_logprobs_ptr, policy_scale, start, offs_n, inside, True)
        scale_tile(dentropy_ptr, out_entropy_ptr, policy_scale, start, offs_n, inside, True)
        scale_tile(dvalues_ptr, out_values_ptr, value_scale, start, offs_n, inside, True)
    else:
        scale_tile(dlogprobs_ptr, out_logprobs_ptr, policy_scale, start, offs_n, inside, False)
        scale_tile(dentropy_ptr, out_entropy_ptr, policy_scale, start, offs_n, inside, False)
        scale_tile(dvalues_ptr, out_values_ptr, value_scale, start, offs_n, inside, False)


@triton.jit
def scale_tile(x_ptr, out_ptr, scale, start, offs_n, inside, WHOLE: tl.constexpr):
    if x_ptr is not None:
        store_tile(out_ptr + start, offs_n, load_tile(x_ptr + start, offs_n, inside, WHOLE) * scale, inside, WHOLE)


def forward(
    policy: Sequence[Tensor | None],
    value: Sequence[Tensor],
    mask: Tensor | None,
    weights: Tensor | None,
    normalizer: float | None,
    normalizer_tensor: Tensor | None,
    numbers: Sequence[float],
    kl_kind: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, policy_loss, value_loss, stats [STATS], dlogprobs, dentropy, dvalues), fp32; arguments and results as
    of `ppomax::ppo_loss_forward`."""
    logprobs, old_logprobs, advantages, importance, entropy, ref_logprobs, mean, rstd = policy or (None,) * 8
    values, old_values, returns = value or (None,) * 3
    like = values if logprobs is None else logprobs
    assert like is not None
    row = RowNumbers(*numbers)
    config, finish = (configuration(name, like.device) for name in ("ppo_forward", "ppo_finish"))
    programs = min(cdiv(like.numel(), config["BLOCK_N"]), PROGRAMS * multiprocessors(like.device), finish["BLOCK_P"])
    loss, policy_loss, value_loss = (_empty(like) for _ in range(3))
    stats, parts = _empty(like, STATS), _empty(like, PARTS, programs)
    grads = [_empty(like, like.numel() if wanted else 0) for wanted in wants]
    given = [g if wanted else None for g, wanted in zip(grads, wants, strict=True)]
    launch(
        ppo_forward,
        (programs,),
        config,
        logprobs_ptr=logprobs,
        old_logprobs_ptr=old_logprobs,
        advantages_ptr=advantages,
        importance_ptr=importance,
        entropy_ptr=entropy,
        ref_logprobs_ptr=ref_logprobs,
        mean_ptr=mean,
        rstd_ptr=rstd,
        values_ptr=values,
        old_values_ptr=old_values,
        returns_ptr=returns,
        mask_ptr=mask,
        weights_ptr=weights,
        dlogprobs_ptr=given[0],
        dentropy_ptr=given[1],
        dvalues_ptr=given[2],
        parts_ptr=parts,
        n_tokens=like.numel(),
        BONUS=row.entropy_coef != 0.0,
        KL_KIND=KL_KINDS[kl_kind] if row.kl_coef != 0.0 else 0,
        VALUE_CLIP=row.value_clip != math.inf,
        **row._asdict(),
    )
    launch(
        ppo_finish,
        (1,),
        finish,
        parts_ptr=parts,
        normalizer_ptr=normalizer_tensor,
        loss_ptr=loss,
        policy_loss_ptr=policy_loss,
        value_loss_ptr=value_loss,
        stats_ptr=stats,
        normalizer=1.0 if normalizer is None else normalizer,
        programs=programs,
        HAS_POLICY=logprobs is not None,
        HAS_VALUE=values is not None,
        HAS_ENTROPY=entropy is not None,
        TOKEN_MEAN=normalizer is None,
    )
    return loss, policy_loss, value_loss, stats, grads[0], grads[1], grads[2]


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def backward(grads: Sequence[Tensor | None], stats: Tensor, upstream: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients that are given, times those of (loss, policy_loss, value_loss); without elements where not."""
    out = [stats.new_empty(0) if g is None else torch.empty_like(g) for g in grads]
    n_tokens = max(x.numel() for x in out)
    config = configuration("ppo_backward", stats.device)
    launch(
        ppo_backward,
        (cdiv(n_tokens, config["BLOCK_N"]),),
        config,
        dlogprobs_ptr=grads[0],
        dentropy_ptr=grads[1],
        dvalues_ptr=grads[2],
        stats_ptr=stats,
        upstream_ptr=upstream[0],
        policy_upstream_ptr=upstream[1],
        value_upstream_ptr=upstream[2],
        out_logprobs_ptr=out[0],
        out_entropy_ptr=out[1],
        out_values_ptr=out[2],
        n_tokens=n_tokens,
    )
    return out
