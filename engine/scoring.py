"""What policy, reference and critic say about an iteration's rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import MicroBatch, Minibatch
from .models import CausalModel, ScalarModel
from .parallel import ALONE, Ranks


@dataclass(frozen=True)
class Scored:
    """Per-token fields `[N]` float32, packed over all responses of the iteration in order."""

    logprobs: Tensor
    entropy: Tensor | None
    """None where the policy was not asked"""
    ref_logprobs: Tensor
    values: Tensor
    """Of the state before each token"""
    last_values: Tensor
    """`[S]`: of the state after each response's last token"""


@torch.no_grad()
def score_rollouts(
    minibatches: Sequence[Minibatch],
    policy: CausalModel | Tensor,
    reference: CausalModel,
    critic: ScalarModel,
    temperature: float,
    ranks: Ranks = ALONE,
) -> Scored:
    """Run the three models over the very micro-batches that the update will train on; each process over its own.

    In place of the policy may stand its log-probs `[N]`, where they were recorded while sampling.

    The same shapes through the same operations give the same bits: the first ratio of an update is exactly 1 on a
    CPU, and on a GPU as far as its kernels are deterministic.
    """
    if isinstance(policy, Tensor):
        logprobs, entropy = policy, None
    else:
        logprobs, entropy = logprobs_of(policy, minibatches, temperature, ranks)
    critic_side = [critic.values(micro.batch) for micro in _micro_batches(minibatches)]
    return Scored(
        logprobs=logprobs,
        entropy=entropy,
        ref_logprobs=logprobs_of(reference, minibatches, temperature, ranks)[0],
        values=_of_tokens(minibatches, [values for values, _ in critic_side], ranks),
        last_values=_of_rollouts(minibatches, [last for _, last in critic_side], ranks),
    )


def logprobs_of(
    model: CausalModel, minibatches: Sequence[Minibatch], temperature: float = 1.0, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) `[N]` of all response tokens, each process computing its own."""
    with ranks.at_hand(model):
        parts = [model.logprobs(micro.batch, temperature) for micro in _micro_batches(minibatches)]
    logprobs, entropy = (_of_tokens(minibatches, part, ranks) for part in zip(*parts, strict=True))
    return logprobs, entropy


def _micro_batches(minibatches: Sequence[Minibatch]) -> list[MicroBatch]:
    return [micro for minibatch in minibatches for micro in minibatch]


def _of_tokens(minibatches: Sequence[Minibatch], parts: Sequence[Tensor], ranks: Ranks) -> Tensor:
    places = [micro.places for micro in _micro_batches(minibatches)]
    return _whole(parts, places, sum(minibatch.rows for minibatch in minibatches), ranks)


def _of_rollouts(minibatches: Sequence[Minibatch], parts: Sequence[Tensor], ranks: Ranks) -> Tensor:
    members = [micro.members for micro in _micro_batches(minibatches)]
    return _whole(parts, members, sum(minibatch.size for minibatch in minibatches), ranks)


def _whole(parts: Sequence[Tensor], places: Sequence[Tensor], count: int, ranks: Ranks) -> Tensor:
    """`[count]`, put together from what each process has."""
    values = torch.cat(list(parts))
    return ranks.sum(values.new_zeros(count).index_copy_(0, torch.cat(list(places)), values))
