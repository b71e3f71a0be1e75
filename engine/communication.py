"""Bytes that several processes exchange in an iteration, and how long they travel: a model, nothing of it is measured.

What FSDP2 gathers and reduces is known (`bench/bench_communication.py` counts it in a real run). Weights are gathered
whole once for the rollouts and for each forward pass, those of layers again for each backward pass, after which
gradients are reduced, and summed over the copies of the weights where there are several.

How it travels is the model. Of a tensor a GPU receives what others have. What a machine lacks comes into it once,
through the network adapters of all its GPUs that share the tensor, and is passed on inside, as NCCL's rings do. How
long each message waits to be sent is not in it, which counts among many GPUs: of the 400 GB/s that this gives 8 H100
with 8 adapters, 256 GPUs were seen to reach 200 in gathering 2 GB (github.com/NVIDIA/nccl/issues/1218).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple


@dataclass(frozen=True)
class Machines:
    """What the GPUs of a run stand in."""

    gpus: int = 8
    """Of one machine"""
    network: float = 50e9
    """Bytes/s of each GPU to other machines, in one direction: an assumption, an adapter of 400 Gbit/s each"""


USUAL = Machines()


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights."""

    layers: int
    rest: int
    """Embeddings, last norm, head"""
    reduced: float = 1.0
    """Bytes of a gradient on its way for each byte of the weight"""

    @property
    def all(self) -> int:
        return self.layers + self.rest


class Payload(NamedTuple):
    """Bytes of the whole tensors that are put together, and summed."""

    gathered: float = 0.0
    reduced: float = 0.0


def payloads(models: Mapping[str, Sizes], scored: Mapping[str, int], updated: Mapping[str, int]) -> dict[str, Payload]:
    """Of each phase of an iteration.

    Args:
        scored: micro-batches of a process in the scoring by each model.
        updated: in the updates of policy and critic.
    """
    passes = {f"update {name}": (models[name], count) for name, count in updated.items()}
    return {
        "rollout": Payload(models["policy"].all),
        "score": Payload(sum(count * models[name].all for name, count in scored.items())),
        **{
            phase: Payload(count * (model.all + model.layers), count * model.all * model.reduced)
            for phase, (model, count) in passes.items()
        },
    }


class Traffic(NamedTuple):
    """Bytes that come to a GPU."""

    received: float
    """From all others"""
    inside: float
    """Over the links of its machine"""
    network: float
    """Through its network adapter, for itself or to be passed on"""

    def seconds(self, link: float, network: float) -> float:
        """At these bytes/s, if no computation hides it; both are busy at the same time."""
        return max(self.inside / link, self.network / network)


def traffic(payload: Payload, gpus: int, shards: int, machines: Machines) -> Traffic:
    """What `payload` moves where each `shards` neighbours of the GPUs share a copy of the weights."""
    whole, copies = payload.gathered + payload.reduced, gpus // shards
    among = whole * (shards - 1) / shards
    between = 2 * (copies - 1) / copies * payload.reduced / shards
    if gpus <= machines.gpus:
        return Traffic(among + between, among + between, 0.0)
    fewest = gcd(shards, machines.gpus)  # of those that share a copy, in a machine
    together = max(1, machines.gpus // shards)  # copies in a machine
    entering = whole * (shards - fewest) / (shards * fewest) + between / together
    return Traffic(among + between, among + (between if together > 1 else 0.0), entering)
