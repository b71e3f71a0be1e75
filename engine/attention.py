"""Packed varlen and paged attention for unmodified transformers models.

Importing this module registers `ppomax` with transformers' `AttentionInterface`; models loaded with
`attn_implementation="ppomax"` then call `_attend` in every layer. How to attend is carried by one object that is
passed through the model's forward as the keyword `attention`:

    model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, attention=Varlen(lengths))

transformers builds no mask for an attention that it does not know, so nothing of size T x T ever exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from ..kernels.api import paged_attention, write_kv
from .exact import attend_by_row

ATTENTION = "ppomax"


class Attention(Protocol):
    """What a forward pass carries through the model."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """q `[T, Hq, D]`, k and v `[T, Hkv, D]` after the rotary embedding -> `[T, Hq, D]`; causal."""


class Varlen:
    """Causal attention inside each of the packed sequences, one call a sequence.

    What a sequence gets does not depend on its neighbours in the pack, to the last bit. Where `exact`, nor on how
    many of its tokens are computed together (see `exact.py`); rows after those of the sequences then give 0.
    """

    def __init__(self, lengths: Sequence[int], *, exact: bool = False) -> None:
        self.lengths, self.exact = list(lengths), exact

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        if self.exact:
            total = sum(self.lengths)
            packs = zip(*(x[:total].split(self.lengths) for x in (q, k, v)), strict=True)
            rows = [attend_by_row(*pack, scale=scale, window=window, softcap=softcap) for pack in packs]
            return _with_zeros(torch.cat(rows), q.shape[0])
        queries, keys, values = (x.transpose(0, 1).split(self.lengths, dim=1) for x in (q, k, v))
        parts = [_causal(*part, scale, window, softcap) for part in zip(queries, keys, values, strict=True)]
        return torch.cat(parts, dim=1).transpose(0, 1)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """One sequence: q `[Hq, L, D]`, k and v `[Hkv, L, D]` -> `[Hq, L, D]`."""
    if softcap is not None:
        return _softcapped(q, k, v, scale, window, softcap)
    banded = window is not None and window < q.shape[1]
    out = F.scaled_dot_product_attention(
        q[None], k[None], v[None],
        attn_mask=_band(q.shape[1], window, q.device) if banded else None,
        is_causal=not banded,
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )  # fmt: skip
    return out[0]


def _softcapped(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    hidden = ~_band(q.shape[1], window, q.device)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """`[length, length]` bool, True where key j is visible to query i: i - window < j <= i."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < (window or length))


@dataclass(frozen=True)
class Paged:
    """Attention over the KV cache: writes the new tokens' keys and values, then reads the whole context from it."""

    k_pools: Sequence[Tensor]
    """Per layer `[num_blocks, block_size, Hkv, D]`"""
    v_pools: Sequence[Tensor]
    block_table: Tensor
    """`[S, blocks]` int32"""
    seq_lens: Tensor
    """`[S]` int32: tokens in the cache, the new ones included"""
    cu_seqlens_q: Tensor
    """`[S + 1]` int32: where each sequence's new tokens start and end"""
    slot_mapping: Tensor
    """`[T]` int64: where each new token's key and value go"""
    exact: bool = False
    """As in `Varlen`: one query at a time."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        k_pool, v_pool = self.k_pools[layer], self.v_pools[layer]
        if self.exact:
            total = self.slot_mapping.numel()
            write_kv(k[:total], v[:total], k_pool, v_pool, self.slot_mapping)
            rows = [
                attend_by_row(queries, *self._context(s, k_pool, v_pool), scale=scale, window=window, softcap=softcap)
                for s, queries in enumerate(q[:total].split(self.cu_seqlens_q.diff().tolist()))
                if queries.shape[0]
            ]
            return _with_zeros(torch.cat(rows), q.shape[0])
        write_kv(k, v, k_pool, v_pool, self.slot_mapping)
        return paged_attention(
            q, k_pool, v_pool, self.block_table, self.seq_lens, self.cu_seqlens_q,
            scale=scale, window=window, softcap=softcap,
        )  # fmt: skip

    def _context(self, sequence: int, k_pool: Tensor, v_pool: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[t, Hkv, D]` of a sequence's tokens in the cache."""
        length = int(self.seq_lens[sequence])
        blocks = self.block_table[sequence, : -(-length // k_pool.shape[1])].long()
        return k_pool[blocks].flatten(0, 1)[:length], v_pool[blocks].flatten(0, 1)[:length]


def _with_zeros(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    attention: Attention | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls: query `[1, Hq, T, D]`, key and value `[1, Hkv, T, D]`."""
    if attention is None:
        raise ValueError(f'attn_implementation="{ATTENTION}" needs the keyword `attention` in the forward call')
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError("packed attention takes one row of packed sequences and no attention mask")
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported: old and new log-probs would differ")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    out = attention.attend(module.layer_idx, q, k, v, scale=scale, window=sliding_window, softcap=softcap)
    return out[None], None


AttentionInterface.register(ATTENTION, _attend)
