"""Log-probs and entropies from hidden states with no logits in memory: the softmax statistics are a GEMM's epilogue.

A program multiplies BLOCK_N rows by BLOCK_V words and leaves what `add_tile` of `softmax.py` sums, for either half of
them: a whole tile's epilogue would not fit the registers. A second launch merges the parts of a row. No program waits
for another, and no sum depends on their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..lm_head import Head
from .launch import cdiv, configuration, launch
from .linear_rows import logit, row_results
from .softmax import LOG2_E, at_least_lowest, inverse_temperature, row_is_kept


@triton.jit
def grouped(program, row_tiles, tiles, GROUP: tl.constexpr):
    """(row tile, tile) of a program: GROUP row tiles take a tile of the weight while it is in cache."""
    first = program // (GROUP * tiles) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    place = program % (GROUP * tiles)
    return first + place % size, place // size


@triton.jit
def load_tile(x, row, column, rows, columns, stride, BY_TMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a matrix, given by a descriptor or a pointer; 0 outside."""
    if BY_TMA:
        tile = x.load([row, column])
    else:
        offs_r, offs_c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        offsets = tl.minimum(offs_r, rows - 1).to(tl.int64)[:, None] * stride + offs_c[None, :]
        tile = tl.load(x + offsets, mask=offs_c[None, :] < columns, other=0.0)
    return tile


@triton.jit
def store_part(
    products, labels_ptr, bias_ptr, temperature_ptr, target_ptr, parts_ptr, temperature, softcap, offs_n, first, n_rows,
    vocab, n_parts, PART_V: tl.constexpr,
):  # fmt: skip
    """Statistics of the products' columns first .. first + PART_V, and the logits of the labels among them."""
    offs_v = first + tl.arange(0, PART_V)
    z = logit(products, offs_v[None, :], vocab, bias_ptr, softcap)
    inside = offs_n < n_rows
    label = tl.load(labels_ptr + offs_n, mask=inside, other=-1)
    here = offs_v[None, :] == label[:, None]
    among = inside & (label >= first) & (label < first + PART_V)
    tl.store(target_ptr + offs_n, tl.sum(tl.where(here, z, 0.0), 1), mask=among)
    z = tl.where(offs_v[None, :] < vocab, z, float("-inf"))
    m = tl.max(z, 1)
    base = tl.where(m == float("-inf"), 0.0, m)
    d = at_least_lowest((z - base[:, None]) * (inverse_temperature(temperature, temperature_ptr) * LOG2_E))
    e = tl.exp2(d)
    part = parts_ptr + (first // PART_V).to(tl.int64) * n_rows + offs_n
    stride = n_parts * n_rows.to(tl.int64)
    tl.store(part, m, mask=inside)
    tl.store(part + stride, tl.sum(e, 1), mask=inside)
    tl.store(part + 2 * stride, tl.sum(d * e, 1), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def linear_statistics(
    hidden,  # [N, H]: descriptor or pointer
    weight,  # [V, H]: descriptor or pointer
    labels_ptr,  # [N]
    bias_ptr,  # [V] or None
    temperature_ptr,  # scalar or None
    target_ptr,  # [N]: the label's logit
    parts_ptr,  # [3, n_parts, N]: m, s, u
    temperature,
    softcap,
    stride_hidden,
    stride_weight,
    n_rows,
    vocab,
    width,
    n_parts,
    BY_TMA: tl.constexpr,
    UPCAST: tl.constexpr,  # in the interpreter, which multiplies raw bits of bf16
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles = tl.cdiv(vocab, BLOCK_V)
    row_tile, tile = grouped(tl.program_id(0), tl.cdiv(n_rows, BLOCK_N), tiles, GROUP)
    row, column = row_tile * BLOCK_N, tile * BLOCK_V
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, width, BLOCK_H):
        x = load_tile(hidden, row, start, n_rows, width, stride_hidden, BY_TMA, BLOCK_N, BLOCK_H)
        w = load_tile(weight, column, start, vocab, width, stride_weight, BY_TMA, BLOCK_V, BLOCK_H)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w.T, acc)
    offs_n = row + tl.arange(0, BLOCK_N)
    PART_V: tl.constexpr = BLOCK_V // 2
    left, right = acc.reshape(BLOCK_N, 2, PART_V).permute(0, 2, 1).split()
    store_part(left, labels_ptr, bias_ptr, temperature_ptr, target_ptr, parts_ptr, temperature, softcap, offs_n,
               column, n_rows, vocab, n_parts, PART_V)  # fmt: skip
    store_part(right, labels_ptr, bias_ptr, temperature_ptr, target_ptr, parts_ptr, temperature, softcap, offs_n,
               column + PART_V, n_rows, vocab, n_parts, PART_V)  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def linear_merge(
    labels_ptr,  # [N]
    mask_ptr,  # [N]
    temperature_ptr,
    target_ptr,  # [N]
    parts_ptr,  # [3, n_parts, N]
    logprobs_ptr,  # [N]
    entropy_ptr,  # [N]
    saved_ptr,  # [2, N]: largest logit, log-sum
    temperature,
    vocab,
    n_rows,
    n_parts,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Each row's results from its parts."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < n_rows
    inverse = inverse_temperature(temperature, temperature_ptr)
    stride = n_parts * n_rows.to(tl.int64)
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for start in range(0, n_parts, BLOCK_P):
        top = tl.maximum(top, tl.max(load_parts(parts_ptr, start, offs_n, n_rows, n_parts, float("-inf"), BLOCK_P), 0))
    base = tl.where(top == float("-inf"), 0.0, top)
    s = tl.zeros((BLOCK_N,), tl.float32)
    u = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, n_parts, BLOCK_P):
        m = load_parts(parts_ptr, start, offs_n, n_rows, n_parts, float("-inf"), BLOCK_P)
        s_part = load_parts(parts_ptr + stride, start, offs_n, n_rows, n_parts, 0.0, BLOCK_P)
        u_part = load_parts(parts_ptr + 2 * stride, start, offs_n, n_rows, n_parts, 0.0, BLOCK_P)
        shift = tl.where(m == float("-inf"), 0.0, (m - base[None, :]) * (inverse * LOG2_E))
        fade = tl.exp2(shift)
        s += tl.sum(fade * s_part, 0)
        u += tl.sum(fade * (u_part + shift * s_part), 0)
    label = tl.load(labels_ptr + offs_n, mask=inside, other=-100)
    kept = row_is_kept(label, mask_ptr, offs_n, inside)
    known = kept & (label >= 0) & (label < vocab)
    target = tl.load(target_ptr + offs_n, mask=known, other=0.0)
    logprob, entropy, log_sum = row_results(target, top, tl.where(kept, s, 1.0), u, inverse)
    logprob = tl.where(known, logprob, float("nan"))
    tl.store(logprobs_ptr + offs_n, tl.where(kept, logprob, 0.0), mask=inside)
    tl.store(entropy_ptr + offs_n, tl.where(kept, entropy, 0.0), mask=inside)
    tl.store(saved_ptr + offs_n, tl.where(kept, top, 0.0), mask=inside)
    tl.store(saved_ptr + n_rows.to(tl.int64) + offs_n, tl.where(kept, log_sum, 0.0), mask=inside)


@triton.jit
def load_parts(parts_ptr, start, offs_n, n_rows, n_parts, other, BLOCK_P: tl.constexpr):
    """[BLOCK_P, BLOCK_N]"""
    part = start + tl.arange(0, BLOCK_P)
    inside = (part[:, None] < n_parts) & (offs_n[None, :] < n_rows)
    return tl.load(parts_ptr + part.to(tl.int64)[:, None] * n_rows + offs_n[None, :], mask=inside, other=other)


def forward(hidden: Tensor, labels: Tensor, kept: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear.forward`, of bf16 or fp16 inputs."""
    n_rows, vocab = hidden.shape[0], head.weight.shape[0]
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, head.weight))
    config = configuration("linear_statistics", hidden.device)
    by_tma = bool(config.pop("TMA")) and all(_fits_tma(x) for x in (hidden, weight))
    n_parts = 2 * cdiv(vocab, config["BLOCK_V"])
    logprobs, entropy, target = (hidden.new_empty(n_rows, dtype=torch.float32) for _ in range(3))
    saved, parts = (hidden.new_empty(*k, n_rows, dtype=torch.float32) for k in ((2,), (3, n_parts)))
    t = head.temperature
    common = {
        "labels_ptr": labels, "temperature_ptr": t if isinstance(t, Tensor) else None, "target_ptr": target,
        "parts_ptr": parts, "temperature": 1.0 if isinstance(t, Tensor) else t, "n_rows": n_rows, "vocab": vocab,
        "n_parts": n_parts,
    }  # fmt: skip
    blocks = ((hidden, config["BLOCK_N"]), (weight, config["BLOCK_V"]))
    x, w = (TensorDescriptor.from_tensor(t, [n, config["BLOCK_H"]]) if by_tma else t for t, n in blocks)
    launch(
        linear_statistics,
        (cdiv(n_rows, config["BLOCK_N"]) * cdiv(vocab, config["BLOCK_V"]),),
        config,
        hidden=x,
        weight=w,
        bias_ptr=head.bias,
        softcap=head.softcap,
        stride_hidden=hidden.stride(0),
        stride_weight=weight.stride(0),
        width=hidden.shape[1],
        BY_TMA=by_tma,
        UPCAST=hidden.device.type == "cpu",
        **common,
    )
    config = configuration("linear_merge", hidden.device)
    outputs = {"mask_ptr": kept, "logprobs_ptr": logprobs, "entropy_ptr": entropy, "saved_ptr": saved}
    launch(linear_merge, (cdiv(n_rows, config["BLOCK_N"]),), config, **outputs, **common)
    return logprobs, entropy, saved


def _fits_tma(x: Tensor) -> bool:
    """Whether the chip's copy engine takes a matrix: rows, of which there are some, at multiples of 16 bytes."""
    return x.shape[0] > 0 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
