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
from .batch import cumulative
from .exact import attend_by_row
from .flash import KERNELS, packed, paged

ATTENTION = "ppomax"


class Attention(Protocol):
    """What a forward pass carries through the model."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """q `[T, Hq, D]`, k and v `[T, Hkv, D]` after the rotary embedding -> `[T, Hq, D]`; causal."""


class Varlen:
    """Causal attention inside each of the packed sequences: by one `kernel` of `flash.py` on `device`, or by one call a
    sequence, which takes masks of that sequence's length where there is a window or a soft cap.

    What a sequence gets does not depend on its neighbours in the pack, to the last bit. Where `exact`, nor on how
    many of its tokens are computed together (see `exact.py`); rows after those of the sequences then give 0.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        exact: bool = False,
        kernel: str = "sdpa",
        device: torch.device | None = None,
        deterministic: bool = False,
    ) -> None:
        self.lengths, self.exact, self.kernel, self.deterministic = list(lengths), exact, kernel, deterministic
        self.longest, self.run = max(self.lengths, default=0), packed(kernel) if kernel in KERNELS else None
        host = torch.device("cpu")
        self.cu_seqlens = cumulative(self.lengths, host if self.run is None else device or host)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        if self.exact:
            total = sum(self.lengths)
            packs = zip(*(x[:total].split(self.lengths) for x in (q, k, v)), strict=True)
            rows = [attend_by_row(*pack, scale=scale, window=window, softcap=softcap) for pack in packs]
            return _with_zeros(torch.cat(rows), q.shape[0])
        if self.run is not None:
            return self.run(
                q, k, v, self.cu_seqlens, self.longest,
                scale=scale, window=window, softcap=softcap, deterministic=self.deterministic,
            )  # fmt: skip
        if torch.compiler.is_compiling():
            return _one_by_one(q, k, v, self.cu_seqlens, scale, window, softcap)
        return _each(q, k, v, self.lengths, scale, window, softcap)


def _each(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One call a sequence: q `[T, Hq, D]`, k and v `[T, Hkv, D]` -> `[T, Hq, D]`."""
    queries, keys, values = (x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v))
    parts = [_causal(*part, scale, window, softcap) for part in zip(queries, keys, values, strict=True)]
    return torch.cat(parts, dim=1).transpose(0, 1)


@torch.library.custom_op("ppomax::attention_one_by_one", mutates_args=())
def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """`_each` as one node of a compiled graph, the same for all batches."""
    return _each(q, k, v, cu_seqlens.diff().tolist(), scale, window, softcap).contiguous()


@_one_by_one.register_fake
def _(q: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("ppomax::attention_one_by_one_backward", mutates_args=())
def _one_by_one_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lengths = cu_seqlens.diff().tolist()
    packs = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (g, q, k, v)), strict=True)
    parts = zip(*(_causal_backward(*pack, scale=scale, window=window, softcap=softcap) for pack in packs), strict=True)
    grad_q, grad_k, grad_v = (torch.cat(part, dim=1).transpose(0, 1).contiguous() for part in parts)
    return grad_q, grad_k, grad_v


@_one_by_one_backward.register_fake
def _(g: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3])
    return q, k, v


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return (*_one_by_one_backward(g, *ctx.saved_tensors, *ctx.options), None, None, None, None)


_one_by_one.register_autograd(_backward, setup_context=_save)


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


def _causal_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_causal`, of which nothing was kept."""
    group = q.shape[0] // k.shape[0]
    keys, values = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = q @ keys.transpose(-1, -2) * scale
    capped = torch.zeros_like(scores) if softcap is None else torch.tanh(scores / softcap)
    scores = scores if softcap is None else softcap * capped
    p = scores.masked_fill(~_band(q.shape[1], window, q.device), -torch.inf).softmax(-1)
    grad_p = g @ values.transpose(-1, -2)
    grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * (1 - capped.square()) * scale
    grad_k, grad_v = grad_scores.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g
    grad_k, grad_v = (x.unflatten(0, (-1, group)).sum(1) for x in (grad_k, grad_v))
    return grad_scores @ keys, grad_k, grad_v


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
    kernel: str = "triton"
    """A kernel of `flash.py`, or `paged_attention`, which needs none of what follows"""
    cu_seqlens_k: Tensor | None = None
    """`[S + 1]` int32: bounds of `seq_lens` laid end to end"""
    longest: int = 0
    """New tokens of one sequence at most"""

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
        inputs = (q, k_pool, v_pool, self.block_table, self.seq_lens, self.cu_seqlens_q)
        if self.cu_seqlens_k is not None:
            run = paged(self.kernel)
            return run(*inputs, self.cu_seqlens_k, self.longest, scale=scale, window=window, softcap=softcap)
        return paged_attention(*inputs, scale=scale, window=window, softcap=softcap)

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
        raise ValueError(
            f'attn_implementation="{ATTENTION}" needs the keyword `attention` in the forward call: use the methods of '
            "the wrapper (`policy.logprobs(batch)`, `policy.policy_loss(batch, ...)`), with a batch of `pack_rollouts`"
        )
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError("packed attention takes one row of packed sequences and no attention mask")
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported: old and new log-probs would differ")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    out = attention.attend(module.layer_idx, q, k, v, scale=scale, window=sliding_window, softcap=softcap)
    return out[None], None


AttentionInterface.register(ATTENTION, _attend)
