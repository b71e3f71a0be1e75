"""What to change where a plan does not fit: one change after another, each planned anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from .config import OptimConfig, PPOConfig
from .errors import InputError
from .fake_models import Shapes
from .memory import Plan, plan

Change = Callable[[PPOConfig], PPOConfig]


@dataclass(frozen=True)
class Remedy:
    """A change, made after those before it."""

    flags: str
    saved: int
    """Bytes off the most that one process takes"""
    plan: Plan
    """With it"""


def remedies(given: Plan, shapes: Shapes) -> Iterator[Remedy]:
    """Changes that lower the peak, the cheapest in time first, until the plan fits or there is no more to change."""
    now = given
    for flags, change, gpus in _candidates(given):
        if now.fits:
            return
        if flags.startswith("--micro-batch") and now.peak == now.phase("rollout").peak:
            continue  # no use, and planning takes seconds
        after = _planned(change(now.config), shapes, now, gpus or now.gpus)
        if after is not None and after.most < now.most:
            yield Remedy(flags, now.most - after.most, after)
            now = after


def _candidates(given: Plan) -> Iterator[tuple[str, Change, int | None]]:
    """(flags, change of the configuration, number of GPUs where that changes)"""
    sequence, tokens = given.lengths.sequence, given.config.micro_batch_tokens
    yield "--rollout.sleep", lambda c: replace(c, rollout=replace(c.rollout, sleep=True)), None
    yield (
        "--policy-optim.moments 8bit --critic-optim.moments 8bit",
        lambda c: _both(c, lambda o: replace(o, moments="8bit")), None,
    )  # fmt: skip
    yield (
        "--policy-optim.offload --critic-optim.offload",
        lambda c: _both(c, lambda o: replace(o, offload=True)), None,
    )  # fmt: skip
    yield "--runtime.checkpointing layer", lambda c: _runtime(c, checkpointing="layer"), None
    while (tokens := tokens // 2) >= sequence:
        yield f"--micro-batch-tokens {tokens}", partial(replace, micro_batch_tokens=tokens), None
    yield "--rollout.kv-memory 0.15", lambda c: replace(c, rollout=replace(c.rollout, kv_memory=0.15)), None
    yield "--runtime.offload-frozen", lambda c: _runtime(c, offload_frozen=True), None
    if given.gpus == 1:
        yield "--lora.rank 64", lambda c: replace(c, lora=replace(c.lora, rank=64)), None
    for gpus in (2, 4, 8, 16, 32, 64):
        if gpus > given.gpus:
            full = lambda c: replace(c, lora=given.config.lora)  # noqa: E731
            yield f"--gpus {gpus} (all weights trained)", full, gpus


def _both(config: PPOConfig, change: Callable[[OptimConfig], OptimConfig]) -> PPOConfig:
    return replace(config, policy_optim=change(config.policy_optim), critic_optim=change(config.critic_optim))


def _runtime(config: PPOConfig, **values: object) -> PPOConfig:
    return replace(config, runtime=replace(config.runtime, **values))  # type: ignore[arg-type]


def _planned(config: PPOConfig, shapes: Shapes, now: Plan, gpus: int) -> Plan | None:
    try:
        return plan(config, shapes, now.chip, lengths=now.lengths, gpus=gpus, machines=now.machines)
    except InputError:
        return None
