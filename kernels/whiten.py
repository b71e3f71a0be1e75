"""Masked means, variances and whitening.

    mean = sum_i m_i x_i / n          var = sum_i m_i (x_i - mean)^2 / (n - 1)
    whitened = (x - mean) / sqrt(var + eps)

over all unmasked elements, or within segments (sequences, groups). With a process group the moments are those
of all ranks together (Chan et al. 1979, merged by count, mean and m2 = sum (x - mean)^2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .reductions import check_mask, keep, loss_dtype


class Moments(NamedTuple):
    """count, mean and m2 = sum (x - mean)^2 of unmasked elements: 0-dim, or one per segment [G]."""

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    mean: Tensor
    m2: Tensor


def masked_whiten_ref(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """`masked_whiten` over all elements, in float64."""
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    kept = x.double()[mask]
    out = torch.zeros_like(x, dtype=torch.float64)
    if kept.numel():
        mean = kept.mean()
        var = kept.var(unbiased=unbiased) if kept.numel() > 1 else torch.zeros_like(mean)
        out[mask] = (kept - mean) / torch.sqrt(var + eps) + (0.0 if shift_mean else mean)
    return out


def moments(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    num_segments: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Moments:
    """Count, mean and m2 of the unmasked elements, per segment where `segments` (ids, the shape of x) is given."""
    dtype = loss_dtype(x)
    mask = check_mask(mask, x.shape)
    x = keep(x, mask, dtype)
    ones = torch.ones_like(x) if mask is None else mask.to(dtype)
    ids = _segment_ids(x, segments)
    size = 1 if ids is None else _num_segments(ids, num_segments)
    count, total = (_segment_sums(t, ids, size) for t in (ones, x))
    mean = total / count.clamp(min=1)
    centred = keep(x - _per_element(mean, ids, x.shape), mask, dtype)
    result = Moments(count, mean, _segment_sums(centred.square(), ids, size))
    return result if group is None else merge_over(result, group)


def _segment_ids(x: Tensor, segments: Tensor | None) -> Tensor | None:
    return None if segments is None else segments.expand(x.shape).flatten().long()


def _num_segments(ids: Tensor, num_segments: int | None) -> int:
    if num_segments is not None:
        return num_segments
    return int(ids.max()) + 1 if ids.numel() else 1


def _segment_sums(x: Tensor, ids: Tensor | None, size: int) -> Tensor:
    if ids is None:
        return x.sum()
    return x.new_zeros(size).index_add_(0, ids, x.flatten())


def _per_element(per_segment: Tensor, ids: Tensor | None, shape: torch.Size) -> Tensor:
    return per_segment if ids is None else per_segment[ids].view(shape)


def merge_over(local: Moments, group: dist.ProcessGroup) -> Moments:
    """The moments of all ranks of `group` together."""
    sums = torch.stack([local.count, local.count * local.mean])
    dist.all_reduce(sums, group=group)
    mean = sums[1] / sums[0].clamp(min=1)
    m2 = local.m2 + local.count * (local.mean - mean).square()
    dist.all_reduce(m2, group=group)
    return Moments(sums[0], mean, m2)


def variance(of: Moments, unbiased: bool = True) -> Tensor:
    """m2 / (count - 1), or / count; 0 where there are too few elements."""
    return of.m2 / (of.count - float(unbiased)).clamp(min=1)


def whitening(
    of: Moments,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(mean, rstd) such that `(x - mean) * rstd` is whitened: the `whiten` argument of the policy losses.

    `Moments(*shaped_gae(...)[-3:])` gives them for advantages. Without `shift_mean` the mean survives the
    scaling.
    """
    of = of if group is None else merge_over(of, group)
    rstd = torch.rsqrt(variance(of, unbiased) + eps)
    return (of.mean if shift_mean else of.mean - of.mean / rstd), rstd


def masked_mean(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    num_segments: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean of the unmasked elements (0 where there are none), 0-dim or per segment [G]; differentiable without a group.

    Args:
        x: any shape. mask: the same shape, True = keep; other elements may hold anything.
        segments: ids in [0, G), broadcastable to x, of the group each element belongs to.
        num_segments: G; None looks for the largest id.
        group: process group whose ranks are averaged over together.
    """
    return moments(x, mask, segments=segments, num_segments=num_segments, group=group).mean


def masked_var(
    x: Tensor,
    mask: Tensor | None = None,
    unbiased: bool = True,
    *,
    segments: Tensor | None = None,
    num_segments: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Variance of the unmasked elements, arguments as in `masked_mean`; 0 where there are too few."""
    return variance(moments(x, mask, segments=segments, num_segments=num_segments, group=group), unbiased)


def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    segments: Tensor | None = None,
    num_segments: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`(x - mean) / sqrt(var + eps)`, plus the mean again without `shift_mean`; 0 where masked.

    Args:
        x, mask, segments, num_segments, group: as in `masked_mean`.
        unbiased: divide by n - 1. eps: added to the variance.

    Returns:
        fp32 (fp64 where x is), the shape of x.
    """
    of = moments(x, mask, segments=segments, num_segments=num_segments, group=group)
    mean, rstd = whitening(of, shift_mean=shift_mean, unbiased=unbiased, eps=eps)
    dtype, ids = of.mean.dtype, _segment_ids(x, segments)
    x = keep(x, check_mask(mask, x.shape), dtype)
    whitened = (x - _per_element(mean, ids, x.shape)) * _per_element(rstd, ids, x.shape)
    return keep(whitened, check_mask(mask, x.shape), dtype)
