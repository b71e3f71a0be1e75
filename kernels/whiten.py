"""Masked means, variances and whitening.

    var = m2 / (n - 1)          whitened = (x - mean) / sqrt(var + eps)

with n, mean and m2 of `moments.py`. On a GPU the passes over the elements run in Triton (`gpu/whiten.py`), with

    dL/dx_i = rstd g_i          dL/dmean = -rstd sum_i g_i          dL/drstd = sum_i g_i (x_i - mean)

behind them, and what lies between, a few scalars per segment, in torch; elsewhere torch's autograd does it all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import dense, uses_triton
from .moments import Moments, Segments, elements, flat, merge_over, moments, moments_of, per_element, segments_of
from .reductions import check_mask, keep, keep_constant


def variance(of: Moments, unbiased: bool = True) -> Tensor:
    """m2 / (count - 1), or / count; 0 where there are too few elements."""
    return of.m2 / (of.count - float(unbiased)).clamp(min=1)


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


@torch.library.custom_op("ppomax::whiten_backward", mutates_args=())
def _whiten_backward(
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
    from .gpu import whiten as triton_path

    return triton_path.backward(x, upstream, mask, order, bounds, mean, rstd, shift_mean)


@_whiten_backward.register_fake
def _(
    x: Tensor,
    upstream: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    bounds: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.float32), torch.empty_like(mean), torch.empty_like(rstd)


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, of: Segments, mean: Tensor, rstd: Tensor, shift_mean: bool
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mask, of.order, of.bounds, mean, rstd)
        ctx.shift_mean = shift_mean
        return elements(x, mask, of.ids, mean, rstd, None if shift_mean else mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 6
        x, *rest = ctx.saved_tensors
        dx, dmean, drstd = _whiten_backward(x, dense(upstream), *rest, ctx.shift_mean)
        return dx.to(x.dtype), None, None, dmean, drstd, None


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
        num_segments: G; None looks for the largest id, for which the host waits for the device.
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
    mask, of = check_mask(mask, x.shape), segments_of(x, segments, num_segments)
    mean, rstd = whitening(moments_of(x, mask, of, group), unbiased=unbiased, eps=eps)
    if uses_triton(x):
        tokens = (flat(x), None if mask is None else flat(mask))
        return _Whiten.apply(*tokens, of, mean.reshape(-1), rstd.reshape(-1), shift_mean).view(x.shape)
    mean, rstd = (per_element(t, of, x.shape) for t in (mean, rstd))
    kept = keep if x.requires_grad else keep_constant
    whitened = (kept(x, mask, mean.dtype) - mean) * rstd
    return kept(whitened if shift_mean else whitened + mean, mask, mean.dtype)
