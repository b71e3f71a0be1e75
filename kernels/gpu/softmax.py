"""What kernels over a vocabulary share: softmax statistics of a row, tile by tile, and the row's logits.

For logits z = x / T, with m the largest x so far, d = (x - m) log2(e) / T, s = sum 2^d and u = sum d 2^d:

    log-prob of y = (x_y - m) / T - log s          entropy = log s - log(2) u / s

Differences come before scaling, so logits far from 0 lose nothing. m starts at -inf, and a tile of nothing
but -inf leaves s and u as they are. m passes over a NaN, as maxima on a GPU do; s and u do not, and so neither do
the results of its row.
"""

from __future__ import annotations

import triton
import triton.language as tl

IGNORE_INDEX = tl.constexpr(-100)
LOWEST = tl.constexpr(-1e30)  # stands for log 0 where 0 * log 0 must be 0
LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def at_least_lowest(d):
    """LOWEST where d is below it, as of a logit of -inf; NaN stays NaN, which tl.maximum would drop."""
    return tl.maximum(d, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_tile(x, scale, m, s, u):
    """(m, s, u) after the tile x, -inf where there is no logit; m a scalar, s and u per lane; scale = log2(e) / T."""
    m_new = tl.maximum(m, tl.max(x, 0))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    if m_new > m:  # rare after the first tiles
        shift = tl.where(m == float("-inf"), 0.0, (m - base) * scale)  # nothing was summed where m was -inf
        fade = tl.exp2(shift)
        u = fade * (u + shift * s)
        s = fade * s
    d = at_least_lowest((x - base) * scale)
    e = tl.exp2(d)
    return m_new, s + e, u + d * e


@triton.jit
def merge(m, s, u, scale):
    """(m, s, u) of all parts along axis 0, given those of each."""
    top = tl.max(m, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    shift = tl.where(m == float("-inf"), 0.0, (m - base[None, :]) * scale)
    fade = tl.exp2(shift)
    return top, tl.sum(fade * s, 0), tl.sum(fade * (u + shift * s), 0)


@triton.jit
def inverse_temperature(temperature, temperature_ptr):
    """1 / T, of the scalar in memory where there is one, else of the argument."""
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr).to(tl.float32)
    return 1.0 / temperature


@triton.jit
def row_is_kept(label, mask_ptr, row, inside):
    """Whether rows count: not ignored, not masked."""
    kept = inside & (label != IGNORE_INDEX)
    if mask_ptr is not None:
        kept = kept & (tl.load(mask_ptr + row, mask=inside, other=0) != 0)
    return kept
