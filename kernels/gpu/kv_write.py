"""Writing keys and values into the block pool in Triton: a token's row of all heads by one program or a few."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, configuration, launch


@triton.jit
def kv_write(
    k_ptr,  # [T, HEADS, DIM]
    v_ptr,  # [T, HEADS, DIM]
    k_pool_ptr,  # [n_slots, HEADS, DIM]
    v_pool_ptr,  # [n_slots, HEADS, DIM]
    slots_ptr,  # [T]
    n_slots,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if (slot >= 0) & (slot < n_slots):
        offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        head, offs_d = (offs_c // DIM).to(tl.int64), offs_c % DIM
        inside = offs_c < HEADS * DIM
        k = tl.load(k_ptr + token * stride_k_token + head * stride_k_head + offs_d, mask=inside)
        v = tl.load(v_ptr + token * stride_v_token + head * stride_v_head + offs_d, mask=inside)
        place = slot * (HEADS * DIM) + offs_c
        tl.store(k_pool_ptr + place, k.to(k_pool_ptr.dtype.element_ty), mask=inside)
        tl.store(v_pool_ptr + place, v.to(v_pool_ptr.dtype.element_ty), mask=inside)


def write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor) -> None:
    """Rows of k and v [T, Hkv, D], the last dimension contiguous, to their slots in the contiguous pools."""
    n_tokens, heads, dim = k.shape
    config = configuration("kv_write", k.device, columns=heads * dim)
    launch(
        kv_write,
        (n_tokens, cdiv(heads * dim, config["BLOCK_C"])),
        config,
        k_ptr=k,
        v_ptr=v,
        k_pool_ptr=k_pool,
        v_pool_ptr=v_pool,
        slots_ptr=slot_mapping,
        n_slots=k_pool.shape[0] * k_pool.shape[1],
        stride_k_token=k.stride(0),
        stride_k_head=k.stride(1),
        stride_v_token=v.stride(0),
        stride_v_head=v.stride(1),
        HEADS=heads,
        DIM=dim,
    )
