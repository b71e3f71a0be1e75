"""Attention over a paged cache in Triton; the maths is in `kernels/paged_attention.py`.

A program has one key head and a tile of BLOCK_M rows: some query tokens of one sequence times the query heads that
share the key head (their number padded to GROUP_PAD, a power of two), so that a group reads its keys and values
once. It goes over the keys those tokens may see, BLOCK_N at a time, with the online softmax in fp32.

Which program has which tokens needs no lengths on the host. Where there are at most as many queries as sequences
(decode), a program takes a whole sequence. Else the tiles of sequence s start at number `cu_seqlens_q[s] // TOKENS + s`
of `Tq // TOKENS + S`: programs search for their sequence, and those behind its tiles have nothing to do.

Where programs are few, several share a tile's keys (SPLITS, known from shapes); `paged_attention_merge` then adds
their parts in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreting
from .launch import cdiv, configuration, launch, splits_of
from .rows import tanh
from .softmax import LOG2_E

MAX_SPLITS = 64
SPLIT_KEYS = tl.constexpr(256)  # no split has fewer, but the last


@triton.jit
def sequence_of(cu_seqlens_ptr, tile, n_sequences, TOKENS: tl.constexpr):
    """The sequence that a tile belongs to."""
    low, high = 0, n_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def key_span(first_position, last_position, window, split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """[start, stop): this split's part of the keys that any token of a tile may see."""
    start, stop = 0, last_position + 1
    if window is not None:
        start = tl.maximum(first_position - window + 1, 0)
    if SPLITS > 1:
        share = tl.maximum(tl.cdiv(tl.cdiv(stop - start, SPLITS), BLOCK_N) * BLOCK_N, SPLIT_KEYS)
        start += split * share
        stop = tl.minimum(start + share, stop)
    return start, stop


@triton.jit
def scores_of(q, k, scale, softcap, UPCAST: tl.constexpr):
    """Logits of the tile times log2(e), [BLOCK_M, BLOCK_N] fp32."""
    if UPCAST:
        q, k = q.to(tl.float32), k.to(tl.float32)
    z = tl.dot(q, tl.trans(k), input_precision="ieee")
    if softcap is None:
        z *= scale * LOG2_E
    else:
        z = tanh(z * (scale / softcap)) * (softcap * LOG2_E)
    return z


@triton.jit(do_not_specialize=["n_sequences", "n_queries", "stride_table"])
def paged_attention(
    q_ptr,  # [Tq, KV_HEADS * GROUP, DIM]
    k_pool_ptr,  # [blocks, BLOCK_SIZE, KV_HEADS, DIM]
    v_pool_ptr,
    block_table_ptr,  # [S, max_blocks]
    seq_lens_ptr,  # [S]
    cu_seqlens_ptr,  # [S + 1]
    out_ptr,  # [Tq, KV_HEADS * GROUP, DIM]
    parts_ptr,  # [SPLITS, Tq, KV_HEADS * GROUP, DIM] fp32: sums of p v; SPLITS > 1
    stats_ptr,  # [2, SPLITS, Tq, KV_HEADS * GROUP] fp32: largest logit, sum of p; SPLITS > 1
    scale,
    softcap,  # or None
    window,  # or None
    n_sequences,
    n_queries,
    stride_q_token,
    stride_q_head,
    stride_table,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // GROUP_PAD
    head, place, split = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS, tl.program_id(1)
    sequence, first = place, 0
    if not BY_SEQUENCE:
        sequence = sequence_of(cu_seqlens_ptr, place, n_sequences, TOKENS)
    begin = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    stop_token = end - begin
    if not BY_SEQUENCE:
        first = (place - (begin // TOKENS + sequence)) * TOKENS
        stop_token = tl.minimum(first + TOKENS, stop_token)
    before = tl.load(seq_lens_ptr + sequence) - (end - begin)  # tokens in the cache before the first query
    table_ptr = block_table_ptr + sequence.to(tl.int64) * stride_table
    rows, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    member = rows % GROUP_PAD
    column = head * GROUP + member
    for token in range(first, stop_token, TOKENS):
        offs_q = token + rows // GROUP_PAD
        inside = (offs_q < end - begin) & (member < GROUP)
        row = (begin + offs_q).to(tl.int64)
        q_place = row * stride_q_token + column.to(tl.int64) * stride_q_head
        whole = inside[:, None] & (offs_d < DIM)[None, :]
        q = tl.load(q_ptr + q_place[:, None] + offs_d[None, :], mask=whole, other=0.0)
        position = before + offs_q
        last = before + tl.minimum(token + TOKENS, end - begin) - 1
        start, stop = key_span(before + token, last, window, split, SPLITS, BLOCK_N)
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        s = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for key in range(start, stop, BLOCK_N):
            offs_t = key + tl.arange(0, BLOCK_N)
            cached = offs_t < stop
            block = tl.load(table_ptr + offs_t // BLOCK_SIZE, mask=cached, other=0).to(tl.int64)
            slot = (block * BLOCK_SIZE + offs_t % BLOCK_SIZE) * (KV_HEADS * DIM) + head * DIM
            kept = cached[:, None] & (offs_d < DIM)[None, :]
            k = tl.load(k_pool_ptr + slot[:, None] + offs_d[None, :], mask=kept, other=0.0).to(q.dtype)
            v = tl.load(v_pool_ptr + slot[:, None] + offs_d[None, :], mask=kept, other=0.0).to(q.dtype)
            visible = cached[None, :] & (offs_t[None, :] <= position[:, None])
            if window is not None:
                visible = visible & (offs_t[None, :] > position[:, None] - window)
            z = tl.where(visible, scores_of(q, k, scale, softcap, UPCAST), float("-inf"))
            top = tl.maximum(m, tl.max(z, 1))
            base = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2(z - base[:, None])
            fade = tl.exp2(m - base)
            s = s * fade + tl.sum(p, 1)
            if UPCAST:
                acc = acc * fade[:, None] + tl.dot(p, v.to(tl.float32), input_precision="ieee")
            else:
                acc = tl.dot(p.to(q.dtype), v, acc * fade[:, None], input_precision="ieee")
            m = top
        place_out = row * (KV_HEADS * GROUP) + column
        if SPLITS == 1:
            out = acc / tl.where(s == 0, 1.0, s)[:, None]
            tl.store(out_ptr + place_out[:, None] * DIM + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=whole)
        else:
            size = n_queries.to(tl.int64) * (KV_HEADS * GROUP)
            place_out += split * size
            tl.store(stats_ptr + place_out, m, mask=inside)
            tl.store(stats_ptr + SPLITS * size + place_out, s, mask=inside)
            if start < stop:
                tl.store(parts_ptr + place_out[:, None] * DIM + offs_d[None, :], acc, mask=whole)


@triton.jit(do_not_specialize=["n_rows"])
def paged_attention_merge(
    parts_ptr,  # [SPLITS, rows, DIM]
    stats_ptr,  # [2, SPLITS, rows]
    out_ptr,  # [rows, DIM]
    n_rows,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The result of a query and head from what the splits of its keys left; a split without keys left no sums."""
    row, offs_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    part = tl.arange(0, SPLITS) * n_rows.to(tl.int64) + row
    m = tl.load(stats_ptr + part)
    s = tl.load(stats_ptr + SPLITS * n_rows.to(tl.int64) + part)
    top = tl.max(m, 0)
    weight = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top))
    used = (m > float("-inf"))[:, None] & (offs_d < DIM)[None, :]
    acc = tl.load(parts_ptr + part[:, None] * DIM + offs_d[None, :], mask=used, other=0.0)
    total = tl.sum(weight * s, 0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * DIM + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < DIM)


def attend(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[Tq, Hq, D] in the dtype of q, whose last dimension is contiguous, as are all other arguments."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    n_queries, n_heads, dim = q.shape
    n_sequences, kv_heads, group = seq_lens.numel(), k_pool.shape[2], n_heads // k_pool.shape[2]
    by_sequence, group_pad = n_queries <= n_sequences, triton.next_power_of_2(group)
    config = _tile(q, k_pool, cdiv(n_queries, max(n_sequences, 1)) * group_pad)
    config["BLOCK_M"] = max(config["BLOCK_M"], group_pad)
    places = n_sequences if by_sequence else n_queries // (config["BLOCK_M"] // group_pad) + n_sequences
    splits = _splits(places * kv_heads, block_table.shape[1] * k_pool.shape[1], window, q.device)
    parts = None if splits == 1 else q.new_empty(splits, *q.shape, dtype=torch.float32)
    stats = None if splits == 1 else q.new_empty(2, splits, n_queries, n_heads, dtype=torch.float32)
    launch(
        paged_attention,
        (places * kv_heads, splits),
        config,
        q_ptr=q,
        k_pool_ptr=k_pool,
        v_pool_ptr=v_pool,
        block_table_ptr=block_table,
        seq_lens_ptr=seq_lens,
        cu_seqlens_ptr=cu_seqlens_q,
        out_ptr=out,
        parts_ptr=parts,
        stats_ptr=stats,
        scale=scale,
        softcap=softcap,
        window=window,
        n_sequences=n_sequences,
        n_queries=n_queries,
        stride_q_token=q.stride(0),
        stride_q_head=q.stride(1),
        stride_table=block_table.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_PAD=group_pad,
        DIM=dim,
        BLOCK_SIZE=k_pool.shape[1],
        BY_SEQUENCE=by_sequence,
        SPLITS=splits,
        UPCAST=interpreting() and q.dtype == torch.bfloat16,
        BLOCK_D=_padded(dim),
    )
    if parts is not None:
        _merge(parts, stats, out)
    return out


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _tile(q: Tensor, k_pool: Tensor, rows: int) -> dict[str, int]:
    """The configuration for sequences of so many query rows (tokens times heads of a group)."""
    size = max(q.element_size(), k_pool.element_size())
    return configuration(
        "paged_attention", q.device, rows=rows, row_bytes=_padded(q.shape[2]) * size, element_bytes=size
    )


def _splits(programs: int, capacity: int, window: int | None, device: torch.device) -> int:
    """Programs that share the keys of a tile; `capacity` is the most keys that the block table can name."""
    keys = capacity if window is None else min(capacity, window)
    return min(MAX_SPLITS, splits_of(programs, keys, SPLIT_KEYS.value, device))


def _merge(parts: Tensor, stats: Tensor | None, out: Tensor) -> None:
    splits, n_queries, n_heads, dim = parts.shape
    launch(
        paged_attention_merge,
        (n_queries * n_heads,),
        configuration("paged_attention_merge", out.device),
        parts_ptr=parts,
        stats_ptr=stats,
        out_ptr=out,
        n_rows=n_queries * n_heads,
        DIM=dim,
        SPLITS=splits,
        BLOCK_D=_padded(dim),
    )
