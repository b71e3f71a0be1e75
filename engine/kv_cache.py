"""The memory of the paged KV cache: a pool of blocks per layer around the C++ manager that deals them out."""

import warnings
from typing import Any

import numpy as np
import torch

from ._kv import KVCacheManager


class KVCache:
    """A pool of K and one of V per layer, `k_pools[layer]` and `v_pools[layer]`, and the manager of blocks.

    A pool is [num_blocks, block_size, num_kv_heads, head_dim]; one block table serves all layers. Slot s is
    token s % block_size of block s // block_size: `pool.view(-1, num_kv_heads, head_dim)[s]`.

    The pools start uninitialised, and a block comes with what its last owner left in it. The contract:
    - who runs the model writes K and V of a token to its slot (never to slot -1) before anything reads it;
    - who attends to a row reads its first `lengths[row]` tokens and nothing else. Whatever else gets loaded
      (the tail of the last block, block 0 behind unused table entries) must be selected away, in V too: a
      masked weight of 0 times a NaN is a NaN.

    `block_table`, `lengths` and `slot_mapping` are CPU tensors over the manager's own memory (shapes in
    `_kv.pyi`): they change with each call of the manager, and only the manager may write them.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        num_blocks: int,
        max_sequences: int,
        max_tokens_per_sequence: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.manager = KVCacheManager(
            num_blocks, block_size, max_sequences, blocks_for(max_tokens_per_sequence, block_size)
        )
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.k_pools = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.v_pools = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.block_table = _shared_tensor(self.manager.block_table)
        self.lengths = _shared_tensor(self.manager.lengths)
        self.slot_mapping = _shared_tensor(self.manager.slot_mapping)

    @classmethod
    def for_model(
        cls,
        config: Any,
        *,
        block_size: int,
        max_sequences: int,
        max_tokens_per_sequence: int,
        dtype: torch.dtype,
        device: torch.device | str,
        num_blocks: int | None = None,
    ) -> "KVCache":
        """Sizes from a transformers config; by default max_sequences sequences of full length fit at once."""
        text = config.get_text_config()
        if num_blocks is None:
            num_blocks = 1 + max_sequences * blocks_for(max_tokens_per_sequence, block_size)  # 1: block 0
        return cls(
            num_layers=text.num_hidden_layers,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            block_size=block_size,
            num_blocks=num_blocks,
            max_sequences=max_sequences,
            max_tokens_per_sequence=max_tokens_per_sequence,
            dtype=dtype,
            device=device,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.nbytes for pool in (*self.k_pools, *self.v_pools))


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    if block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}")
    return -(-tokens // block_size)


def _shared_tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # The manager's views are read-only, which a tensor cannot be, and torch warns of that.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(array)
