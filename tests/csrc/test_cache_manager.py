"""The KV-cache manager against a slow model of it, and its edges: exhaustion, wrong calls, lifetime."""

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ppomax.engine._kv import KVCacheManager

COUNTS = ("free_blocks", "blocks_in_use", "reserved_blocks", "rows_in_use", "peak_blocks_in_use")


def counts(manager: KVCacheManager) -> dict[str, int]:
    return {name: getattr(manager.statistics, name) for name in COUNTS}


def snapshot(manager: KVCacheManager) -> tuple[Any, ...]:
    arrays = (manager.block_table, manager.lengths, manager.slot_mapping)
    return *(array.tobytes() for array in arrays), *counts(manager).values()


def raises_and_changes_nothing(
    manager: KVCacheManager, call: Callable[[], Any], match: str, error: type[Exception] = ValueError
) -> None:
    before = snapshot(manager)
    with pytest.raises(error, match=match):
        call()
    assert snapshot(manager) == before
    manager.check_integrity()


def int32(*rows: int) -> np.ndarray:
    return np.array(rows, np.int32)


class NaiveCache:
    """What the manager promises, without blocks: every row has its tokens and a limit."""

    def __init__(self, num_blocks: int, block_size: int, max_sequences: int, max_blocks: int) -> None:
        self.blocks, self.block_size, self.max_sequences = num_blocks - 1, block_size, max_sequences
        self.most_tokens = min(max_blocks, self.blocks) * block_size
        self.tokens: dict[int, list[int]] = {}
        self.max_tokens: dict[int, int] = {}
        self.newest = self.peak = 0

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def fits(self, max_tokens: int) -> bool:
        promised = sum(map(self.blocks_for, self.max_tokens.values()))
        return len(self.tokens) < self.max_sequences and promised + self.blocks_for(max_tokens) <= self.blocks

    def admit(self, row: int, prompt_tokens: int, max_tokens: int) -> list[int]:
        assert row not in self.tokens
        self.tokens[row], self.max_tokens[row] = [], max_tokens
        return [self.append(row) for _ in range(prompt_tokens)]

    def append(self, row: int) -> int:
        self.newest += 1
        self.tokens[row].append(self.newest)
        self.peak = max(self.peak, self.counts()["blocks_in_use"])
        return self.newest

    def release(self, row: int) -> None:
        del self.tokens[row], self.max_tokens[row]

    def counts(self) -> dict[str, int]:
        used = sum(self.blocks_for(len(tokens)) for tokens in self.tokens.values())
        promised = sum(map(self.blocks_for, self.max_tokens.values()))
        values = (self.blocks - used, used, promised - used, len(self.tokens), self.peak)
        return dict(zip(COUNTS, values, strict=True))


class ManagerMachine(RuleBasedStateMachine):
    """Random calls. `memory` stands for the KV memory: one number per slot, unique for each token."""

    @initialize(
        num_blocks=st.integers(2, 9),
        block_size=st.integers(1, 5),
        max_sequences=st.integers(1, 5),
        max_blocks=st.integers(1, 5),
    )
    def create(self, num_blocks: int, block_size: int, max_sequences: int, max_blocks: int) -> None:
        sizes = (num_blocks, block_size, max_sequences, max_blocks)
        self.manager, self.naive = KVCacheManager(*sizes), NaiveCache(*sizes)
        self.views = (self.manager.block_table, self.manager.lengths, self.manager.slot_mapping)
        self.memory = np.zeros(num_blocks * block_size, np.int64)
        self.mapped: list[int] = []

    def draw_rows(self, data: st.DataObject, rows: list[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(rows), unique=True)) if rows else []

    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        most = self.naive.most_tokens  # often drawn, so that promises and not only blocks run out
        max_tokens = data.draw(st.just(most) | st.integers(1, most))
        prompt_tokens = data.draw(st.integers(1, max_tokens))
        row = self.manager.admit(prompt_tokens, max_tokens)
        assert (row >= 0) == self.naive.fits(max_tokens)
        if row >= 0:
            self.memory[self.manager.prefill_slots(row)] = self.naive.admit(row, prompt_tokens, max_tokens)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        naive = self.naive
        rows = self.draw_rows(data, [r for r in naive.tokens if len(naive.tokens[r]) < naive.max_tokens[r]])
        self.manager.step(int32(*rows))
        self.mapped = self.manager.slot_mapping[: len(rows)].tolist()
        self.memory[self.mapped] = [naive.append(row) for row in rows]

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        rows = self.draw_rows(data, list(self.naive.tokens))
        self.manager.release(int32(*rows))
        for row in rows:
            self.naive.release(row)

    @rule(data=st.data(), row=st.integers(-2, 6))
    def name_a_wrong_row(self, data: st.DataObject, row: int) -> None:
        good = self.draw_rows(data, list(self.naive.tokens))
        if row not in self.naive.tokens or row in good:
            message = "twice" if row in good else "not running|unknown row"
            bad = int32(*good, row)
            for call in (self.manager.step, self.manager.release):
                raises_and_changes_nothing(self.manager, lambda call=call: call(bad), message)

    @precondition(lambda self: any(len(t) == self.naive.max_tokens[r] for r, t in self.naive.tokens.items()))
    @rule(data=st.data())
    def step_past_the_limit(self, data: st.DataObject) -> None:
        naive = self.naive
        full = [r for r in naive.tokens if len(naive.tokens[r]) == naive.max_tokens[r]]
        good = self.draw_rows(data, [r for r in naive.tokens if r not in full])
        bad = int32(*good, data.draw(st.sampled_from(full)))
        raises_and_changes_nothing(self.manager, lambda: self.manager.step(bad), "reached its max_tokens")

    @invariant()
    def agrees(self) -> None:
        self.manager.check_integrity()
        assert counts(self.manager) == self.naive.counts()
        block_table, lengths, slot_mapping = self.views
        assert slot_mapping.tolist() == self.mapped + [-1] * (len(lengths) - len(self.mapped))
        slots = block_table[:, :, None] * self.naive.block_size + np.arange(self.naive.block_size)
        for row, length in enumerate(lengths):
            tokens = self.memory[slots[row].reshape(-1)[:length]].tolist()
            assert tokens == self.naive.tokens.get(row, [])
            assert not block_table[row, self.naive.blocks_for(int(length)) :].any()


TestAgainstNaiveModel = ManagerMachine.TestCase
TestAgainstNaiveModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_running_rows_never_run_out() -> None:
    manager = KVCacheManager(num_blocks=9, block_size=4, max_sequences=4, max_blocks_per_sequence=3)
    rows = [manager.admit(1, 12), manager.admit(5, 12), manager.admit(4, 8)]
    assert rows == [0, 1, 2]
    assert counts(manager)["free_blocks"] == 4
    assert manager.admit(1, 1) == -1  # four blocks are free, and all are promised
    for row, tokens in zip(rows, (11, 7, 4), strict=True):
        for _ in range(tokens):
            manager.step(int32(row))
    assert counts(manager)["free_blocks"] == counts(manager)["reserved_blocks"] == 0
    manager.release(int32(1))
    assert manager.admit(12, 12) == 1
    manager.check_integrity()


def test_rows_run_out_before_blocks() -> None:
    manager = KVCacheManager(num_blocks=9, block_size=4, max_sequences=2, max_blocks_per_sequence=3)
    assert [manager.admit(1, 1) for _ in range(3)] == [0, 1, -1]


def test_slots_are_dealt_in_order() -> None:
    manager = KVCacheManager(num_blocks=9, block_size=4, max_sequences=4, max_blocks_per_sequence=3)
    first, second = manager.admit(6, 12), manager.admit(4, 12)
    assert manager.prefill_slots(first).tolist() == [4, 5, 6, 7, 8, 9]
    assert manager.prefill_slots(second).tolist() == [12, 13, 14, 15]
    assert manager.prefill_slots(first).dtype == np.int64
    manager.step(int32(second, first))
    assert manager.slot_mapping.tolist() == [16, 10, -1, -1]
    assert manager.block_table.tolist() == [[1, 2, 0], [3, 4, 0], [0, 0, 0], [0, 0, 0]]
    assert manager.lengths.tolist() == [7, 5, 0, 0]
    manager.step(int32())
    assert manager.slot_mapping.tolist() == [-1] * 4
    manager.release(int32(first, second))
    assert not manager.block_table.any()
    assert not manager.lengths.any()
    assert counts(manager) == dict(zip(COUNTS, (8, 0, 0, 0, 4), strict=True))


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "match"),
    [
        (0, 4, "prompt_tokens 0"),
        (5, 4, "prompt_tokens 5 and max_tokens 4"),
        (1, 21, "21 tokens never fits a row of 5 blocks of 4"),
        (1, 17, "17 tokens needs 5 blocks of 4 and never fits the pool of 4"),
        (1, 2**40, f"{2**40} tokens never fits"),
    ],
)
def test_a_sequence_that_never_fits(prompt_tokens: int, max_tokens: int, match: str) -> None:
    manager = KVCacheManager(num_blocks=5, block_size=4, max_sequences=2, max_blocks_per_sequence=5)
    raises_and_changes_nothing(manager, lambda: manager.admit(prompt_tokens, max_tokens), match)


def test_double_release_and_use_after_release() -> None:
    manager = KVCacheManager(num_blocks=5, block_size=4, max_sequences=2, max_blocks_per_sequence=2)
    row = manager.admit(3, 8)
    manager.release(int32(row))
    for call in (manager.step, manager.release):
        raises_and_changes_nothing(manager, lambda call=call: call(int32(row)), "row 0 is not running")
    raises_and_changes_nothing(manager, lambda: manager.prefill_slots(row), "row 0 is not running")
    raises_and_changes_nothing(manager, lambda: manager.prefill_slots(2), "unknown row 2: rows .* 0 to 1")


@pytest.mark.parametrize("name", ["step", "release"])
def test_rows_must_be_one_contiguous_int32_array(name: str) -> None:
    manager = KVCacheManager(num_blocks=5, block_size=4, max_sequences=4, max_blocks_per_sequence=2)
    rows = int32(*(manager.admit(1, 2) for _ in range(4)))
    call = getattr(manager, name)
    for wrong in (rows.astype(np.int64), rows[::2], rows.tolist()):
        raises_and_changes_nothing(manager, lambda wrong=wrong: call(wrong), "incompatible", TypeError)
    raises_and_changes_nothing(manager, lambda: call(rows[None]), "1 dimension, got 2")


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ((1, 4, 2, 2), "num_blocks must be from 2 .* got 1"),
        ((2**31, 4, 2, 2), "num_blocks must be"),
        ((5, 0, 2, 2), "block_size must be from 1 .* got 0"),
        ((5, 4, -1, 2), "max_sequences must be"),
        ((5, 4, 2, 0), "max_blocks_per_sequence must be"),
        ((5, 2**16, 2, 2**15), "max_blocks_per_sequence 32768 x block_size 65536"),
    ],
)
def test_wrong_sizes(sizes: tuple[int, int, int, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        KVCacheManager(*sizes)


def test_views_share_memory_that_never_moves() -> None:
    manager = KVCacheManager(num_blocks=33, block_size=2, max_sequences=8, max_blocks_per_sequence=4)
    names = ("block_table", "lengths", "slot_mapping")
    views = [getattr(manager, name) for name in names]
    assert [view.dtype for view in views] == [np.int32, np.int32, np.int64]
    assert [view.shape for view in views] == [(8, 4), (8,), (8,)]
    addresses = [view.ctypes.data for view in views]
    rows = int32(*(manager.admit(1, 8) for _ in range(8)))
    for _ in range(7):
        manager.step(rows)
    assert [getattr(manager, name).ctypes.data for name in names] == addresses
    for view, name in zip(views, names, strict=True):
        assert view.base is manager
        assert not view.flags.owndata
        assert not view.flags.writeable
        np.testing.assert_array_equal(view, getattr(manager, name))


def test_views_keep_the_manager_alive() -> None:
    manager = KVCacheManager(num_blocks=9, block_size=2, max_sequences=2, max_blocks_per_sequence=4)
    manager.admit(3, 8)
    table, lengths = manager.block_table[:1], manager.lengths
    del manager
    gc.collect()
    assert table.tolist() == [[1, 2, 0, 0]]
    assert lengths.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("name", "index", "value", "match"),
    [
        ("block_table", 0, 2, "block 1 has a count of 1 but 0 references"),
        ("block_table", 1, 9, r"block_table\[0, 1\] is 9"),
        ("block_table", 1, 3, "row 0 ends at slot 4"),
        ("block_table", 4, 3, r"block_table\[1, 0\] is 3"),
        ("lengths", 1, 1, r"lengths\[1\] is 1, not 0"),
        ("slot_mapping", 0, 4, r"slot_mapping\[0\] is 4"),
    ],
)
def test_integrity_check_sees_a_change_from_outside(name: str, index: int, value: int, match: str) -> None:
    manager = KVCacheManager(num_blocks=9, block_size=2, max_sequences=2, max_blocks_per_sequence=4)
    manager.admit(3, 8)
    array = getattr(manager, name)
    element = ctypes.c_int64 if array.dtype == np.int64 else ctypes.c_int32
    ctypes.cast(array.ctypes.data, ctypes.POINTER(element))[index] = value
    with pytest.raises(RuntimeError, match=match):
        manager.check_integrity()


def test_a_second_thread_is_refused_during_a_call() -> None:
    manager = KVCacheManager(2**18, block_size=1, max_sequences=1, max_blocks_per_sequence=1)
    refused: list[str] = []
    deadline = time.monotonic() + 30

    def call_often() -> None:
        while not refused and time.monotonic() < deadline:
            try:
                manager.check_integrity()
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=call_often) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "one owner thread" in refused[0]
