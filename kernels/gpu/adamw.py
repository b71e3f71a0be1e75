"""AdamW in one pass over weights, gradients and state; the maths is in `kernels/adamw.py`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adamw import BLOCK, HASH, RATIO_LEVELS, ROOT_LEVELS, SMALLEST_SCALE, Hyper
from .launch import cdiv, configuration, launch

_BLOCK = tl.constexpr(BLOCK)
_RATIO_LEVELS, _ROOT_LEVELS = tl.constexpr(RATIO_LEVELS), tl.constexpr(ROOT_LEVELS)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_HASH_0, _HASH_1 = tl.constexpr(HASH[0]), tl.constexpr(HASH[1])


@triton.jit
def adamw_step(
    weight_ptr,  # [n]: float32, or the bits of bfloat16 as int16
    low_ptr,  # [n] int16, or None
    grad_ptr,  # [n]
    first_ptr,  # [n]: exp_avg, or codes of the ratio
    second_ptr,  # [n]: exp_avg_sq, or codes of the root
    scales_ptr,  # [2, n_blocks], or None
    grad_scale_ptr,  # scalar, or None
    n,
    n_blocks,
    beta1,
    rest1,  # 1 - beta1
    beta2,
    rest2,  # 1 - beta2
    eps,
    step_size,  # lr / (1 - beta1^step)
    unbias,  # 1 / sqrt(1 - beta2^step)
    decay,  # lr * weight_decay
    BLOCK_ROWS: tl.constexpr,  # blocks of 256 per program
):
    offs_block = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs = offs_block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside, block_inside = offs < n, offs_block < n_blocks
    g = tl.load(grad_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if grad_scale_ptr is not None:
        g *= tl.load(grad_scale_ptr).to(tl.float32)
    m = tl.load(first_ptr + offs, mask=inside, other=0).to(tl.float32)
    v = tl.load(second_ptr + offs, mask=inside, other=0).to(tl.float32)
    if scales_ptr is not None:
        ratio_scale = tl.load(scales_ptr + offs_block, mask=block_inside, other=0.0)
        root_scale = tl.load(scales_ptr + n_blocks + offs_block, mask=block_inside, other=0.0)
        r = v * v * (root_scale / (_ROOT_LEVELS * _ROOT_LEVELS))[:, None]
        m = m * tl.abs(m) * (ratio_scale / (_RATIO_LEVELS * _RATIO_LEVELS))[:, None] * r
        v = r * r
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    r = tl.sqrt(v)
    w = _load_weight(weight_ptr, low_ptr, offs, inside)
    w -= decay * w
    w -= step_size * m / (r * unbias + eps)
    _store_weight(weight_ptr, low_ptr, offs, inside, w)
    if scales_ptr is None:
        tl.store(first_ptr + offs, m, mask=inside)
        tl.store(second_ptr + offs, v, mask=inside)
    else:
        u = m / tl.where(r > 0, r, 1.0)
        codes, scale = _codes(u, _RATIO_LEVELS, 0.5)
        tl.store(first_ptr + offs, tl.where(u < 0, -codes, codes).to(tl.int8), mask=inside)
        tl.store(scales_ptr + offs_block, scale, mask=block_inside)
        codes, scale = _codes(r, _ROOT_LEVELS, _uniform(v))
        tl.store(second_ptr + offs, codes.to(tl.uint8), mask=inside)
        tl.store(scales_ptr + n_blocks + offs_block, scale, mask=block_inside)


@triton.jit
def _load_weight(weight_ptr, low_ptr, offs, inside):
    """float32 masters."""
    w = tl.load(weight_ptr + offs, mask=inside, other=0)
    if low_ptr is not None:
        low = tl.load(low_ptr + offs, mask=inside, other=0).to(tl.int32)
        w = ((w.to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
    return w


@triton.jit
def _store_weight(weight_ptr, low_ptr, offs, inside, w):
    if low_ptr is None:
        tl.store(weight_ptr + offs, w, mask=inside)
    else:
        bits = w.to(tl.int32, bitcast=True)
        low = bits.to(tl.int16)
        tl.store(weight_ptr + offs, ((bits - low.to(tl.int32)) >> 16).to(tl.int16), mask=inside)
        tl.store(low_ptr + offs, low, mask=inside)


@triton.jit
def _codes(x, LEVELS: tl.constexpr, threshold):
    """(codes of |x| as floats, scales [BLOCK_ROWS])."""
    size = tl.abs(x)
    scale = tl.max(size, 1)
    scale = tl.where(scale > _SMALLEST_SCALE, scale, 0.0)
    factor = tl.where(scale > 0, LEVELS * LEVELS / tl.where(scale > 0, scale, 1.0), 0.0)
    y = size * factor[:, None]
    c = tl.floor(tl.sqrt(y))
    c += tl.where(y - c * c > (2 * c + 1) * threshold, 1.0, 0.0)
    return tl.minimum(c, LEVELS), scale


@triton.jit
def _uniform(v):
    h = v.to(tl.int32, bitcast=True) * _HASH_0
    h = (h ^ (h >> 15)) * _HASH_1
    return ((h >> 8) & 0xFFFFFF).to(tl.float32) * (2.0**-24)


def step(
    weight: Tensor,
    low: Tensor | None,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    scales: Tensor | None,
    grad_scale: Tensor | None,
    hyper: Hyper,
) -> None:
    """One step over flat tensors, in place."""
    n = weight.numel()
    config = configuration("adamw_step", weight.device)
    n_blocks = cdiv(n, BLOCK)
    launch(
        adamw_step,
        (cdiv(n_blocks, config["BLOCK_ROWS"]),),
        config,
        weight_ptr=weight if low is None else weight.view(torch.int16),
        low_ptr=low,
        grad_ptr=grad,
        first_ptr=first,
        second_ptr=second,
        scales_ptr=scales,
        grad_scale_ptr=grad_scale,
        n=n,
        n_blocks=n_blocks,
        beta1=hyper.beta1,
        rest1=1 - hyper.beta1,
        beta2=hyper.beta2,
        rest2=1 - hyper.beta2,
        eps=hyper.eps,
        step_size=hyper.lr / (1 - hyper.beta1**hyper.step),
        unbias=1 / math.sqrt(1 - hyper.beta2**hyper.step),
        decay=hyper.lr * hyper.weight_decay,
    )
