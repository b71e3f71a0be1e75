"""The memory, FLOPs and memory traffic of a run's steps, from the engine's own code on tensors without contents.

Policy, critic, reference and reward model are built from their configurations under `FakeTensorMode`; then one step of
each phase runs for the largest micro-batches there are: prefill and decode, scoring, two micro-batches and an
optimizer step of policy and of critic. What is a tensor is counted, workspaces inside the operations of
`ppomax.kernels` included (`live_bytes.py`); what a GPU's libraries take beside tensors is not.

For a GPU the tensors are on "meta", the Triton paths' launches are recorded, and packed sequences attend by torch's
kernel for them, which keeps and allocates what flash-attn's does.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from .communication import Sizes
from .config import PPOConfig
from .fake_models import Shapes
from .live_bytes import LiveBytes, Usage

TRANSIENT = ("activations", "workspaces", "gradients")  # parts of a peak that one phase alone has


@dataclass(frozen=True)
class Lengths:
    """Tokens that every prompt and every response of a plan have."""

    prompt: int
    response: int

    @property
    def sequence(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True)
class Trained:
    """Of a model that is trained: numbers of its parameters, and bytes."""

    parameters: int
    gradients: int
    low_bits: int
    moments: int


@dataclass(frozen=True)
class Footprint:
    """Bytes and work of one process that holds everything."""

    weights: dict[str, int]
    """Of policy, critic, reference, reward, judge; what several share counts with the first of them"""
    parameters: dict[str, int]
    """All of each model's"""
    dtype: str
    sizes: dict[str, Sizes]
    """Of each model, by what is gathered together"""
    layer: dict[str, int]
    """Bytes of each model's largest decoder layer"""
    itemsize: int
    """Bytes of a weight"""
    trained: dict[str, Trained]
    """policy, critic"""
    products: dict[str, int]
    """Parameters of each model's trunk that take part in matrix products"""
    head: int
    """Parameters of the LM head"""
    vocabulary: int
    attention_width: int
    """Heads times their size, summed over the layers"""
    kv_block: int
    """Bytes of one block of the KV cache in all layers"""
    kv_token: int
    """Bytes of one token there"""
    buffers: int
    """Of the rollout engine, beside that cache"""
    usage: dict[str, Usage]
    """prefill, decode; `score NAME` of a micro-batch; `update NAME` of a micro-batch and an optimizer step, with
    gradients there before where a minibatch has several; `step NAME` of that step alone; `ptx` of a micro-batch"""
    micro_batch: int
    """Sequences of a micro-batch"""
    rewarded: int
    """Of one of the reward model, which goes over all rollouts of an iteration together, and of the judge"""
    running: int
    """Sequences of a decode step"""
    prefilled: int
    """Prompts of a prefill step"""

    def transients(self, name: str) -> list[dict[str, int]]:
        """The parts of a phase's peak, and of its peak beside gradients, that are there in it alone."""
        usage = self.usage[name]
        return [{tag: parts.get(tag, 0) for tag in TRANSIENT} for parts in (usage.parts, usage.apart)]


def measure(config: PPOConfig, shapes: Shapes, lengths: Lengths, *, on_gpu: bool) -> Footprint:
    """The footprint of a run of models of these shapes."""
    return _measure(_relevant(config), shapes, lengths, on_gpu)


def _relevant(config: PPOConfig) -> PPOConfig:
    """`config` without what changes no step, so that plans which differ in that alone share a footprint."""
    plain = PPOConfig()
    offs = {name: replace(getattr(config, name), offload=False) for name in ("policy_optim", "critic_optim")}
    rollout = replace(config.rollout, sleep=False, kv_memory=0.3, kv_blocks=None)
    return replace(config, iterations=plain.iterations, rollout=rollout, **offs)


@cache
def _measure(config: PPOConfig, shapes: Shapes, lengths: Lengths, on_gpu: bool) -> Footprint:
    from .rehearsal import Rehearsal

    with ExitStack() as stack:
        if on_gpu:
            from ..kernels.gpu.launch import recording

            launches: list[Any] = stack.enter_context(recording("sm_90"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        live = stack.enter_context(LiveBytes(launches if on_gpu else None, config.runtime.deterministic))
        return Rehearsal(config, shapes, lengths, on_gpu, live).run()
