"""Attention of ragged queries over a paged cache: decode and chunked prefill.

Query j of sequence s (of q_len queries) sits at position `i = seq_lens[s] - q_len + j` and sees the keys at
positions `max(0, i - window + 1) .. i`:

    z_t = scale * q . k_t          (z_t = softcap * tanh(z_t / softcap) with a softcap)
    out = sum_t softmax(z)_t v_t

Position t of sequence s lies in `pool[block_table[s, t // block_size], t % block_size]`. Query heads share
key and value heads in groups of Hq / Hkv. Slots that hold no visible token may hold anything.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import traced, uses_triton
from .matmul import full_precision

_SMALL_CACHE = 1 << 13  # padded positions below which sequences of all lengths are taken together


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
    for s, (start, stop) in enumerate(pairwise(bounds)):
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


def key_positions(seq_lens: Tensor, n_queries: int, longest: int, window: int | None) -> Tensor:
    """[S, L] int64: the positions the last `n_queries` of each sequence may see, all up to `longest` or what
    the window spans."""
    t = torch.arange(longest if window is None else min(longest, window + n_queries - 1), device=seq_lens.device)
    if window is None:
        return t.expand(seq_lens.numel(), -1)
    return t + (seq_lens.long() - n_queries - window + 1).clamp(min=0)[:, None]


def visible_keys(seq_lens: Tensor, n_queries: int, keys: Tensor, window: int | None) -> Tensor:
    """[S, Q, L] bool: which of the positions `keys` [S, L] each of a sequence's last Q positions sees."""
    queries = torch.arange(n_queries, device=seq_lens.device) - n_queries
    positions = (seq_lens.long()[:, None] + queries)[:, :, None]
    keys = keys[:, None]
    return keys <= positions if window is None else (keys <= positions) & (keys > positions - window)


def slots_of(block_table: Tensor, block_size: int, seq_lens: Tensor, keys: Tensor) -> Tensor:
    """[S, L] int64: where the positions `keys` lie in the flattened pool. Positions past a sequence's end repeat
    its last token: what they hold is masked later, but it must be a number (0 * NaN would be NaN)."""
    t = torch.minimum(keys, (seq_lens.long() - 1)[:, None])
    return block_table.long().gather(1, t // block_size) * block_size + t % block_size


def gather_rows(pool: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """[S, Hkv, L, D] view of the cached rows at `slots` [S, L]."""
    n_kv, dim = pool.shape[2:]
    rows = pool.view(-1, n_kv * dim).index_select(0, slots.flatten())
    return rows.view(*slots.shape, n_kv, dim).transpose(1, 2).to(dtype)


@full_precision
def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float, softcap: float | None
) -> Tensor:
    """q [S, Q, Hq, D], k and v [S, Hkv, L, D], visible [S, Q, L] -> [S, Q, Hq, D].

    The query heads of a group are further queries of their key head, so that K and V are read once and never
    repeated.
    """
    n_seqs, n_queries, n_heads, dim = q.shape
    n_kv = k.shape[1]
    group = n_heads // n_kv
    grouped = q.view(n_seqs, n_queries, n_kv, group, dim).permute(0, 2, 3, 1, 4).reshape(n_seqs, n_kv, -1, dim)
    mask = visible[:, None] if n_queries == 1 else visible.repeat(1, group, 1)[:, None]  # [S, 1, G * Q, L]
    if softcap is None:
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    else:
        out = torch.cat([_capped_head(grouped, k, v, mask, h, scale, softcap) for h in range(n_kv)], 1)
    out = out.view(n_seqs, n_kv, group, n_queries, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(n_seqs, n_queries, n_heads, dim)


def _capped_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, head: int, scale: float, softcap: float) -> Tensor:
    """Attention with a softcap of one key head, [S, 1, G * Q, D]."""
    z = torch.bmm(q[:, head], k[:, head].transpose(1, 2)).mul_(scale / softcap).tanh_().mul_(softcap)
    p = z.masked_fill_(~mask[:, 0], -torch.inf).softmax(-1)
    return torch.bmm(p, v[:, head])[:, None]


class _Cache(NamedTuple):
    """The pools, the sequences that read them, and how."""

    k_pool: Tensor
    v_pool: Tensor
    block_table: Tensor
    seq_lens: Tensor
    scale: float
    window: int | None
    softcap: float | None

    def attend(self, q: Tensor, sequences: slice | Tensor, longest: int) -> Tensor:
        """q [S, Q, Hq, D], the last Q positions of the chosen sequences, none longer than `longest`."""
        lengths = self.seq_lens[sequences]
        keys = key_positions(lengths, q.shape[1], longest, self.window)
        slots = slots_of(self.block_table[sequences], self.k_pool.shape[1], lengths, keys)
        k, v = (gather_rows(pool, slots, q.dtype) for pool in (self.k_pool, self.v_pool))
        visible = visible_keys(lengths, q.shape[1], keys, self.window)
        return grouped_attention(q, k, v, visible, scale=self.scale, softcap=self.softcap)


def length_groups(lengths: list[int]) -> list[list[int]]:
    """Sequences to be taken together: all of them, or by powers of two of their lengths where that saves much."""
    if len(lengths) * max(lengths) <= max(2 * sum(lengths), _SMALL_CACHE):
        return [list(range(len(lengths)))]
    groups: dict[int, list[int]] = {}
    for s, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(s)
    return list(groups.values())


def _decode(q: Tensor, cache: _Cache, lengths: list[int], sequences: Tensor | None = None) -> Tensor:
    """One query for each of the sequences (None: all of them), q [S, Hq, D]."""
    groups = length_groups(lengths)
    if len(groups) == 1:
        return cache.attend(q[:, None], slice(None) if sequences is None else sequences, max(lengths))[:, 0]
    out = q.new_empty(q.shape)
    for group in groups:
        rows = torch.tensor(group, device=q.device)
        chosen = rows if sequences is None else sequences[rows]
        out[rows] = cache.attend(q[rows, None], chosen, max(lengths[s] for s in group))[:, 0]
    return out


def _ragged(q: Tensor, cache: _Cache, lengths: list[int], bounds: list[int]) -> Tensor:
    """Sequences with one query together, the others one by one."""
    out = q.new_empty(q.shape)
    single = [s for s, (start, stop) in enumerate(pairwise(bounds)) if stop - start == 1]
    if single:
        rows, sequences = torch.tensor([[bounds[s] for s in single], single], device=q.device)
        out[rows] = _decode(q[rows], cache, [lengths[s] for s in single], sequences)
    for s, (start, stop) in enumerate(pairwise(bounds)):
        if stop - start > 1:
            out[start:stop] = cache.attend(q[None, start:stop], slice(s, s + 1), lengths[s])[0]
    return out


def _paged_attention(
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
    if uses_triton(q, k_pool, v_pool):
        from .gpu import paged_attention as triton_path

        q = q if q.stride(2) == 1 else q.contiguous()
        pools, indices = (k_pool, v_pool), (block_table, seq_lens, cu_seqlens_q)
        k_pool, v_pool, block_table, seq_lens, cu_seqlens_q = (x.contiguous() for x in (*pools, *indices))
        return triton_path.attend(q, k_pool, v_pool, block_table, seq_lens, cu_seqlens_q, scale, window, softcap)
    lengths, bounds = seq_lens.tolist(), cu_seqlens_q.tolist()
    _check_lengths(lengths, bounds, block_table.shape[1] * k_pool.shape[1], q.shape[0])
    cache = _Cache(k_pool, v_pool, block_table, seq_lens, scale, window, softcap)
    if not q.shape[0]:
        return q.new_empty(q.shape)
    if bounds == list(range(len(bounds))):
        return _decode(q, cache, lengths)
    return _ragged(q, cache, lengths, bounds)


_op = torch.library.custom_op("ppomax::paged_attention", mutates_args=())(_paged_attention)


@_op.register_fake
def _(q: Tensor, *others: Tensor | float | None) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


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
        k_pool, v_pool: [num_blocks, block_size, Hkv, D]; the current tokens' keys and values are in them
            already.
        block_table: [S, max_blocks] int32; entries beyond a sequence's blocks may be anything.
        seq_lens: [S] int32, tokens in the cache, the current ones included.
        cu_seqlens_q: [S+1] int32, boundaries of the queries; a sequence may have none.
        scale: factor of q . k.
        window: each query sees the last `window` keys, its own included; None sees all.
        softcap: as in the module's docstring.

    Returns:
        [Tq, Hq, D] in the dtype of q.

    Raises:
        ValueError: shapes that do not fit; in torch also more queries than cached tokens, or a table too short
            (a GPU's lengths are not looked at).
    """
    _check(q, k_pool, v_pool, block_table, seq_lens, cu_seqlens_q)
    tensors = (q, k_pool, v_pool, block_table, seq_lens, cu_seqlens_q)
    run = _op if traced(*tensors) else _paged_attention
    return run(*tensors, scale, window, softcap)


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
