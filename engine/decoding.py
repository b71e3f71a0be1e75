"""The forward pass of a planned step: eager, or a CUDA graph where every sequence decodes one token."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._kv import Step
from .attention import Paged
from .flash import KERNELS, check_fits
from .kv_cache import KVCache, StepTensors
from .models import CausalModel

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # batches with a graph of their own
_SIZE_STEP = 64  # between those beyond


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    hidden: Tensor


class Decoder:
    """Runs a policy over the steps that the manager of `cache` plans.

    With `graphs`, on CUDA, steps in which every sequence computes one token run as CUDA graphs, one for each of a few
    batch sizes: the batch is filled up to the next size with rows that write nothing. A graph holds the addresses of
    weights and pools, so `forget` has to come before either moves, as those of a sharded policy do after each batch.
    Updates of the weights in place need none.

    `kernel`: what attends to the cache, as `flash.resolve_paged` names it; InputError where the policy does not fit it.
    """

    def __init__(self, policy: CausalModel, cache: KVCache, *, graphs: bool, kernel: str = "triton") -> None:
        check_fits(kernel, policy.config)
        self.policy, self.cache, self.uses_graphs, self.kernel = policy, cache, graphs, kernel
        self.graphs: dict[int, _Graph] = {}
        self.fixed = _fixed_inputs(cache) if graphs else None
        """What graphs read: the same memory for all of them"""
        self.stream: Any = None
        """That graphs are captured on: one, so that libraries set up one workspace for all of them"""
        self.pool: Any = None
        """Memory that graphs work in, one after another; what one leaves in `hidden` is kept"""

    def forget(self) -> None:
        """Drop all graphs; they are captured again when they are needed."""
        self.graphs.clear()
        self.pool = None

    def hidden(self, step: Step) -> Tensor:
        """Last hidden states `[N, H]` that the step's samples are drawn from."""
        self.cache.apply(step)
        if self.fixed is not None and step.num_decodes == step.num_members:
            return self._replay(self.fixed, step.num_members)
        inputs = self.cache.inputs(step)
        longest = int(self.cache.host.cu_seqlens[: step.num_members + 1].diff().max())
        return self._forward(inputs, longest)[inputs.sample_positions]

    def _forward(self, inputs: StepTensors, longest: int = 1) -> Tensor:
        ends = F.pad(inputs.seq_lens.cumsum(0, dtype=torch.int32), (1, 0)) if self.kernel in KERNELS else None
        attention = Paged(
            self.cache.k_pools,
            self.cache.v_pools,
            self.cache.block_table.index_select(0, inputs.rows),
            inputs.seq_lens,
            inputs.cu_seqlens,
            inputs.slot_mapping,
            exact=self.policy.exact,
            kernel=self.kernel,
            cu_seqlens_k=ends,
            longest=longest,
        )
        return self.policy.trunk(inputs.tokens, inputs.positions, attention)

    def _replay(self, fixed: StepTensors, members: int) -> Tensor:
        size = padded_size(members, self.cache.manager.max_sequences)
        for name in ("tokens", "positions", "slot_mapping", "rows", "seq_lens"):  # what is past the members is padding
            getattr(fixed, name)[:size].copy_(getattr(self.cache.host, name)[:size], non_blocking=True)
        if size not in self.graphs:
            self.graphs[size] = self._capture(_first(fixed, size))
        self.graphs[size].graph.replay()
        return self.graphs[size].hidden[:members]

    def _capture(self, inputs: StepTensors) -> _Graph:
        self.stream = self.stream or torch.cuda.Stream(self.cache.device)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        stream, current = self.stream, torch.cuda.current_stream(self.cache.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._forward(inputs)  # kernels are compiled and libraries set up before; it writes what the replay writes
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream):
            hidden = self._forward(inputs)
        return _Graph(graph, hidden)


def padded_size(members: int, most: int) -> int:
    """The batch size that a step of so many members runs at; `most` is the largest there is."""
    beyond = range(_SIZES[-1] + _SIZE_STEP, most + _SIZE_STEP, _SIZE_STEP)
    return min(next(size for size in (*_SIZES, *beyond) if size >= members), most)


def _fixed_inputs(cache: KVCache) -> StepTensors:
    """Padding for as many decodes as there are rows."""
    rows = cache.manager.max_sequences
    ends = torch.arange(rows + 1, dtype=torch.int32)
    padding = {
        field.name: getattr(cache.host, field.name)[:rows].to(cache.device, copy=True) for field in fields(StepTensors)
    }
    return StepTensors(**{**padding, "cu_seqlens": ends.to(cache.device)})


def _first(inputs: StepTensors, size: int) -> StepTensors:
    ends = {"cu_seqlens": size + 1}
    return StepTensors(**{f.name: getattr(inputs, f.name)[: ends.get(f.name, size)] for f in fields(StepTensors)})
