"""What policy, reference and critic say about an iteration's rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import MicroBatch
from .models import CausalModel, ScalarModel


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
    minibatches: Sequence[Sequence[MicroBatch]],
    policy: CausalModel | Tensor,
    reference: CausalModel,
    critic: ScalarModel,
    temperature: float,
) -> Scored:
    """Run the three models over the very micro-batches that the update will train on.

    In place of the policy may stand its log-probs `[N]`, where they were recorded while sampling.

    The same shapes through the same operations give the same bits: the first ratio of an update is exactly 1 on a
    CPU, and on a GPU as far as its kernels are deterministic.
    """
    micros = [micro for minibatch in minibatches for micro in minibatch]
    places = torch.cat([micro.places for micro in micros])
    if isinstance(policy, Tensor):
        logprobs, entropy = policy, None
    else:
        policy_side = [policy.logprobs(micro.batch, temperature) for micro in micros]
        logprobs, entropy = (_scatter(places, list(parts)) for parts in zip(*policy_side, strict=True))
    reference_side = [reference.logprobs(micro.batch, temperature) for micro in micros]
    critic_side = [critic.values(micro.batch) for micro in micros]
    members = torch.cat([micro.members for micro in micros])
    return Scored(
        logprobs=logprobs,
        entropy=entropy,
        ref_logprobs=_scatter(places, [logprobs for logprobs, _ in reference_side]),
        values=_scatter(places, [values for values, _ in critic_side]),
        last_values=_scatter(members, [last for _, last in critic_side]),
    )


def _scatter(places: Tensor, parts: list[Tensor]) -> Tensor:
    values = torch.cat(parts)
    return torch.empty_like(values).index_copy_(0, places, values)
