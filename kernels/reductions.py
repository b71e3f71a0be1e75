"""Weights that turn per-token terms into one loss.

Every loss here is `sum_i w_i * term_i` with weights known before any term is:

    token-sum             w_i = 1 / normalizer                                    normalizer: 1
    token-mean            w_i = 1 / normalizer                                    unmasked tokens
    seq-mean-token-sum    w_i = 1 / normalizer                                    sequences
    seq-mean-token-mean   w_i = 1 / (tokens of i's sequence * normalizer)         sequences

The last column is what `normalizer` defaults to; sequences without an unmasked token do not count.

A masked token has w_i = 0. Given the same `normalizer`, the losses of micro-batches or ranks add up to the
loss of the whole batch (for the seq-* forms each sequence must lie in one of them).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Reduction = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
_REDUCTIONS = get_args(Reduction)


def loss_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any tensor is, else float32: the dtype of all per-token results."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def host_sees(x: Tensor) -> bool:
    """Whether the host can look at values without waiting for a device: where not, rows are masked, never left out."""
    return x.device.type == "cpu"


def keep(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype` with 0 at masked positions, whatever garbage (NaN, inf) is stored there."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if mask is None else torch.where(mask, x, 0.0)


def keep_constant(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`keep` of a tensor that takes no gradient."""
    x = x.detach()
    x = x if x.dtype == dtype else x.to(dtype)
    if mask is None or not host_sees(x):
        return keep(x, mask, dtype)
    # a CPU's `where` takes a branch an element, many of them wrong; integers 0 and 1 let all bits through or none
    return (x.view(torch.int64 if dtype == torch.float64 else torch.int32) * mask).view(dtype)


def ones_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where the mask is True, else 0; torch converts bytes several times as fast as bools."""
    return mask.view(torch.uint8).to(dtype)


def check_mask(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The mask as bool; raises where its shape is not `shape`."""
    if mask is None:
        return None
    if mask.shape != shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(shape)}")
    return mask if mask.dtype == torch.bool else mask != 0


def sequence_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """[N] int64: the sequence of each packed token."""
    lengths = cu_seqlens.diff().long()
    ids = torch.arange(lengths.numel(), device=cu_seqlens.device)
    return torch.repeat_interleave(ids, lengths, output_size=total)


def sequence_counts(mask: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unmasked tokens per sequence, as ([S], the same broadcastable to the mask's shape)."""
    if cu_seqlens is not None:
        ids = sequence_ids(cu_seqlens, mask.numel())
        per_sequence = torch.zeros(cu_seqlens.numel() - 1, dtype=dtype, device=mask.device)
        per_sequence.index_add_(0, ids, mask.to(dtype))
        return per_sequence, per_sequence[ids]
    if mask.dim() < 2:
        raise ValueError("seq-* reductions need [B, T] inputs, or packed [N] inputs with cu_seqlens")
    per_row = mask.sum(-1, keepdim=True).to(dtype)
    return per_row.flatten(), per_row


class Weighting(NamedTuple):
    """How the terms of a loss are weighted."""

    reduction: Reduction = "token-mean"
    normalizer: float | Tensor | None = None
    cu_seqlens: Tensor | None = None


def check_reduction(reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}, expected one of {', '.join(_REDUCTIONS)}")


def token_weights(
    mask: Tensor | None,
    like: Tensor,
    *,
    reduction: Reduction,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The weights w_i of the module's docstring, in the shape and dtype of `like`."""
    check_reduction(reduction)
    if reduction.startswith("token"):
        return _per_token_weights(mask, like, reduction, normalizer)
    present = torch.ones_like(like, dtype=torch.bool) if mask is None else mask
    per_sequence, tokens = sequence_counts(present, cu_seqlens, like.dtype)
    total = (per_sequence > 0).sum().clamp(min=1) if normalizer is None else normalizer
    weights = present.to(like.dtype) / total
    return weights / tokens.clamp(min=1) if reduction == "seq-mean-token-mean" else weights


def _per_token_weights(mask: Tensor | None, like: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    present = torch.ones_like(like) if mask is None else ones_of(mask, like.dtype)
    if normalizer is not None:
        return present / normalizer
    return present if reduction == "token-sum" else present / present.sum().clamp(min=1)


def averages(count: Tensor, *terms: Tensor) -> list[Tensor]:
    """fp32 means over `count` tokens of `terms`, which are 0 at masked positions; 0 where there are none. An integer
    is the sum of its term already."""
    totals = torch.stack([x.sum() if x.is_floating_point() else x for x in terms])
    return list((totals / count.clamp(min=1)).float().unbind())
