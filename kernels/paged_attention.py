"""Attention of ragged queries over a paged cache: decode and chunked prefill.

Query j of sequence s (of q_len queries) sits at position `i = seq_lens[s] - q_len + j` and sees the keys at positions
`max(0, i - window + 1) .. i`:

    z_t = scale * q . k_t          z_t = softcap * tanh(z_t / softcap) with a softcap          out = sum_t softmax(z)_t v_t

Position t of sequence s lies in `pool[block_table[s, t // block_size], t % block_size]`. Query heads share key and value
heads in groups of Hq / Hkv. Slots that hold no visible token may hold anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def paged_attention_ref(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`paged_attention` in float64, one query at a time."""
    block_size, group = k_pool.shape[1], q.shape[1] // k_pool.shape[2]
    out = torch.zeros_like(q, dtype=torch.float64)
    bounds = cu_seqlens_q.tolist()
    for s, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        for j in range(start, stop):
            last = int(seq_lens[s]) - (stop - start) + (j - start)
            first = 0 if window is None else max(0, last - window + 1)
            t = torch.arange(first, last + 1, device=q.device)
            blocks = block_table[s].long()[t // block_size]
            k = k_pool[blocks, t % block_size].double().repeat_interleave(group, 1)  # [t, Hq, D]
            v = v_pool[blocks, t % block_size].double().repeat_interleave(group, 1)
            z = scale * torch.einsum("hd,thd->ht", q[j].double(), k)
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            out[j] = torch.einsum("ht,thd->hd", z.softmax(-1), v)
    return out


def gather_blocks(pool: Tensor, table: Tensor, valid: Tensor) -> Tensor:
    """[S, L, Hkv, D]: the cached rows of each sequence, 0 where not `valid` [S, L] (0 * NaN would be NaN)."""
    n_blocks = pool.shape[0]
    rows = pool[table.clamp(0, max(n_blocks - 1, 0))].flatten(1, 2)[:, : valid.shape[1]]
    return torch.where(valid[:, :, None, None], rows, 0.0)


def visible_keys(positions: Tensor, length: int, window: int | None) -> Tensor:
    """[..., length] bool: the keys that a query at each position sees."""
    t = torch.arange(length, device=positions.device)
    visible = t <= positions[..., None]
    return visible if window is None else visible & (t > positions[..., None] - window)


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float, softcap: float | None
) -> Tensor:
    """q [S, Q, Hq, D], k and v [S, L, Hkv, D], visible [S, Q, L] -> [S, Q, Hq, D]."""
    n_seqs, n_queries, n_heads, dim = q.shape
    n_kv = k.shape[2]
    if softcap is None and n_queries > 1:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=visible[:, None],
            scale=scale,
            enable_gqa=n_kv != n_heads,
        )
        return out.transpose(1, 2)
    grouped = q.view(n_seqs, n_queries, n_kv, n_heads // n_kv, dim).permute(0, 2, 3, 1, 4)  # [S, Hkv, G, Q, D]
    grouped = grouped.reshape(n_seqs, n_kv, -1, dim)
    z = (grouped @ k.permute(0, 2, 3, 1)).mul_(scale).view(n_seqs, n_kv, -1, n_queries, k.shape[1])
    if softcap is not None:
        z = z.div_(softcap).tanh_().mul_(softcap)
    p = z.masked_fill_(~visible[:, None, None], -torch.inf).softmax(-1)
    out = p.view(n_seqs, n_kv, -1, k.shape[1]) @ v.transpose(1, 2)
    out = out.view(n_seqs, n_kv, -1, n_queries, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(n_seqs, n_queries, n_heads, dim)


def _attend(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    table: Tensor,
    seq_lens: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """q [S, Q, Hq, D], the last Q positions of each sequence."""
    block_size, n_queries = k_pool.shape[1], q.shape[1]
    table = table[:, : -(-longest // block_size)].long()
    lengths = seq_lens.long()[:, None]
    positions = lengths - n_queries + torch.arange(n_queries, device=q.device)
    visible = visible_keys(positions, longest, window)
    valid = torch.arange(longest, device=q.device) < lengths
    k, v = (gather_blocks(pool, table, valid).to(q.dtype) for pool in (k_pool, v_pool))
    return grouped_attention(q, k, v, visible, scale=scale, softcap=softcap)


@torch.no_grad()
def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention over a paged cache, formulas in the module's docstring. No gradient flows.

    Args:
        q: [Tq, Hq, D], the queries of all sequences one after another.
        k_pool, v_pool: [num_blocks, block_size, Hkv, D]; the current tokens' keys and values are in them already.
        block_table: [S, max_blocks] int32; entries beyond a sequence's blocks may be anything.
        seq_lens: [S] int32, tokens in the cache, the current ones included.
        cu_seqlens_q: [S+1] int32, boundaries of the queries; a sequence may have none.
        scale: factor of q . k.
        window: each query sees the last `window` keys, its own included; None sees all.
        softcap: as in the module's docstring.

    Returns:
        [Tq, Hq, D] in the dtype of q.

    Raises:
        ValueError: shapes that do not fit, more queries than cached tokens, or a table too short.
    """
    _check(q, k_pool, v_pool, block_table, seq_lens, cu_seqlens_q)
    lengths, bounds = seq_lens.tolist(), cu_seqlens_q.tolist()
    _check_lengths(lengths, bounds, block_table.shape[1] * k_pool.shape[1], q.shape[0])
    options = {"scale": scale, "window": window, "softcap": softcap}
    if not q.shape[0]:
        return q.clone()
    if bounds == list(range(len(bounds))):
        return _attend(q[:, None], k_pool, v_pool, block_table, seq_lens, max(lengths), **options)[:, 0]
    out = torch.empty_like(q)
    for s, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if stop > start:
            one, length = slice(s, s + 1), lengths[s]
            rows = _attend(q[None, start:stop], k_pool, v_pool, block_table[one], seq_lens[one], length, **options)
            out[start:stop] = rows[0]
    return out


def _check(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor
) -> None:
    if q.dim() != 3 or k_pool.dim() != 4 or k_pool.shape != v_pool.shape or q.shape[2] != k_pool.shape[3]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k_pool, v_pool))
        raise ValueError(f"need q [Tq, Hq, D] and pools [blocks, block_size, Hkv, D], got {shapes}")
    if q.shape[1] % k_pool.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads do not divide into {k_pool.shape[2]} key heads")
    n_seqs = seq_lens.numel()
    if block_table.dim() != 2 or block_table.shape[0] != n_seqs or cu_seqlens_q.shape != (n_seqs + 1,):
        shapes = ", ".join(str(tuple(t.shape)) for t in (block_table, seq_lens, cu_seqlens_q))
        raise ValueError(f"need block_table [S, blocks], seq_lens [S], cu_seqlens_q [S+1], got {shapes}")


def _check_lengths(lengths: list[int], bounds: list[int], capacity: int, n_queries: int) -> None:
    if bounds[-1] != n_queries:
        raise ValueError(f"cu_seqlens_q ends at {bounds[-1]}, there are {n_queries} queries")
    for s, length in enumerate(lengths):
        if not bounds[s + 1] - bounds[s] <= length <= capacity:
            queries = bounds[s + 1] - bounds[s]
            raise ValueError(f"sequence {s}: {queries} queries, {length} cached tokens, room for {capacity}")
