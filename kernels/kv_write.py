"""Writes keys and values of new tokens into the block pool of a paged cache.

    pool[slot // block_size, slot % block_size] = row

for each token with a slot >= 0; on a GPU one Triton kernel (`gpu/kv_write.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import traced, uses_triton
from .reductions import host_sees


def write_kv_ref(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor) -> None:
    """`write_kv`, one token at a time."""
    block_size = k_pool.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k_pool[slot // block_size, slot % block_size] = k[token]
            v_pool[slot // block_size, slot % block_size] = v[token]


def _write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor) -> None:
    if uses_triton(k, v, k_pool, v_pool):
        from .gpu import kv_write as triton_path

        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
        triton_path.write_kv(k, v, k_pool, v_pool, slot_mapping.contiguous())
        return
    _check_slots(slot_mapping, k_pool.shape[0] * k_pool.shape[1])
    slots, rows = slot_mapping.long(), None
    written = slots >= 0
    if not host_sees(slots) or not bool(written.all()):
        rows = written.nonzero().squeeze(1)
        slots = slots[rows]
    for x, pool in ((k, k_pool), (v, v_pool)):
        flat = pool.view(-1, *pool.shape[2:])
        flat.index_copy_(0, slots, (x if rows is None else x[rows]).to(pool.dtype))


_op = torch.library.custom_op("ppomax::write_kv", mutates_args=("k_pool", "v_pool"))(_write_kv)


def _check_slots(slot_mapping: Tensor, n_slots: int) -> None:
    if host_sees(slot_mapping) and slot_mapping.numel():
        largest = int(slot_mapping.max())
        if largest >= n_slots:
            raise ValueError(f"slot {largest} is outside a pool of {n_slots} slots")


@torch.no_grad()
def write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor) -> None:
    """Scatters `k` and `v` into the pools in place; a slot of -1 writes nothing.

    Args:
        k, v: [T, Hkv, D].
        k_pool, v_pool: [num_blocks, block_size, Hkv, D], contiguous.
        slot_mapping: [T] int32 or int64, `block * block_size + offset`, or -1. Slots that repeat leave any
            one of their rows.

    Raises:
        ValueError: shapes that do not fit, a pool that is not contiguous; on a CPU a slot outside the pool
            (a GPU's kernel writes nothing there).
    """
    _check(k, v, k_pool, v_pool, slot_mapping)
    run = _op if traced(k, v, k_pool, v_pool, slot_mapping) else _write_kv
    run(k, v, k_pool, v_pool, slot_mapping)


def _check(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor) -> None:
    if k.shape != v.shape or k_pool.shape != v_pool.shape or k.shape[1:] != k_pool.shape[2:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (k, v, k_pool, v_pool))
        raise ValueError(f"need k, v [T, Hkv, D] and pools [blocks, block_size, Hkv, D], got {shapes}")
    if slot_mapping.shape != k.shape[:1]:
        raise ValueError(f"slot_mapping has shape {tuple(slot_mapping.shape)}, for {k.shape[0]} tokens")
    if not (k_pool.is_contiguous() and v_pool.is_contiguous()):
        raise ValueError("the pools must be contiguous")
