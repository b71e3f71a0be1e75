"""Moments of the unmasked elements of a tensor: over all of them, or within segments (sequences, groups).

    mean = sum_i m_i x_i / n          m2 = sum_i m_i (x_i - mean)^2

With a process group they are those of all ranks together (Chan et al. 1979, merged by count, mean and m2). On a GPU
the passes over the elements run in Triton (`gpu/whiten.py`), with d mean / dx_i = m_i / n and
d m2 / dx_i = 2 m_i (x_i - mean); elsewhere torch's autograd has them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import uses_triton
from .reductions import check_mask, keep, keep_constant, loss_dtype, ones_of


class Moments(NamedTuple):
    """count, mean and m2 = sum (x - mean)^2 of unmasked elements: 0-dim, or one per segment [G]."""

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    mean: Tensor
    m2: Tensor


class Segments(NamedTuple):
    """Which segment each element is in; ids are None where there is but one.

    In Triton a segment's elements are `order[bounds[s]:bounds[s + 1]]`; in torch both are None.
    """

    ids: Tensor | None  # [N]
    size: int
    order: Tensor | None  # [N]
    bounds: Tensor | None  # [size + 1]


def segments_of(x: Tensor, segments: Tensor | None, num_segments: int | None) -> Segments:
    if segments is None:
        return Segments(None, 1, None, None)
    ids = segments.expand(x.shape).reshape(-1).long()
    count = _num_segments(ids, num_segments)
    if not uses_triton(x):
        return Segments(ids, count, None, None)
    grouped, order = ids.sort(stable=True)
    return Segments(ids, count, order, torch.searchsorted(grouped, torch.arange(count + 1, device=ids.device)))


@torch.library.custom_op("ppomax::whiten_moments", mutates_args=())
def _moments_forward(
    x: Tensor, mask: Tensor | None, order: Tensor | None, bounds: Tensor | None, n_segments: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, m2), each [G] fp32, of x [N]."""
    from .gpu import whiten as triton_path

    return triton_path.moments(x, mask, order, bounds, n_segments)


@_moments_forward.register_fake
def _(
    x: Tensor, mask: Tensor | None, order: Tensor | None, bounds: Tensor | None, n_segments: int
) -> tuple[Tensor, Tensor, Tensor]:
    count, mean, m2 = (x.new_empty(n_segments, dtype=torch.float32) for _ in range(3))
    return count, mean, m2


@torch.library.custom_op("ppomax::whiten_elements", mutates_args=())
def elements(
    x: Tensor, mask: Tensor | None, ids: Tensor | None, shift: Tensor, scale: Tensor, offset: Tensor | None
) -> Tensor:
    """(x - shift) * scale + offset, [N] fp32, each of the three [G] taken at the element's segment; 0 where masked."""
    from .gpu import whiten as triton_path

    return triton_path.elements(x, mask, ids, shift, scale, offset)


@elements.register_fake
def _(x: Tensor, *others: Tensor | None) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, of: Segments) -> tuple[Tensor, Tensor, Tensor]:
        count, mean, m2 = _moments_forward(x, mask, of.order, of.bounds, of.size)
        ctx.mark_non_differentiable(count)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mask, of.ids, count, mean)
        return count, mean, m2

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: Tensor | None, g_mean: Tensor | None, g_m2: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        if g_mean is None and g_m2 is None:
            return None, None, None
        x, mask, ids, count, mean = ctx.saved_tensors
        scale = torch.zeros_like(mean) if g_m2 is None else 2.0 * g_m2
        offset = None if g_mean is None else g_mean / count.clamp(min=1)
        return elements(x, mask, ids, mean, scale, offset).to(x.dtype), None, None


def moments(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    num_segments: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Moments:
    """Count, mean and m2 of the unmasked elements, per segment where `segments` (ids, the shape of x) is given.

    Mean and m2 are differentiable without a group. Arguments as in `masked_mean`.
    """
    return moments_of(x, check_mask(mask, x.shape), segments_of(x, segments, num_segments), group)


def moments_of(x: Tensor, mask: Tensor | None, of: Segments, group: dist.ProcessGroup | None) -> Moments:
    result = _moments_triton(x, mask, of) if uses_triton(x) else _moments_torch(x, mask, of)
    return result if group is None else merge_over(result, group)


def _moments_triton(x: Tensor, mask: Tensor | None, of: Segments) -> Moments:
    count, mean, m2 = _Moments.apply(flat(x), None if mask is None else flat(mask), of)
    shape = () if of.ids is None else (of.size,)
    return Moments(count.view(shape), mean.view(shape), m2.view(shape))


def _moments_torch(x: Tensor, mask: Tensor | None, of: Segments) -> Moments:
    dtype = loss_dtype(x)
    kept = keep if x.requires_grad else keep_constant
    x = kept(x, mask, dtype)
    count = _segment_sums(torch.ones_like(x) if mask is None else ones_of(mask, dtype), of)
    mean = _segment_sums(x, of) / count.clamp(min=1)
    centred = kept(x - per_element(mean, of, x.shape), mask, dtype)
    return Moments(count, mean, _segment_sums(centred.square(), of))


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous()


def _num_segments(ids: Tensor, num_segments: int | None) -> int:
    if num_segments is not None:
        return num_segments
    return int(ids.max()) + 1 if ids.numel() else 1


def _segment_sums(x: Tensor, of: Segments) -> Tensor:
    if of.ids is None:
        return x.sum()
    # one by one: in fp32 the terms would drown in a long segment's sum
    return x.new_zeros(of.size, dtype=torch.float64).index_add_(0, of.ids, x.flatten().double()).to(x.dtype)


def per_element(per_segment: Tensor, of: Segments, shape: torch.Size) -> Tensor:
    return per_segment if of.ids is None else per_segment[of.ids].view(shape)


def merge_over(local: Moments, group: dist.ProcessGroup) -> Moments:
    """The moments of all ranks of `group` together."""
    sums = torch.stack([local.count, local.count * local.mean])
    dist.all_reduce(sums, group=group)
    mean = sums[1] / sums[0].clamp(min=1)
    m2 = local.m2 + local.count * (local.mean - mean).square()
    dist.all_reduce(m2, group=group)
    return Moments(sums[0], mean, m2)
