"""Tiles of per-token tensors, LANES x WIDTH consecutive tokens of which a thread has WIDTH, and moments over them.

Whether a tile is WHOLE is known when a kernel is compiled, so whole tiles move in 16-byte accesses whatever the
number of tokens; only a tensor's last tile may not be, and moves token by token. Sums along axis 1 stay in their
thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDTH = tl.constexpr(4)


@triton.jit
def tile_offsets(BLOCK_N: tl.constexpr):
    """[LANES, WIDTH] offsets of a tile's tokens from its first."""
    LANES: tl.constexpr = BLOCK_N // WIDTH
    return tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_tile(x_ptr, offs_n, inside, WHOLE: tl.constexpr):
    """Tokens as they are stored; 0 where not inside, which every token of a whole tile is."""
    return tl.load(x_ptr + offs_n) if WHOLE else tl.load(x_ptr + offs_n, mask=inside, other=0)


@triton.jit
def store_tile(x_ptr, offs_n, x, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(x_ptr + offs_n, x)
    else:
        tl.store(x_ptr + offs_n, x, mask=inside)


@triton.jit
def kept_tokens(mask_ptr, start, offs_n, inside, WHOLE: tl.constexpr):
    """Which tokens, the first of them at `start`, count: inside and not masked."""
    kept = offs_n >= 0 if WHOLE else inside
    if mask_ptr is not None:
        kept = kept & (load_tile(mask_ptr + start, offs_n, inside, WHOLE) != 0)
    return kept


@triton.jit
def load_kept(x_ptr, offs_n, inside, kept, WHOLE: tl.constexpr):
    """Tokens in fp32; 0, whatever is stored there, where they do not count."""
    return tl.where(kept, load_tile(x_ptr, offs_n, inside, WHOLE).to(tl.float32), 0.0)


@triton.jit
def add_moments(count, mean, m2, x, kept):
    """(mean, m2 = sum (x - mean)^2) per lane of `count` elements and a tile's kept ones (Chan et al. 1979)."""
    added = tl.sum(tl.where(kept, 1.0, 0.0), 1)
    tile_mean = tl.sum(tl.where(kept, x, 0.0), 1) / tl.maximum(added, 1.0)
    distance = tl.where(kept, x - tile_mean[:, None], 0.0)
    share = added / tl.maximum(count + added, 1.0)
    gap = tile_mean - mean
    return mean + gap * share, m2 + tl.sum(distance * distance, 1) + gap * gap * count * share


@triton.jit
def merge_moments(count, mean, m2):
    """(count, mean, m2) of all parts along axis 0 together."""
    total = tl.sum(count, 0)
    merged = tl.sum(count * mean, 0) / tl.maximum(total, 1.0)
    distance = mean - merged
    return total, merged, tl.sum(m2 + count * distance * distance, 0)
