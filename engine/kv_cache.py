"""The memory of the paged KV cache: a pool of blocks per layer around the C++ manager that deals them out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._kv import KVCacheManager, Step
from .errors import InputError, first_line


@dataclass(frozen=True)
class StepTensors:
    """What a forward pass and the sampler read of a step; T tokens of S sequences, N of which sample."""

    tokens: Tensor
    """`[T]` int64, packed"""
    positions: Tensor
    """`[T]` int64 in their sequences"""
    slot_mapping: Tensor
    """`[T]` int64: where K and V go; -1: they are there already"""
    rows: Tensor
    """`[S]` int64, of the block table"""
    seq_lens: Tensor
    """`[S]` int32: tokens in the cache, this step's included"""
    cu_seqlens: Tensor
    """`[S + 1]` int32: where each sequence's tokens start and end"""
    sample_ids: Tensor
    """`[N]` int64: the sequences whose next token is sampled"""
    sample_positions: Tensor
    """`[N]` int64: the packed tokens whose logits they are sampled from; several may share one"""


class KVCache:
    """A pool of K and one of V per layer, `k_pools[layer]` and `v_pools[layer]`, and the manager of blocks.

    A pool is [num_blocks, block_size, num_kv_heads, head_dim]; one block table serves all layers. Slot s is
    token s % block_size of block s // block_size: `pool.view(-1, num_kv_heads, head_dim)[s]`.

    One step: `plan` or `step` of the manager, `apply` here, the forward pass, then `commit` or the next `step`.

    A block comes with what its last owner left in it, and what a new pool holds is undefined. The contract:
    - who runs the model writes K and V of a token to its slot (never to slot -1) before anything of the step reads;
    - who attends to a sequence reads its first `seq_lens` tokens and nothing else. Whatever else gets loaded
      (the tail of the last block, block 0 behind unused table entries) must be selected away, in V too: a
      masked weight of 0 times a NaN is a NaN. Block 0 is all zero, so that the rows of padding stay finite.

    `host` and, on a CPU, `block_table` are tensors over the manager's own memory (shapes and padding in `_kv.pyi`):
    they change with each call of the manager, and only the manager may write them.
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
        max_prefill_tokens: int = 8192,
        stop_tokens: Sequence[int] = (),
    ) -> None:
        self.manager = KVCacheManager(
            num_blocks,
            block_size,
            max_sequences,
            blocks_for(max_tokens_per_sequence, block_size),
            max_prefill_tokens=max_prefill_tokens,
            stop_tokens=list(stop_tokens),
        )
        self.device = torch.device(device)
        self.host = StepTensors(**{name: _shared_tensor(getattr(self.manager, name)) for name in _names(StepTensors)})
        self._host_table = _shared_tensor(self.manager.block_table)
        self._dirty_rows = _shared_tensor(self.manager.dirty_rows)
        self._copies = _shared_tensor(self.manager.copies)
        self.block_table = self._host_table if self.device.type == "cpu" else self._host_table.to(self.device)
        """`[max_sequences + 1, max_blocks_per_sequence]` int32 on the device, up to date after `apply`"""
        self._num_layers, self._dtype = num_layers, dtype
        self._shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.k_pools: list[Tensor] = []
        self.v_pools: list[Tensor] = []
        self.allocate()

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
        memory_share: float | None = None,
        max_prefill_tokens: int = 8192,
        stop_tokens: Sequence[int] = (),
    ) -> KVCache:
        """Sizes from a transformers config.

        Args:
            num_blocks: block 0 included; by default what max_sequences sequences of full length need at once.
            memory_share: in place of `num_blocks`, the share of the device's free memory (CUDA) that the pools take.

        Raises:
            InputError: a pool too small for one sequence of full length, or too large for the manager or the memory.
            ValueError: both are given; a share outside (0, 1] or of a device that is not CUDA.
        """
        text = config.get_text_config()
        sizes: dict[str, Any] = {
            "num_layers": text.num_hidden_layers,
            "num_kv_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            "block_size": block_size,
            "dtype": dtype,
        }
        longest = blocks_for(max_tokens_per_sequence, block_size)
        if memory_share is not None:
            if num_blocks is not None:
                raise ValueError("give num_blocks or memory_share, not both")
            num_blocks = _blocks_in_share(memory_share, torch.device(device), **sizes)
        elif num_blocks is None:
            num_blocks = 1 + max_sequences * longest
        if num_blocks <= longest:
            raise InputError(
                f"a KV cache of {num_blocks - 1} blocks of {block_size} tokens does not hold one sequence of "
                f"{max_tokens_per_sequence} tokens, which takes {longest}: expected more memory (rollout.kv_memory, "
                "rollout.kv_blocks) or a shorter max_sequence"
            )
        try:
            return cls(
                **sizes,
                num_blocks=num_blocks,
                max_sequences=max_sequences,
                max_tokens_per_sequence=max_tokens_per_sequence,
                device=device,
                max_prefill_tokens=max_prefill_tokens,
                stop_tokens=stop_tokens,
            )
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"a KV cache of {num_blocks} blocks of {block_size} tokens for {max_sequences} sequences of "
                f"{max_tokens_per_sequence} tokens cannot be made ({first_line(error)}): expected less of "
                "max_sequence, rollout.max_running or rollout.kv_blocks"
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of all pools; 0 while they are released."""
        return sum(pool.nbytes for pool in (*self.k_pools, *self.v_pools))

    def apply(self, step: Step) -> None:
        """Make the device follow a planned step, before its forward pass: changed rows of the block table, and the
        copies of blocks."""
        if not self.k_pools:
            raise RuntimeError("the KV cache's pools are released: call allocate() before the forward pass")
        if self.block_table is not self._host_table and step.num_dirty_rows:
            dirty = self._dirty_rows[: step.num_dirty_rows].long()
            self.block_table.index_copy_(0, dirty.to(self.device), self._host_table[dirty].to(self.device))
        if step.num_copies:
            source, destination = self._copies[: step.num_copies].to(self.device, torch.int64).unbind(1)
            for pool in (*self.k_pools, *self.v_pools):
                pool.index_copy_(0, destination, pool.index_select(0, source))

    def inputs(self, step: Step) -> StepTensors:
        """The planned step's tensors on the device, without padding. On a CPU they are views of `host`."""
        tokens, members, samples = step.num_tokens, step.num_members, step.num_samples
        ends = {"rows": members, "seq_lens": members, "cu_seqlens": members + 1}
        ends |= {"sample_ids": samples, "sample_positions": samples}
        return StepTensors(
            **{name: getattr(self.host, name)[: ends.get(name, tokens)].to(self.device) for name in _names(StepTensors)}
        )

    def release(self) -> None:
        """Give the pools' memory back, to sleep: everything cached is forgotten.

        Raises RuntimeError while a sequence is running, as its keys and values would be lost: end or preempt it first.
        Those that wait stay.
        """
        if running := self.manager.statistics.running:
            raise RuntimeError(f"{running} sequences are running: release or preempt them before the KV cache's memory")
        self.manager.clear_cache()
        self.k_pools, self.v_pools = [], []

    def allocate(self) -> None:
        """Take the pools' memory (again), at other addresses than before. Does nothing where it is there."""
        if self.k_pools:
            return
        pools = [torch.empty(self._shape, dtype=self._dtype, device=self.device) for _ in range(2 * self._num_layers)]
        for pool in pools:
            pool[0] = 0
        self.k_pools, self.v_pools = pools[: self._num_layers], pools[self._num_layers :]


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    if block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}")
    return -(-tokens // block_size)


def _blocks_in_share(
    share: float, device: torch.device, *, num_layers: int, num_kv_heads: int, head_dim: int, block_size: int,
    dtype: torch.dtype,
) -> int:  # fmt: skip
    if not 0 < share <= 1:
        raise ValueError(f"memory_share must be over 0 and at most 1, got {share}")
    if device.type != "cuda":
        raise ValueError(f"memory_share is of a GPU's free memory, and the device is {device}: give num_blocks")
    torch.cuda.empty_cache()  # what torch keeps for reuse, of models just sharded say, is free too
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * share) // (2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize)


def _names(of: type) -> list[str]:
    return [field.name for field in fields(of)]


def _shared_tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # The manager's views are read-only, which a tensor cannot be, and torch warns of that.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(array)
