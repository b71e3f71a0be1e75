"""Moments and whitening in Triton; the maths is in `kernels/whiten.py`.

A segment's elements are `order[bounds[s]:bounds[s + 1]]`; without segments there is one, of all elements as they
lie. Several programs may share a segment: each leaves its part, and parts are merged in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, configuration, launch, splits_of
from .tiles import add_moments, kept_tokens, load_kept, load_tile, merge_moments, store_tile, tile_offsets


@triton.jit
def segment_span(bounds_ptr, segment, n):
    """(first, length) of a segment."""
    first, length = 0, n
    if bounds_ptr is not None:
        first = tl.load(bounds_ptr + segment)
        length = tl.load(bounds_ptr + segment + 1) - first
    return first, length


@triton.jit
def tiles_of(split, splits, length, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, last) of the program's tiles, every `splits`-th: the whole ones, or the one behind these."""
    whole = length // BLOCK_N
    first, last = split, whole
    if not WHOLE:
        first, last = tl.where(split == whole % splits, whole, whole + 1), tl.cdiv(length, BLOCK_N)
    return first, last


@triton.jit
def tile_elements(order_ptr, mask_ptr, first, start, offs_n, length, WHOLE: tl.constexpr):
    """(indices of a tile's elements, which lie in the segment, which count)."""
    inside = offs_n < length - start
    index = first + start + offs_n
    if order_ptr is not None:
        index = load_tile(order_ptr + first + start, offs_n, inside, WHOLE)
    return index, inside, kept_tokens(mask_ptr, 0, index, inside, WHOLE)


@triton.jit(do_not_specialize=["n", "n_segments"])
def whiten_moments(
    x_ptr,  # [N]
    mask_ptr,  # [N] or None
    order_ptr,  # [N] or None
    bounds_ptr,  # [G + 1] or None
    parts_ptr,  # [3, splits, G]: count, mean, m2
    n,
    n_segments,
    BLOCK_N: tl.constexpr,
):
    segment, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first, length = segment_span(bounds_ptr, segment, n)
    offs_n = tile_offsets(BLOCK_N)
    count = tl.sum(offs_n * 0.0, 1)
    mean, m2 = count, count
    for part in tl.static_range(2):  # whole tiles, then what is left
        begin, end = tiles_of(split, splits, length, part == 0, BLOCK_N)
        for tile in range(begin, end, splits):
            index, inside, kept = tile_elements(order_ptr, mask_ptr, first, tile * BLOCK_N, offs_n, length, part == 0)
            x = load_kept(x_ptr, index, inside, kept, part == 0)
            mean, m2 = add_moments(count, mean, m2, x, kept)
            count += tl.sum(tl.where(kept, 1.0, 0.0), 1)
    count, mean, m2 = merge_moments(count, mean, m2)
    stride = splits * n_segments.to(tl.int64)
    parts_ptr += split * n_segments + segment
    tl.store(parts_ptr, count)
    tl.store(parts_ptr + stride, mean)
    tl.store(parts_ptr + 2 * stride, m2)


@triton.jit(do_not_specialize=["n_segments"])
def whiten_merge(
    parts_ptr,  # [3, SPLITS, G]
    count_ptr,  # [G], as the next two
    mean_ptr,
    m2_ptr,
    n_segments,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    offs_g = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    inside = offs_g < n_segments
    part_ptr = parts_ptr + tl.arange(0, SPLITS)[:, None] * n_segments.to(tl.int64) + offs_g[None, :]
    stride = SPLITS * n_segments.to(tl.int64)
    count = tl.load(part_ptr, mask=inside[None, :], other=0.0).to(tl.float64)
    mean = tl.load(part_ptr + stride, mask=inside[None, :], other=0.0).to(tl.float64)
    m2 = tl.load(part_ptr + 2 * stride, mask=inside[None, :], other=0.0).to(tl.float64)
    count, mean, m2 = merge_moments(count, mean, m2)
    tl.store(count_ptr + offs_g, count, mask=inside)
    tl.store(mean_ptr + offs_g, mean, mask=inside)
    tl.store(m2_ptr + offs_g, m2, mask=inside)


@triton.jit
def of_segment(x_ptr, segment, known, ids_ptr):
    """A segment's value for each of its elements, NaN where there is no such segment; a scalar without segments."""
    return tl.load(x_ptr) if ids_ptr is None else tl.load(x_ptr + segment, mask=known, other=float("nan"))


@triton.jit
def element_tile(
    x_ptr, mask_ptr, ids_ptr, shift_ptr, scale_ptr, offset_ptr, out_ptr, start, offs_n, n, n_segments,
    WHOLE: tl.constexpr,
):  # fmt: skip
    inside = offs_n < n - start
    kept = kept_tokens(mask_ptr, start, offs_n, inside, WHOLE)
    segment, known = offs_n, kept
    if ids_ptr is not None:
        segment = load_tile(ids_ptr + start, offs_n, inside, WHOLE)
        known = kept & (segment >= 0) & (segment < n_segments)
    x = load_kept(x_ptr + start, offs_n, inside, kept, WHOLE)
    y = (x - of_segment(shift_ptr, segment, known, ids_ptr)) * of_segment(scale_ptr, segment, known, ids_ptr)
    if offset_ptr is not None:
        y += of_segment(offset_ptr, segment, known, ids_ptr)
    store_tile(out_ptr + start, offs_n, tl.where(kept, y, 0.0), inside, WHOLE)


@triton.jit(do_not_specialize=["n", "n_segments"])
def whiten_elements(
    x_ptr,  # [N]
    mask_ptr,  # [N] or None
    ids_ptr,  # [N] or None: each element's segment
    shift_ptr,  # [G]
    scale_ptr,  # [G]
    offset_ptr,  # [G] or None
    out_ptr,  # [N]
    n,
    n_segments,
    BLOCK_N: tl.constexpr,
):
    """(x - shift) * scale + offset where x counts, else 0."""
    offs_n = tile_offsets(BLOCK_N)
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    if start + BLOCK_N <= n:
        element_tile(
            x_ptr, mask_ptr, ids_ptr, shift_ptr, scale_ptr, offset_ptr, out_ptr, start, offs_n, n, n_segments, True
        )  # fmt: skip
    else:
        element_tile(
            x_ptr, mask_ptr, ids_ptr, shift_ptr, scale_ptr, offset_ptr, out_ptr, start, offs_n, n, n_segments, False
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "n_segments"])
def whiten_backward(
    x_ptr,  # [N]
    upstream_ptr,  # [N]: dL/dwhitened
    mask_ptr,  # [N] or None
    order_ptr,  # [N] or None
    bounds_ptr,  # [G + 1] or None
    mean_ptr,  # [G]
    rstd_ptr,  # [G]
    dx_ptr,  # [N]: with mean and rstd held fixed
    parts_ptr,  # [2, splits, G]: sum g, sum g (x - mean)
    n,
    n_segments,
    BLOCK_N: tl.constexpr,
):
    segment, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first, length = segment_span(bounds_ptr, segment, n)
    mean, rstd = tl.load(mean_ptr + segment), tl.load(rstd_ptr + segment)
    offs_n = tile_offsets(BLOCK_N)
    g_sum = tl.sum(offs_n * 0.0, 1)
    gx_sum = g_sum
    for part in tl.static_range(2):
        begin, end = tiles_of(split, splits, length, part == 0, BLOCK_N)
        for tile in range(begin, end, splits):
            index, inside, kept = tile_elements(order_ptr, mask_ptr, first, tile * BLOCK_N, offs_n, length, part == 0)
            x = load_kept(x_ptr, index, inside, kept, part == 0)
            g = load_kept(upstream_ptr, index, inside, kept, part == 0)
            store_tile(dx_ptr, index, g * rstd, inside, part == 0)
            g_sum += tl.sum(g, 1)
            gx_sum += tl.sum(g * (x - mean), 1)
    parts_ptr += split * n_segments + segment
    tl.store(parts_ptr, tl.sum(g_sum, 0))
    tl.store(parts_ptr + splits * n_segments.to(tl.int64), tl.sum(gx_sum, 0))


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _plan(name: str, x: Tensor, n_segments: int) -> tuple[dict[str, int], int]:
    """(configuration, programs per segment)."""
    mean_length = cdiv(x.numel(), max(n_segments, 1))
    config = configuration(name, x.device, mean_length=mean_length)
    return config, splits_of(n_segments, mean_length, config["BLOCK_N"], x.device)


def moments(
    x: Tensor, mask: Tensor | None, order: Tensor | None, bounds: Tensor | None, n_segments: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, m2), each [G] fp32."""
    config, splits = _plan("whiten_moments", x, n_segments)
    merge = configuration("whiten_merge", x.device, splits=splits)
    parts = _empty(x, 3, splits, n_segments)
    count, mean, m2 = (_empty(x, n_segments) for _ in range(3))
    launch(
        whiten_moments,
        (n_segments, splits),
        config,
        x_ptr=x,
        mask_ptr=mask,
        order_ptr=order,
        bounds_ptr=bounds,
        parts_ptr=parts,
        n=x.numel(),
        n_segments=n_segments,
    )
    launch(
        whiten_merge,
        (cdiv(n_segments, merge["BLOCK_G"]),),
        merge,
        parts_ptr=parts,
        count_ptr=count,
        mean_ptr=mean,
        m2_ptr=m2,
        n_segments=n_segments,
        SPLITS=splits,
    )
    return count, mean, m2


def elements(
    x: Tensor, mask: Tensor | None, ids: Tensor | None, shift: Tensor, scale: Tensor, offset: Tensor | None
) -> Tensor:
    """(x - shift) * scale + offset, [N] fp32, each of the three [G] taken at the element's segment; 0 where masked."""
    out = _empty(x, x.numel())
    config = configuration("whiten_elements", x.device)
    launch(
        whiten_elements,
        (cdiv(x.numel(), config["BLOCK_N"]),),
        config,
        x_ptr=x,
        mask_ptr=mask,
        ids_ptr=ids,
        shift_ptr=shift,
        scale_ptr=scale,
        offset_ptr=offset,
        out_ptr=out,
        n=x.numel(),
        n_segments=shift.numel(),
    )
    return out


def backward(
    x: Tensor,
    upstream: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    bounds: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dx [N], dL/dmean [G] and dL/drstd [G] of y = (x - mean) * rstd, to which the mean is added without
    `shift_mean`; fp32."""
    n_segments = mean.numel()
    config, splits = _plan("whiten_backward", x, n_segments)
    dx, parts = _empty(x, x.numel()), _empty(x, 2, splits, n_segments)
    launch(
        whiten_backward,
        (n_segments, splits),
        config,
        x_ptr=x,
        upstream_ptr=upstream,
        mask_ptr=mask,
        order_ptr=order,
        bounds_ptr=bounds,
        mean_ptr=mean,
        rstd_ptr=rstd,
        dx_ptr=dx,
        parts_ptr=parts,
        n=x.numel(),
        n_segments=n_segments,
    )
    g_sum, gx_sum = parts.sum(1, dtype=torch.float64)
    return dx, (g_sum * (-rstd if shift_mean else 1.0 - rstd)).float(), gx_sum.float()
