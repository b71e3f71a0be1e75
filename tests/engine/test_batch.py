"""Packing against a loop over tokens, splitting by tokens, minibatch plans."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ppomax.engine.batch import PackedBatch, Rollout, cumulative, pack, pack_rollouts, plan_minibatches, split_by_tokens

CPU = torch.device("cpu")
Sequences = list[list[tuple[int, bool]]]


@st.composite
def sequences(draw: Callable) -> Sequences:
    """Lists of (token, learned), none empty, no first token learned."""
    pair = st.tuples(st.integers(0, 99), st.booleans())
    tails = draw(st.lists(st.lists(pair, max_size=6), min_size=1, max_size=6))
    return [[(draw(st.integers(0, 99)), False), *tail] for tail in tails]


def packed(drawn: Sequences) -> PackedBatch:
    return pack([[t for t, _ in s] for s in drawn], [[m for _, m in s] for s in drawn], CPU)


def rollout(prompt: int, response: int, first: int = 0) -> Rollout:
    """A rollout whose tokens are `first`, `first` + 1, ..."""
    tokens = list(range(first, first + prompt + response))
    return Rollout(tokens[:prompt], tokens[prompt:], torch.zeros(response), finished=True, versions=[0] * response)


@given(sequences())
def test_pack_against_a_loop(drawn: Sequences) -> None:
    tokens, positions, rows, labels, last, row_lengths = [], [], [], [], [], []
    for sequence in drawn:
        for position, (token, learned) in enumerate(sequence):
            if learned:
                rows.append(len(tokens) - 1)
                labels.append(token)
            tokens.append(token)
            positions.append(position)
        last.append(len(tokens) - 1)
        row_lengths.append(sum(learned for _, learned in sequence))
    batch = packed(drawn)
    assert batch.tokens.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.rows.tolist() == rows
    assert batch.labels.tolist() == labels
    assert batch.last.tolist() == last
    assert batch.lengths == tuple(map(len, drawn))
    assert batch.row_lengths == tuple(row_lengths)
    assert batch.num_rows == len(labels)


def test_types_of_a_packed_batch() -> None:
    batch = packed([[(5, False), (6, True)], [(7, False)]])
    fields = (batch.tokens, batch.positions, batch.rows, batch.labels, batch.last)
    assert {field.dtype for field in fields} == {torch.int64}


@pytest.mark.parametrize(
    ("tokens", "masks", "match"),
    [
        ([[1, 2], [3, 4]], [[False, True], [True, True]], "first token of a sequence is marked as learned"),
        ([[1, 2], [], [3]], [[False, True], [], [False]], r"lengths \(2, 0, 1\)"),
        ([[1, 2], []], [[False, True], []], r"lengths \(2, 0\)"),
        ([[1, 2], [3]], [[False], [False]], r"masks \(1, 1\)"),
        ([[1, 2], [3]], [[False, True], [False, True]], r"masks \(2, 2\)"),
        ([[1, 2], [3]], [[False, True]], r"masks \(2,\)"),
    ],
    ids=["first-learned", "empty", "empty-last", "mask-short", "mask-long", "mask-missing"],
)
def test_unusable_sequences(tokens: list[list[int]], masks: list[list[bool]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pack(tokens, masks, CPU)


def test_pack_rollouts_learns_the_responses() -> None:
    batch = pack_rollouts([rollout(3, 2, first=10), rollout(1, 1, first=20), rollout(2, 3, first=30)], CPU)
    assert batch.tokens.tolist() == [10, 11, 12, 13, 14, 20, 21, 30, 31, 32, 33, 34]
    assert batch.labels.tolist() == [13, 14, 21, 32, 33, 34]
    assert batch.tokens[batch.rows].tolist() == [12, 13, 20, 31, 32, 33]
    assert batch.tokens[batch.last].tolist() == [14, 21, 34]
    assert batch.row_lengths == (2, 1, 3)


def test_cumulative() -> None:
    assert cumulative([2, 0, 3], CPU).tolist() == [0, 2, 2, 5]
    assert cumulative([], CPU).tolist() == [0]
    assert cumulative([2], CPU).dtype == torch.int32


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_split_by_tokens(lengths: list[int], budget: int) -> None:
    groups = split_by_tokens(lengths, budget)
    assert [index for group in groups for index in group] == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in group) for group in groups]
    for group, used in zip(groups, sums, strict=True):
        assert group
        assert used <= budget or len(group) == 1
    for used, following in zip(sums, groups[1:], strict=False):
        assert used + lengths[following[0]] > budget, "a group ends before it is full"


@st.composite
def plans(draw: Callable) -> tuple[list[Rollout], int, int, list[int]]:
    """(rollouts with distinct tokens, minibatch size, budget, seed)"""
    size, count = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    lengths = [draw(st.tuples(st.integers(1, 5), st.integers(1, 5))) for _ in range(size * count)]
    rollouts = [rollout(p, r, first=100 * i) for i, (p, r) in enumerate(lengths)]
    return rollouts, size, draw(st.integers(1, 40)), draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))


@given(plans())
def test_plan_minibatches(plan: tuple[list[Rollout], int, int, list[int]]) -> None:
    rollouts, size, budget, seed = plan
    minibatches = plan_minibatches(rollouts, size, budget, seed, CPU)
    field = torch.tensor([token for r in rollouts for token in r.response])
    members = [[i for micro in minibatch for i in micro.members.tolist()] for minibatch in minibatches]
    assert all(len(minibatch) == size for minibatch in members)
    assert sorted(i for minibatch in members for i in minibatch) == list(range(len(rollouts)))
    for micro in (micro for minibatch in minibatches for micro in minibatch):
        own = [rollouts[i] for i in micro.members]
        assert micro.batch.tokens.tolist() == [token for r in own for token in r.tokens]
        assert field[micro.places].tolist() == micro.batch.labels.tolist()
        assert sum(micro.batch.lengths) <= budget or len(own) == 1


def test_the_seed_decides_the_order() -> None:
    rollouts = [rollout(1, 1) for _ in range(32)]

    def order(*seed: int) -> list[int]:
        plan = plan_minibatches(rollouts, 8, 5, seed, CPU)
        return [i for minibatch in plan for micro in minibatch for i in micro.members.tolist()]

    assert order(0, 2, 7, 0) == order(0, 2, 7, 0)
    orders = {tuple(order(*seed)) for seed in ((0, 2, 7, 0), (0, 2, 7, 1), (0, 2, 8, 0), (1, 2, 7, 0))}
    assert len(orders) == 4
    assert tuple(range(32)) not in orders
