"""What several adapters need to fit a trainer's tensors to the operations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..api import Reduction, masked_mean
from ..reductions import check_mask, keep, loss_dtype, token_weights


def aggregate(
    terms: Tensor,
    mask: Tensor | None,
    reduction: Reduction,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The weighted sum of per-token terms, weights as in `reductions.py`; masked terms may be anything."""
    mask = check_mask(mask, terms.shape)
    terms = keep(terms, mask, loss_dtype(terms))
    weights = token_weights(mask, terms, reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens)
    return (terms * weights).sum()


def row_means(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, 1]: the mean of each row of x [B, T] over its unmasked tokens, 0 where there are none; differentiable."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return masked_mean(x, mask, segments=rows, num_segments=x.shape[0])[:, None]


def numbers(**scalars: Tensor) -> dict[str, float]:
    """0-dim tensors as Python floats, with a single wait for the device."""
    together = torch.stack([x.detach().double().reshape(()) for x in scalars.values()])
    return dict(zip(scalars, together.tolist(), strict=True))
