"""The nouns: sequences, rollouts, and the packed batch that every model sees. No padding anywhere.

Conventions. Per-token fields (log-probs, values, advantages, ...) are indexed by the learned token that they belong
to and are packed: `[N]` over all learned tokens of the batch in order. Token t is predicted by the hidden state at
position t - 1, so the heads run on `rows` alone, which is worked out here, on the host, once per batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """What a response is sampled for."""

    messages: list[dict[str, str]]
    """Chat messages, the last one the user's: what reward functions see."""
    tokens: list[int]


@dataclass(frozen=True)
class Request:
    """A response to sample, from its start or from where it was left."""

    prompt: list[int]
    seed: int
    """Of its random numbers, which depend on it and on the token's place alone: 0 to 2^63 - 1."""
    limit: int | None = None
    """Tokens of the response at most; None: the engine's `max_response`."""
    response: list[int] = field(default_factory=list)
    """Drawn already"""
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Rollout:
    """One sampled response."""

    prompt: list[int]
    response: list[int]
    """Its last token is an end-of-sequence token where `finished`."""
    logprobs: Tensor
    """`[len(response)]` float32 on the CPU: at temperature 1 on unprocessed logits, recorded while sampling."""
    finished: bool
    """False: cut off at the limit."""
    versions: list[int]
    """Version of the weights that drew each token of the response."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.response

    @property
    def mask(self) -> list[bool]:
        """True on the response's tokens."""
        return [False] * len(self.prompt) + [True] * len(self.response)


@dataclass(frozen=True)
class PackedBatch:
    """S sequences end to end: T tokens, of which N are learned (response or assistant tokens)."""

    tokens: Tensor
    """`[T]` int64"""
    positions: Tensor
    """`[T]` int64; restart at 0 with each sequence"""
    rows: Tensor
    """`[N]` int64: index of the hidden state that predicts each learned token"""
    labels: Tensor
    """`[N]` int64: the learned tokens"""
    last: Tensor
    """`[S]` int64: index of each sequence's last token"""
    lengths: tuple[int, ...]
    """S tokens counts, on the host"""
    row_lengths: tuple[int, ...]
    """S counts of learned tokens, on the host"""

    @property
    def num_rows(self) -> int:
        return sum(self.row_lengths)


def pack(tokens: Sequence[list[int]], masks: Sequence[Sequence[bool]], device: torch.device) -> PackedBatch:
    """Put sequences end to end.

    None at all make a batch of one token that stands for nothing: no row, no last token, something to run layers on.

    Args:
        tokens: S lists of token ids, none empty.
        masks: S lists as long, True on learned tokens. A sequence's first token cannot be learned: nothing
            predicts it.

    Raises:
        ValueError: an empty sequence, a mask of another length, or a first token that is marked as learned.
    """
    if not tokens:
        return _filler(device)
    lengths = tuple(map(len, tokens))
    mask_lengths = tuple(map(len, masks))
    if 0 in lengths or lengths != mask_lengths:
        raise ValueError(f"sequences have lengths {lengths} and masks {mask_lengths}, expected equal, above 0")
    flat = np.fromiter((token for sequence in tokens for token in sequence), np.int64, sum(lengths))
    mask = np.fromiter((flag for sequence in masks for flag in sequence), bool, sum(lengths))
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    if mask[starts].any():
        raise ValueError("the first token of a sequence is marked as learned, but no hidden state predicts it")
    learned = np.flatnonzero(mask)
    row_lengths = np.add.reduceat(mask, starts, dtype=np.int64)
    positions = np.arange(len(flat)) - np.repeat(starts, lengths)
    on = lambda array: torch.from_numpy(array).to(device, non_blocking=True)  # noqa: E731
    return PackedBatch(
        tokens=on(flat),
        positions=on(positions),
        rows=on(learned - 1),
        labels=on(flat[learned]),
        last=on(ends - 1),
        lengths=lengths,
        row_lengths=tuple(row_lengths.tolist()),
    )


def _filler(device: torch.device) -> PackedBatch:
    one, none = torch.zeros(1, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int64, device=device)
    return PackedBatch(one, one, rows=none, labels=none, last=none, lengths=(1,), row_lengths=(0,))


def pack_rollouts(rollouts: Sequence[Rollout], device: torch.device) -> PackedBatch:
    """Prompts and responses end to end; the learned tokens are the responses'."""
    return pack([r.tokens for r in rollouts], [r.mask for r in rollouts], device)


def cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    """`[len + 1]` int32: 0, l_0, l_0 + l_1, ..."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def split_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in order, cut into groups of at most `budget` tokens; a longer sequence stands alone."""
    groups: list[list[int]] = []
    used = budget + 1
    for index, length in enumerate(lengths):
        if used + length > budget:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += length
    return groups


def deal(weights: Sequence[int], hands: int) -> list[list[int]]:
    """Indices of `weights`, dealt into hands of nearly equal sums: the heaviest first, each to the lightest hand.

    Each hand is in order. The sums differ by at most the largest weight.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    sums = [0] * hands
    for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = sums.index(min(sums))
        dealt[lightest].append(index)
        sums[lightest] += weights[index]
    return [sorted(hand) for hand in dealt]


def split_evenly(lengths: Sequence[int], budget: int, processes: int) -> list[list[list[int]]]:
    """For each process its sequences, dealt by tokens and cut as by `split_by_tokens`, as many groups for each: those
    of the ones that would have fewer end with empty groups."""
    plans = []
    for hand in deal(lengths, processes):
        groups = split_by_tokens([lengths[i] for i in hand], budget)
        plans.append([[hand[i] for i in group] for group in groups])
    most = max(map(len, plans))
    return [plan + [[] for _ in range(most - len(plan))] for plan in plans]


def deal_requests(requests: Sequence[Request], limit: int, processes: int) -> list[list[int]]:
    """Indices of each process's requests. Those beside each other that start on one prompt stay together; balanced
    by the tokens that are still to come at most, `limit` being that of a response."""
    groups: list[list[int]] = []
    for index, request in enumerate(requests):
        same = groups and not request.response and requests[groups[-1][0]].prompt == request.prompt
        if same and not requests[groups[-1][0]].response:
            groups[-1].append(index)
        else:
            groups.append([index])
    weights = [sum(limit - len(requests[i].response) for i in group) for group in groups]
    return [[i for group in hand for i in groups[group]] for hand in deal(weights, processes)]


def quotas(counts: Sequence[int], total: int) -> list[int]:
    """`total` <= sum(counts) split in proportion: whole numbers, none above its count."""
    ends = [0, *accumulate(counts)]
    parts = [total * end // max(ends[-1], 1) for end in ends]
    return [high - low for low, high in pairwise(parts)]


@dataclass(frozen=True)
class MicroBatch:
    """Rollouts that pass through a model together."""

    batch: PackedBatch
    members: Tensor
    """`[S]` int64: which rollouts of the iteration"""
    places: Tensor
    """`[N]` int64: their tokens' places in the iteration's per-token fields"""


@dataclass(frozen=True)
class Minibatch:
    """The rollouts of one optimizer step: this process's part of them in micro-batches, over which it iterates."""

    micro_batches: list[MicroBatch]
    size: int
    """Rollouts, of all processes"""
    rows: int
    """Response tokens, of all processes: the losses' denominator"""

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)

    def __len__(self) -> int:
        return len(self.micro_batches)


def plan_minibatches(
    rollouts: Sequence[Rollout],
    minibatch_size: int,
    budget: int,
    seed: Sequence[int] | None,
    device: torch.device,
    *,
    rank: int = 0,
    processes: int = 1,
) -> list[Minibatch]:
    """Shuffle the rollouts into minibatches (one optimizer step each), each cut into micro-batches by tokens.

    The minibatches are the same whatever the number of processes.

    Args:
        budget: tokens per micro-batch at most.
        seed: of the shuffle; None: in their own order.
    """
    order = np.arange(len(rollouts))
    if seed is not None:
        order = np.random.default_rng(np.random.SeedSequence(list(seed))).permutation(len(rollouts))
    starts = np.cumsum([0, *(len(rollout.response) for rollout in rollouts)])
    minibatches = []
    for chosen in order.reshape(-1, minibatch_size):
        groups = split_evenly([len(rollouts[i].tokens) for i in chosen], budget, processes)[rank]
        micro_batches = [_micro_batch(rollouts, chosen[group], starts, device) for group in groups]
        rows = sum(len(rollouts[i].response) for i in chosen)
        minibatches.append(Minibatch(micro_batches, minibatch_size, rows))
    return minibatches


def _micro_batch(
    rollouts: Sequence[Rollout], members: np.ndarray, starts: np.ndarray, device: torch.device
) -> MicroBatch:
    places = [np.arange(starts[i], starts[i + 1]) for i in members]
    return MicroBatch(
        batch=pack_rollouts([rollouts[i] for i in members], device),
        members=torch.from_numpy(members).to(device),
        places=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *places])).to(device),
    )
