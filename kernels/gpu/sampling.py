"""`sample` in Triton; what is computed is in `kernels/sampling.py`.

First the logits are read once, in groups of GROUP neighbours: of each the largest logit and the sum of
exponentials are kept, raw and processed. Then one program per row finds the group its token falls into from
these, and reads that group again; with top-k or top-p it first finds where they end (`truncation.py`), reading
again only groups that reach there. A repetition penalty takes a bit per token, which the first launch sets.
"""

from __future__ import annotations

from ctypes import c_float
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, configuration, launch
from .softmax import LOG2_E
from .truncation import is_kept, key_of, read, truncate, weight_of

LARGEST_INVERSE = tl.constexpr(1e37)  # of a temperature: times log2(e) it is finite


@triton.jit
def mark_seen(seen_ptr, bits_ptr, length, first, vocab, TOKENS: tl.constexpr, BLOCK_L: tl.constexpr):
    """Writes the bits of a row's tokens `first` to `first + TOKENS - 1`, set where in seen [length]; what is outside
    the vocabulary there is padding. No other program touches these words."""
    offs_w = first // 32 + tl.arange(0, TOKENS // 32)
    tl.store(bits_ptr + offs_w, tl.zeros((TOKENS // 32,), tl.int32), mask=offs_w * 32 < vocab)
    tl.debug_barrier()
    last = tl.minimum(first + TOKENS, vocab)
    for start in range(0, length, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        token = tl.load(seen_ptr + offs_l, mask=offs_l < length, other=-1)
        bit = tl.full((BLOCK_L,), 1, tl.int32) << (token % 32).to(tl.int32)
        tl.atomic_or(bits_ptr + token // 32, bit, mask=(token >= first) & (token < last), sem="relaxed")
    tl.debug_barrier()


@triton.jit
def option(value, value_ptr, row, DTYPE: tl.constexpr):
    """A row's option: its element of the tensor where there is one, else the argument."""
    if value_ptr is not None:
        return tl.load(value_ptr + row).to(DTYPE)
    else:
        return tl.full((), value, DTYPE)


@triton.jit
def inverse_of(temperature):
    """1 / T; 1 for greedy rows."""
    return tl.minimum(1.0 / tl.where(temperature == 0, 1.0, temperature), LARGEST_INVERSE)


@triton.jit
def _sum_exp(x, m, scale):
    """Sum over a group of 2^((x - m) scale); 0 where m is -inf."""
    base = tl.where(m == float("-inf"), 0.0, m)
    return tl.sum(tl.exp2((x - base[:, None]) * scale), 1)


@triton.jit(do_not_specialize=["n_rows", "stride_seen", "length"])
def sample_groups(
    logits_ptr,  # [R, V]
    seen_ptr,  # [R, length] or None
    bits_ptr,  # [R, cdiv(V, 32)] int32, written where there is `seen`, else None
    temperature_ptr,  # [R] or None
    penalty_ptr,  # [R] or None
    groups_ptr,  # [2 to 4, R, n_groups]: m, s; processed s, m where they differ
    temperature,
    penalty,
    stride_row,
    stride_seen,
    length,
    vocab,
    n_groups,
    n_rows,
    TEMPERED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    if bits_ptr is not None:
        bits_ptr += index * ((vocab + 31) // 32)
    penalty = option(penalty, penalty_ptr, index, tl.float32)
    row = (logits_ptr + index * stride_row, bits_ptr, penalty, vocab)  # no function: Triton 3.6 cannot return a None
    if seen_ptr is not None:
        first = tl.program_id(1) * BLOCK_G * GROUP
        mark_seen(seen_ptr + index * stride_seen, row[1], length, first, vocab, BLOCK_G * GROUP, BLOCK_L)
    offs_g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    x, z, _ = read(row, offs_g, GROUP)
    out_ptr = groups_ptr + index * n_groups + offs_g
    stride = n_rows.to(tl.int64) * n_groups
    inside = offs_g < n_groups
    m = tl.max(x, 1)
    tl.store(out_ptr, m, mask=inside)
    tl.store(out_ptr + stride, _sum_exp(x, m, LOG2_E), mask=inside)
    if bits_ptr is not None:
        m = tl.max(z, 1)
        tl.store(out_ptr + 3 * stride, m, mask=inside)
    if TEMPERED or bits_ptr is not None:
        scale = inverse_of(option(temperature, temperature_ptr, index, tl.float32)) * LOG2_E
        tl.store(out_ptr + 2 * stride, _sum_exp(z, m, scale), mask=inside)


@triton.jit
def uniform(seeds_ptr, positions_ptr, row):
    """A row's random number in [0, 1), fp32."""
    return tl.rand(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))


@triton.jit
def pick(weights, goal):
    """The first index whose cumulative weight exceeds `goal`, among those of weight > 0; the last of these if none."""
    index = tl.arange(0, weights.shape[0])
    last = tl.max(tl.where(weights > 0, index, 0), 0)
    hit = (tl.cumsum(weights, 0) > goal) & (weights > 0)
    return tl.min(tl.where(hit, index, last), 0)


@triton.jit
def _draw_in_group(row, scale, border, group, goal, GROUP: tl.constexpr):
    """(token, its logit, its processed logit): the first kept one of the group where their mass exceeds `goal`."""
    x, z, ids = read(row, tl.full((1,), 0, tl.int32) + group, GROUP)
    x, z, ids = tl.reshape(x, (GROUP,)), tl.reshape(z, (GROUP,)), tl.reshape(ids, (GROUP,))
    kept = is_kept(key_of(z), ids, border) & (ids < row[3])
    place = pick(tl.where(kept, weight_of(z, scale), 0.0).to(tl.float64), goal)
    chosen = tl.arange(0, GROUP) == place
    return group * GROUP + place, tl.sum(tl.where(chosen, x, 0.0), 0), tl.sum(tl.where(chosen, z, 0.0), 0)


@triton.jit
def cut_of(top_k, top_p, top_p_rest, top_k_ptr, top_p_ptr, temperature, vocab, row):
    """(k, p) of a row: int32, 0 where all are kept, and fp64, 1 where they are; a greedy row keeps one."""
    k = option(top_k, top_k_ptr, row, tl.int64)
    p = option(top_p, top_p_ptr, row, tl.float64) + tl.full((), top_p_rest, tl.float64)
    greedy = temperature == 0
    k = tl.where(greedy, 1, tl.where((k > 0) & (k < vocab), k, 0))
    return k.to(tl.int32), tl.where(greedy, 1.0, p)


@triton.jit(do_not_specialize=["top_k", "n_rows"])
def sample_draw(
    logits_ptr,
    bits_ptr,
    temperature_ptr,
    top_k_ptr,  # [R] or None; int
    top_p_ptr,  # [R] or None
    penalty_ptr,
    groups_ptr,
    seeds_ptr,  # [R] int64
    positions_ptr,  # [R] int64
    list_ptr,  # [R, n_groups] int32; this and the next two for top-k and top-p only
    mass_ptr,  # [R, n_groups] fp32
    buffer_ptr,  # [R, CAPACITY] int32
    tokens_ptr,  # [R] int64
    logprobs_ptr,  # [R] fp32
    behavior_ptr,  # [R] fp32
    temperature,
    top_k,
    top_p,  # its fp32 part, and the rest
    top_p_rest,
    penalty,
    stride_row,
    vocab,
    n_groups,
    n_rows,
    TEMPERED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # power of two >= n_groups
    BLOCK_S: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Second launch: a token per row, and its log-probs."""
    index = tl.program_id(0).to(tl.int64)
    if bits_ptr is not None:
        bits_ptr += index * ((vocab + 31) // 32)
    penalty = option(penalty, penalty_ptr, index, tl.float32)
    row = (logits_ptr + index * stride_row, bits_ptr, penalty, vocab)  # no function: Triton 3.6 cannot return a None
    temperature = option(temperature, temperature_ptr, index, tl.float32)
    inverse = inverse_of(temperature)
    offs_g = tl.arange(0, GROUPS)
    inside = offs_g < n_groups
    groups_ptr += index * n_groups
    stride = n_rows.to(tl.int64) * n_groups
    m = tl.load(groups_ptr + offs_g, mask=inside, other=float("-inf"))
    s = tl.load(groups_ptr + stride + offs_g, mask=inside, other=0.0)
    raw_top = tl.max(m, 0)
    raw_total = tl.sum((s * weight_of(m, (raw_top, LOG2_E))).to(tl.float64), 0)
    if TEMPERED or bits_ptr is not None:
        s = tl.load(groups_ptr + 2 * stride + offs_g, mask=inside, other=0.0)
    if bits_ptr is not None:
        m = tl.load(groups_ptr + 3 * stride + offs_g, mask=inside, other=float("-inf"))
    scale = (tl.max(m, 0), inverse * LOG2_E)
    mass = s * weight_of(m, scale)
    u = uniform(seeds_ptr, positions_ptr, index).to(tl.float64)

    border = (tl.zeros((), tl.uint32), tl.full((), vocab, tl.int32))
    n_listed = tl.full((), n_groups, tl.int32)
    truncated = False
    if TOP_K or TOP_P:
        k, p = cut_of(top_k, top_p, top_p_rest, top_k_ptr, top_p_ptr, temperature, vocab, index)
        list_ptr += index * n_groups
        truncated = (k > 0) | (p < 1)
        if truncated:
            scratch = (list_ptr, mass_ptr + index * n_groups, buffer_ptr + index * CAPACITY)
            border, n_listed, mass = truncate(
                row, scale, m, mass, k, p, scratch, TOP_K, TOP_P, GROUP, BLOCK_S, CAPACITY
            )

    mass = mass.to(tl.float64)
    total = tl.sum(mass, 0)
    place = pick(mass, u * total)
    before = tl.sum(tl.where(offs_g < place, mass, 0.0), 0)
    group = place
    if list_ptr is not None:
        listed = tl.load(list_ptr + place, mask=truncated & (place < n_listed), other=0)
        group = tl.where(truncated, listed, place)
    token, x, z = _draw_in_group(row, scale, border, group, u * total - before, GROUP)
    tl.store(tokens_ptr + index, token.to(tl.int64))
    logprob = (x - raw_top) - tl.log(raw_total.to(tl.float32))
    tl.store(logprobs_ptr + index, logprob)
    if TEMPERED or TOP_K or TOP_P or bits_ptr is not None:
        broken = logprob != logprob  # by a logit that may lie where no token was kept
        logprob = tl.where(broken, logprob, (z - scale[0]) * inverse - tl.log(total.to(tl.float32)))
    tl.store(behavior_ptr + index, logprob)


def sample(
    logits: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    top_k: int,
    top_ks: Tensor | None,
    top_p: float,
    top_ps: Tensor | None,
    penalty: float,
    penalties: Tensor | None,
    seen: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [R] int64, logprobs [R] fp32, behavior log-probs [R] fp32).

    Each option is a number or, where given, a contiguous tensor [R]; `seen` [R, L] only where there is a penalty.
    """
    n_rows, vocab = logits.shape
    config = configuration("sample_groups", logits.device, vocab=vocab)
    n_groups = cdiv(vocab, config["GROUP"])
    new = partial(torch.empty, device=logits.device)
    tempered = temperatures is not None or temperature not in (0.0, 1.0)
    planes = 4 if seen is not None else 3 if tempered else 2
    common = {
        "logits_ptr": logits,
        "bits_ptr": None if seen is None else new(n_rows, cdiv(vocab, 32), dtype=torch.int32),
        "temperature_ptr": temperatures, "penalty_ptr": penalties,
        "groups_ptr": new(planes, n_rows, n_groups, dtype=torch.float32),
        "temperature": temperature, "penalty": penalty,
        "stride_row": logits.stride(0) if n_rows > 1 else vocab,  # that of a single row can be anything
        "vocab": vocab, "n_groups": n_groups, "n_rows": n_rows, "TEMPERED": tempered,
    }  # fmt: skip
    stride_seen, length = (0, 0) if seen is None else (seen.stride(0), seen.shape[1])
    grid = (n_rows, cdiv(n_groups, config["BLOCK_G"]))
    launch(sample_groups, grid, config, seen_ptr=seen, stride_seen=stride_seen, length=length, **common)

    common["GROUP"] = config["GROUP"]
    config = configuration("sample_draw", logits.device, vocab=vocab)
    cut_k = top_k > 0 or top_ks is not None or temperature == 0.0 or temperatures is not None
    cut_p = top_p < 1.0 or top_ps is not None
    shapes = [(n_groups, torch.int32), (n_groups, torch.float32), (config["CAPACITY"], torch.int32)]
    scratch = [new(n_rows, n, dtype=t) if cut_k or cut_p else None for n, t in shapes]
    near_p = c_float(top_p).value
    tokens, logprobs, behavior = (new(n_rows, dtype=t) for t in (torch.int64, torch.float32, torch.float32))
    launch(
        sample_draw, (n_rows,), config, top_k_ptr=top_ks, top_p_ptr=top_ps, seeds_ptr=seeds, positions_ptr=positions,
        list_ptr=scratch[0], mass_ptr=scratch[1], buffer_ptr=scratch[2],
        tokens_ptr=tokens, logprobs_ptr=logprobs, behavior_ptr=behavior,
        top_k=top_k, top_p=near_p, top_p_rest=top_p - near_p,
        TOP_K=cut_k, TOP_P=cut_p, GROUPS=1 << (n_groups - 1).bit_length(), **common,
    )  # fmt: skip
    return tokens, logprobs, behavior
