"""What an iteration computes and how long it should take: a model, from a footprint and a chip's ceilings.

An operation takes max(FLOPs / rate of products, bytes / bandwidth), a phase the sum over its operations as eager
PyTorch runs them. Decoding is counted apart, without what CUDA graphs hide: matrices, LM head, keys and values. The
FLOPs that an iteration needs leave out what checkpointing computes again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from .config import PPOConfig
from .fake_models import JUDGES
from .footprint import Footprint, Lengths
from .hardware import Chip

Operations = Counter[tuple[int, int]]


@dataclass(frozen=True)
class Batches:
    """Sizes of an iteration's batches; of one process where it says so."""

    rollouts: int
    minibatches: int
    optimizer_steps: int
    """Of the policy, and as many of the critic"""
    processes: int
    process_rollouts: int
    process_minibatch: int
    micro_batch: int
    """Sequences of a process's micro-batch"""
    micro_batch_tokens: int
    micro_batches: int
    """Of a process's minibatch"""
    reward_micro_batches: int
    """In the scoring by the reward model of a process's rollouts, and by the judge"""
    ptx_micro_batches: int
    running: int
    """Sequences that a process decodes at the same time"""


def process_config(config: PPOConfig, gpus: int) -> PPOConfig:
    """`config` of one process of several: its part of the batches, rounded up."""
    minibatch = -(-config.minibatch_size // gpus)
    return replace(
        config,
        minibatch_size=minibatch,
        rollouts_per_iteration=minibatch * (config.rollouts_per_iteration // config.minibatch_size),
        samples_per_prompt=1,
        extra_in_flight=0,
    )


def plan_batches(config: PPOConfig, footprint: Footprint, lengths: Lengths, gpus: int, running: int) -> Batches:
    """`running`: sequences that fit the KV cache and `max_running`."""
    own, per = process_config(config, gpus), footprint.micro_batch
    minibatches = config.rollouts_per_iteration // config.minibatch_size
    ptx = -(-config.ptx_batch_size // gpus) if config.ptx_coef else 0
    return Batches(
        rollouts=config.rollouts_per_iteration,
        minibatches=minibatches,
        optimizer_steps=minibatches * config.ppo_epochs,
        processes=gpus,
        process_rollouts=own.rollouts_per_iteration,
        process_minibatch=own.minibatch_size,
        micro_batch=per,
        micro_batch_tokens=per * lengths.sequence,
        micro_batches=-(-own.minibatch_size // per),
        reward_micro_batches=-(-own.rollouts_per_iteration // footprint.rewarded),
        ptx_micro_batches=-(-ptx // per),
        running=running,
    )


@dataclass(frozen=True)
class Work:
    """Of one process in one phase of an iteration."""

    needed: float
    """FLOPs without what is computed again"""
    flops: float
    traffic: float
    """Bytes read and written"""
    seconds: float | None
    """None: the chip's ceilings are not known"""
    tokens: int
    """That pass through a model, once for each model and pass"""


def phase_work(
    config: PPOConfig, footprint: Footprint, lengths: Lengths, batches: Batches, chip: Chip
) -> dict[str, Work]:
    """rollout, score, update policy, update critic."""
    rows, steps = batches.process_rollouts, batches.optimizer_steps
    tokens = rows * lengths.sequence
    sums = _Sums(footprint, lengths)
    asked = scored(config, footprint, batches)
    score: Operations = Counter()
    for name, micro_batches in asked.items():
        _add(score, footprint.usage[f"score {name}"].operations, micro_batches)
    updates = {}
    for name in ("policy", "critic"):
        step = footprint.usage[f"step {name}"].operations
        micro = footprint.usage[f"update {name}"].operations - step
        updates[name] = Counter[tuple[int, int]]()
        _add(updates[name], micro, steps * batches.micro_batches)
        _add(updates[name], step, steps)
    if config.ptx_coef:
        _add(updates["policy"], footprint.usage["ptx"].operations, steps * batches.ptx_micro_batches)
    adapters, epochs = config.lora.rank > 0, config.ppo_epochs
    ptx = steps * -(-config.ptx_batch_size // batches.processes) if config.ptx_coef else 0
    rollout, sampled = _rollout(config, footprint, lengths, batches, sums)
    return {
        "rollout": _work(rollout, sampled, tokens, chip),
        "score": _work(score, sum(rows * sums.forward(name) for name in asked), len(asked) * tokens, chip),
        "update policy": _work(
            updates["policy"], sums.update("policy", adapters) * (rows * epochs + ptx),
            epochs * tokens + ptx * lengths.sequence, chip,
        ),
        "update critic": _work(
            updates["critic"], sums.update("critic", adapters) * rows * epochs, epochs * tokens, chip
        ),
    }  # fmt: skip


def scored(config: PPOConfig, footprint: Footprint, batches: Batches) -> dict[str, int]:
    """The models that score a process's rollouts, and in how many micro-batches."""
    asked = (["policy"] if config.old_logprobs == "recomputed" else []) + ["reference", "critic"]
    judges = [name for name in JUDGES if name in footprint.products]
    return {
        **dict.fromkeys(asked, batches.minibatches * batches.micro_batches),
        **dict.fromkeys(judges, batches.reward_micro_batches),
    }


class _Sums:
    """FLOPs of one sequence."""

    def __init__(self, footprint: Footprint, lengths: Lengths) -> None:
        self.footprint, self.lengths = footprint, lengths

    def forward(self, name: str) -> float:
        """Through a model once, its head on the response's rows alone."""
        length = self.lengths.sequence
        head = 2 * self.footprint.head * self.lengths.response if name in ("policy", "reference") else 0
        return 2 * self.footprint.products[name] * length + self.attention(length * (length + 1) // 2) + head

    def update(self, name: str, adapters: bool) -> float:
        """Forward, gradients of the inputs, and gradients of the weights, which the base of adapters has none of."""
        length = self.lengths.sequence
        weights = self.forward(name) - self.attention(length * (length + 1) // 2) if adapters else 0
        return 3 * self.forward(name) - weights

    def attention(self, pairs: float) -> float:
        return 4 * pairs * self.footprint.attention_width


def _rollout(
    config: PPOConfig, footprint: Footprint, lengths: Lengths, batches: Batches, sums: _Sums
) -> tuple[Operations, float]:
    """Operations, and FLOPs, of sampling a process's responses: prompts once, then token by token."""
    rows, running = batches.process_rollouts, batches.running
    prompts = -(-rows // config.samples_per_prompt)
    products, size = footprint.products["policy"], footprint.itemsize
    operations: Operations = Counter()
    _add(operations, footprint.usage["prefill"].operations, -(-prompts // footprint.prefilled))
    context = lengths.prompt + lengths.response / 2
    left = rows
    while left > 0:
        together = min(left, running)
        left -= together
        token = {
            (2 * products * together, products * size): 1,
            (2 * footprint.head * together, footprint.head * size + 8 * together * footprint.vocabulary): 1,
            (int(sums.attention(context * together)), int(footprint.kv_token * context * together)): 1,
        }
        _add(operations, Counter(token), lengths.response)
    needed = prompts * (2 * products * lengths.prompt + sums.attention(lengths.prompt * (lengths.prompt + 1) / 2))
    needed += rows * lengths.response * (2 * (products + footprint.head) + sums.attention(context))
    return operations, needed


def _add(total: Operations, operations: Operations, times: int) -> None:
    for key, count in operations.items():
        total[key] += count * times


def _work(operations: Operations, needed: float, tokens: int, chip: Chip) -> Work:
    seconds = None
    if chip.rate is not None and chip.bandwidth is not None:
        seconds = sum(
            count * max(flops / chip.rate, traffic / chip.bandwidth) for (flops, traffic), count in operations.items()
        )
    return Work(
        needed=needed,
        flops=sum(flops * count for (flops, _), count in operations.items()),
        traffic=sum(traffic * count for (_, traffic), count in operations.items()),
        seconds=seconds,
        tokens=tokens,
    )
