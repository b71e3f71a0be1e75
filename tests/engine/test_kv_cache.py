"""The pools around the manager: shapes, sizes, shared memory, copies, sleep, and round trips through slots."""

import gc
import warnings
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from ppomax.engine.errors import InputError
from ppomax.engine.kv_cache import KVCache, StepTensors
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, Qwen3Config


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


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


def model_cache(config: Any = None, **changes: Any) -> KVCache:
    small = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, num_key_value_heads=1)
    sizes: dict[str, Any] = {
        "block_size": 4, "max_sequences": 5, "max_tokens_per_sequence": 9, "dtype": torch.float32, "device": "cpu",
    }  # fmt: skip
    return KVCache.for_model(config or small, **{**sizes, **changes})


def test_shapes_and_bytes() -> None:
    cache = small_cache(dtype=torch.bfloat16, max_prefill_tokens=20)
    assert len(cache.k_pools) == len(cache.v_pools) == 2
    for pool in (*cache.k_pools, *cache.v_pools):
        assert pool.shape == (9, 4, 3, 5)
        assert pool.dtype == torch.bfloat16
        assert not pool[0].any()
    assert cache.nbytes == 2 * 2 * 9 * 4 * 3 * 5 * 2
    assert cache.block_table.shape == (3 + 1, 3)
    assert cache.block_table.dtype == torch.int32
    shapes = {field.name: tuple(getattr(cache.host, field.name).shape) for field in fields(StepTensors)}
    assert shapes == {
        "tokens": (23,), "positions": (23,), "slot_mapping": (23,), "rows": (3,), "seq_lens": (3,),
        "cu_seqlens": (4,), "sample_ids": (3,), "sample_positions": (3,),
    }  # fmt: skip


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
    cache = model_cache(config)
    assert len(cache.k_pools) == num_layers
    assert cache.v_pools[-1].shape == (5 * 3 + 1, 4, num_kv_heads, head_dim)


def test_by_default_all_sequences_fit_at_full_length() -> None:
    cache = model_cache(stop_tokens=[7])
    for token in range(5):
        cache.manager.submit(int64(token), int64(8))
    step = cache.manager.plan(100)
    for _ in range(8):
        assert (step.num_samples, step.preempted) == (5, [])
        step = cache.manager.step(np.zeros(5, np.int64), 0)
    cache.manager.submit(int64(1), int64(8))
    cache.manager.plan(10)
    assert cache.manager.commit(int64(7))[0].stopped


def test_given_num_blocks() -> None:
    cache = model_cache(num_blocks=7)
    assert cache.manager.num_blocks == cache.k_pools[0].shape[0] == 7


def test_a_share_of_the_gpus_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes alone: the pools are asked for on the device and not made here."""
    asked: list[Any] = []
    held = [5_000]  # what torch keeps of memory that was given back
    monkeypatch.setattr(torch.cuda, "empty_cache", held.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000 + 20 - sum(held), 80_000))
    monkeypatch.setattr(KVCache, "__init__", lambda self, **sizes: asked.append(sizes))
    model_cache(device="cuda:1", memory_share=0.5, dtype=torch.bfloat16)
    block_bytes = 2 * 1 * 4 * 1 * 8 * 2
    assert asked[0]["num_blocks"] == 5010 // block_bytes == 39
    with pytest.raises(ValueError, match="2 blocks of 4 tokens does not hold one sequence of 9 tokens, which takes 3"):
        model_cache(device="cuda", memory_share=0.039, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"memory_share": 0.5, "num_blocks": 9}, "num_blocks or memory_share, not both"),
        ({"memory_share": 0.5}, "free memory, and the device is cpu"),
        ({"memory_share": 0.0, "device": "cuda"}, "over 0 and at most 1, got 0.0"),
        ({"memory_share": 1.1, "device": "cuda"}, "over 0 and at most 1, got 1.1"),
    ],
    ids=["both", "cpu", "nothing", "more"],
)
def test_wrong_sizes_of_a_model(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model_cache(**changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_blocks": 3}, "a KV cache of 2 blocks of 4 tokens does not hold one sequence of 9 tokens"),
        ({"num_blocks": 2**31}, "a KV cache of 2147483648 blocks .* cannot be made \\(num_blocks must be"),
        ({"block_size": 2**31}, "a KV cache of .* cannot be made \\(block_size must be"),
    ],
    ids=["short", "blocks", "block size"],
)
def test_sizes_that_a_user_can_mend(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        model_cache(**changes)


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cache: KVCache) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(KVCache, "allocate", refuse)
    with pytest.raises(InputError, match=r"cannot be made \(CUDA out of memory\.\): expected less of max_sequence, "):
        model_cache()


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
    cache.manager.submit(int64(1, 2, 3, 4, 5, 6), int64(4))
    step = cache.manager.plan(100)
    cache.apply(step)
    assert cache.block_table.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert cache.block_table.data_ptr() == cache.manager.block_table.ctypes.data
    inputs = cache.inputs(step)
    assert {field.name: getattr(inputs, field.name).tolist() for field in fields(StepTensors)} == {
        "tokens": [1, 2, 3, 4, 5, 6], "positions": [0, 1, 2, 3, 4, 5], "slot_mapping": [4, 5, 6, 7, 8, 9],
        "rows": [0], "seq_lens": [6], "cu_seqlens": [0, 6], "sample_ids": [0], "sample_positions": [5],
    }  # fmt: skip
    for field in fields(StepTensors):
        assert getattr(inputs, field.name).data_ptr() == getattr(cache.manager, field.name).ctypes.data
    table = cache.block_table
    del cache, inputs
    gc.collect()
    assert table[0].tolist() == [1, 2, 0]


def forward(cache: KVCache, pool: Tensor, keys: dict[int, Tensor], running: set[int]) -> None:
    """A step: write each token's key (by its number), then compare all that attention may read."""
    step = cache.manager.plan(5)
    cache.apply(step)
    inputs = cache.inputs(step)
    written = inputs.slot_mapping >= 0
    new = torch.stack([keys[token] for token in inputs.tokens.tolist()])
    pool.view(-1, 3, 5)[inputs.slot_mapping[written]] = new[written]
    for row, length in zip(inputs.rows, inputs.seq_lens, strict=True):
        context = pool[cache.block_table[row]].flatten(0, 1)[:length]
        sequence = next(s for s in running if cache.manager.sequence(s).row == row)
        tokens = cache.manager.tokens_of(sequence)[:length].tolist()
        torch.testing.assert_close(context, torch.stack([keys[token] for token in tokens]), rtol=0, atol=0)
    running -= {end.id for end in cache.manager.commit(inputs.sample_ids.numpy() + 1)}


def test_tokens_come_back_and_garbage_stays_out() -> None:
    """Three samples of one prompt and another sequence over poisoned pools: chunks, shared and copied blocks."""
    cache = small_cache(max_sequences=4)
    for pool in (*cache.k_pools, *cache.v_pools):
        pool[1:] = torch.nan
    keys = {token: torch.randn(3, 5) for token in range(30)}
    first = cache.manager.submit(int64(20, 21, 22, 23, 24, 25), int64(4, 3, 2))
    other = cache.manager.submit(int64(20, 21, 22, 23, 28), int64(5))
    running = {first, first + 1, first + 2, other}
    while running:
        forward(cache, cache.k_pools[1], keys, running)
    assert cache.manager.statistics.copies > 0
    assert not cache.k_pools[1][0].any(), "nothing was written to the reserved block"
    assert not cache.k_pools[0].isnan().logical_not()[1:].any(), "copies take what they find, here NaN"


def test_copies_reach_every_pool() -> None:
    cache = small_cache()
    cache.manager.submit(int64(1, 2, 3), int64(5, 5))
    cache.manager.plan(100)
    for number, pool in enumerate((*cache.k_pools, *cache.v_pools), 1):
        pool[1] = number
        pool[2:] = 0
    step = cache.manager.step(int64(4, 5), 0)
    assert step.num_copies == 1
    cache.apply(step)
    for number, pool in enumerate((*cache.k_pools, *cache.v_pools), 1):
        assert (pool[2] == number).all()
        assert not pool[3:].any()


def test_a_table_on_another_device_follows_dirty_rows() -> None:
    cache = small_cache()
    cache.block_table = cache.block_table.clone()  # as on a GPU
    for token in range(3):
        cache.manager.submit(int64(token, token), int64(8))
    step = cache.manager.plan(100)
    while step.num_members:
        cache.apply(step)
        rows = cache.inputs(step).rows
        assert torch.equal(cache.block_table[rows], torch.from_numpy(cache.manager.block_table.copy())[rows])
        step = cache.manager.step(np.zeros(step.num_samples, np.int64), 100)


def test_sleep_and_wake() -> None:
    cache = small_cache()
    cache.allocate()
    pool = cache.k_pools[0]
    cache.allocate()
    assert cache.k_pools[0] is pool, "nothing to do"
    cache.manager.submit(int64(1, 2, 3, 4, 5), int64(3))
    cache.manager.commit(int64(*[6] * cache.manager.plan(100).num_samples))
    with pytest.raises(RuntimeError, match="1 sequences are running"):
        cache.release()
    assert cache.nbytes > 0
    cache.manager.preempt(int64(0))
    cache.release()
    assert (cache.nbytes, cache.k_pools, cache.v_pools) == (0, [], [])
    step = cache.manager.plan(100)
    assert step.num_tokens == 6, "what was cached is forgotten"
    with pytest.raises(RuntimeError, match="call allocate"):
        cache.apply(step)
    cache.allocate()
    assert cache.nbytes == 2 * 2 * 9 * 4 * 3 * 5 * 4
    assert not cache.v_pools[1][0].any()
    cache.apply(step)
