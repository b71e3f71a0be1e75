"""The pools around the manager: shapes, sizes from a config, shared memory, and a round trip through slots."""

import gc
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from ppomax.engine.kv_cache import KVCache
from transformers import GPT2Config, LlamaConfig, Qwen3Config


def small_cache(**changes: Any) -> KVCache:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "num_kv_heads": 3,
        "head_dim": 5,
        "block_size": 4,
        "num_blocks": 9,
        "max_sequences": 3,
        "max_tokens_per_sequence": 10,
        "dtype": torch.float32,
        "device": "cpu",
    }
    return KVCache(**{**sizes, **changes})


def test_shapes_and_bytes() -> None:
    cache = small_cache(dtype=torch.bfloat16)
    assert len(cache.k_pools) == len(cache.v_pools) == 2
    for pool in (*cache.k_pools, *cache.v_pools):
        assert pool.shape == (9, 4, 3, 5)
        assert pool.dtype == torch.bfloat16
    assert cache.nbytes == 2 * 2 * 9 * 4 * 3 * 5 * 2
    assert cache.manager.max_blocks_per_sequence == 3
    assert cache.block_table.shape == (3, 3)
    assert [t.dtype for t in (cache.block_table, cache.lengths, cache.slot_mapping)] == [
        torch.int32,
        torch.int32,
        torch.int64,
    ]


@pytest.mark.parametrize(
    ("config", "num_layers", "num_kv_heads", "head_dim"),
    [
        (Qwen3Config(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
         3, 2, 32),
        (LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, num_key_value_heads=4), 1, 4, 16),
        (GPT2Config(n_layer=2, n_embd=24, n_head=3), 2, 3, 8),
    ],
    ids=["head_dim-given", "head_dim-derived", "no-kv-heads"],
)  # fmt: skip
def test_sizes_from_a_config(config: Any, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
    cache = KVCache.for_model(
        config, block_size=4, max_sequences=5, max_tokens_per_sequence=9, dtype=torch.float32, device="cpu"
    )
    assert len(cache.k_pools) == num_layers
    assert cache.v_pools[-1].shape == (5 * 3 + 1, 4, num_kv_heads, head_dim)
    assert [cache.manager.admit(1, 9) for _ in range(6)] == [0, 1, 2, 3, 4, -1]


def test_given_num_blocks() -> None:
    cache = KVCache.for_model(
        LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, num_key_value_heads=1),
        block_size=4,
        max_sequences=5,
        max_tokens_per_sequence=9,
        dtype=torch.float32,
        device="cpu",
        num_blocks=7,
    )
    assert cache.manager.num_blocks == cache.k_pools[0].shape[0] == 7
    assert [cache.manager.admit(1, 9) for _ in range(3)] == [0, 1, -1]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"block_size": 0}, "block_size must be positive, got 0"),
        ({"num_blocks": 1}, "num_blocks must be"),
        ({"max_tokens_per_sequence": 0}, "max_blocks_per_sequence must be"),
    ],
    ids=["block_size", "num_blocks", "max_tokens"],
)
def test_wrong_sizes(changes: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small_cache(**changes)


def test_tensors_are_the_managers_memory() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = small_cache()
    row = cache.manager.admit(6, 10)
    cache.manager.step(np.array([row], np.int32))
    assert cache.block_table.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert cache.lengths.tolist() == [7, 0, 0]
    assert cache.slot_mapping.tolist() == [10, -1, -1]
    assert cache.block_table.data_ptr() == cache.manager.block_table.ctypes.data
    table = cache.block_table
    del cache
    gc.collect()
    assert table[0].tolist() == [1, 2, 0]


def test_tokens_come_back_and_garbage_stays_out() -> None:
    """Two interleaved sequences over poisoned pools: what the contract lets a reader see is what was written."""
    cache = small_cache()
    pool = cache.k_pools[1].fill_(torch.nan)
    flat = pool.view(-1, 3, 5)
    rows = np.array([cache.manager.admit(5, 10), cache.manager.admit(2, 10)], np.int32)
    written = {int(row): [] for row in rows}
    for row in rows:
        keys = torch.randn(int(cache.lengths[row]), 3, 5)
        flat[torch.from_numpy(cache.manager.prefill_slots(int(row)))] = keys
        written[int(row)].extend(keys)
    for _ in range(5):
        cache.manager.step(rows)
        keys = torch.randn(2, 3, 5)
        flat[cache.slot_mapping[:2]] = keys
        for row, key in zip(rows, keys, strict=True):
            written[int(row)].append(key)
    for row, keys in written.items():
        context = pool[cache.block_table[row]].flatten(0, 1)[: cache.lengths[row]]
        torch.testing.assert_close(context, torch.stack(keys), rtol=0, atol=0)
    assert pool[0].isnan().all()
