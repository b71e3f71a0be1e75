"""What the KV-cache manager promises, case by case; random calls stand in test_random_operations.py."""

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ppomax.engine._kv import KVCacheManager, Step

COUNTS = ("free_blocks", "cached_blocks", "blocks_in_use", "peak_blocks_in_use", "running", "waiting", "hit_tokens",
          "prefill_tokens", "evictions", "preemptions", "copies")  # fmt: skip
VIEWS = ("block_table", "dirty_rows", "copies", "tokens", "positions", "slot_mapping", "rows", "seq_lens",
         "cu_seqlens", "sample_ids", "sample_positions")  # fmt: skip


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def new_manager(num_blocks: int = 33, block_size: int = 4, max_sequences: int = 8, **options: Any) -> KVCacheManager:
    return KVCacheManager(num_blocks, block_size, max_sequences, 8, **options)


def prompt(*blocks: int, size: int = 4, rest: int = 0) -> np.ndarray:
    """Full blocks of one repeated token each, and `rest` tokens 9."""
    return int64(*[token for token in blocks for _ in range(size)], *[9] * rest)


def commit(manager: KVCacheManager, step: Step, *tokens: int) -> Step:
    """Every sample is `tokens`, or token 0."""
    finished = manager.commit(int64(*(tokens or [0] * step.num_samples)))
    manager.check_integrity()
    assert not finished
    return step


def run(manager: KVCacheManager, budget: int = 1000) -> Step:
    """One whole step that samples token 0."""
    step = manager.plan(budget)
    manager.check_integrity()
    return commit(manager, step)


def blocks(manager: KVCacheManager, sequence: int) -> list[int]:
    info = manager.sequence(sequence)
    return manager.block_table[info.row, : -(-info.cached_tokens // manager.block_size)].tolist()


def copies(manager: KVCacheManager, step: Step) -> list[list[int]]:
    return manager.copies[: step.num_copies].tolist()


def snapshot(manager: KVCacheManager) -> tuple[Any, ...]:
    statistics = manager.statistics
    return *(getattr(manager, name).tobytes() for name in VIEWS), *(getattr(statistics, name) for name in COUNTS)


def raises_and_changes_nothing(
    manager: KVCacheManager, call: Callable[[], Any], match: str, error: type[Exception] = ValueError
) -> None:
    before = snapshot(manager)
    with pytest.raises(error, match=match):
        call()
    assert snapshot(manager) == before
    manager.check_integrity()


# A step


def test_prompts_then_tokens() -> None:
    manager = new_manager(num_blocks=9, max_sequences=3)
    manager.submit(int64(5, 6, 7, 8, 9), int64(4))
    manager.submit(int64(3, 2), int64(4))
    step = manager.plan(100)
    assert (step.num_tokens, step.num_members, step.num_decodes, step.num_samples) == (7, 2, 0, 2)
    assert manager.tokens[:8].tolist() == [5, 6, 7, 8, 9, 3, 2, 0]
    assert manager.positions[:8].tolist() == [0, 1, 2, 3, 4, 0, 1, 0]
    assert manager.slot_mapping[:8].tolist() == [4, 5, 6, 7, 8, 12, 13, -1]
    assert manager.cu_seqlens[:3].tolist() == [0, 5, 7]
    assert manager.seq_lens.tolist() == [5, 2, 1]
    assert manager.rows.tolist() == [0, 1, 3]
    assert manager.sample_ids.tolist() == [0, 1, -1]
    assert manager.sample_positions[:2].tolist() == [4, 6]
    assert manager.block_table[:, :3].tolist() == [[1, 2, 0], [3, 0, 0], [0, 0, 0], [0, 0, 0]]
    step = manager.step(int64(20, 30), 100)
    assert (step.num_tokens, step.num_members, step.num_decodes, step.num_samples) == (2, 2, 2, 2)
    assert manager.tokens[:3].tolist() == [20, 30, 0]
    assert manager.positions[:2].tolist() == [5, 2]
    assert manager.slot_mapping[:8].tolist() == [9, 14, -1, -1, -1, -1, -1, -1]
    assert manager.cu_seqlens[:3].tolist() == [0, 1, 2]
    assert manager.sample_positions[:2].tolist() == [0, 1]


def test_sequences_end_at_stop_tokens_at_limits_and_where_the_caller_says() -> None:
    manager = new_manager(stop_tokens=[7, 8])
    manager.submit(int64(1, 2), int64(3, 2, 5, 5))
    manager.plan(100)
    manager.step(int64(5, 5, 5, 5), 0)
    step = manager.step(int64(8, 7, 6, 6), 0, np.array([False, False, False, True]))
    assert [(f.id, f.stopped, f.response.tolist()) for f in step.finished] == [
        (0, True, [5, 8]),
        (1, True, [5, 7]),  # at its limit as well
        (3, True, [5, 6]),
    ]
    assert manager.sample_ids[: step.num_samples].tolist() == [2]
    assert [(f.id, f.stopped) for f in manager.step(int64(5), 0).finished] == []
    manager.step(int64(5), 0)
    (last,) = manager.commit(int64(5))
    assert (last.id, last.stopped, last.response.tolist()) == (2, False, [5, 6, 5, 5, 5])
    assert manager.statistics.blocks_in_use == 0


def test_prefill_is_chunked_within_the_budget() -> None:
    manager = new_manager()
    manager.submit(prompt(1, 2, rest=2), int64(9))
    manager.submit(prompt(3, rest=1), int64(9))
    spans = []
    for budget, token in ((3, False), (0, False), (3, False), (6, True), (3, True), (3, True)):
        step = manager.plan(budget)
        manager.check_integrity()
        assert step.num_tokens - step.num_decodes <= budget
        assert (step.num_samples > 0) == token
        spans.append(np.diff(manager.cu_seqlens[: step.num_members + 1]).tolist())
        if step.num_members:
            commit(manager, step)
    assert spans == [[3], [], [3], [4, 2], [1, 3], [1, 1]]
    assert manager.statistics.prefill_tokens == 15


def test_nothing_to_do() -> None:
    manager = new_manager()
    assert manager.plan(10).num_members == 0
    assert manager.step(int64(), 10).num_members == 0
    raises_and_changes_nothing(manager, lambda: manager.commit(int64()), "no step is planned")
    raises_and_changes_nothing(manager, lambda: manager.step(int64(1), 0), "1 sampled tokens, but no step")


def test_dirty_rows_are_those_that_changed() -> None:
    manager = new_manager()
    manager.submit(int64(1, 2), int64(9))
    manager.submit(int64(1, 2, 3, 4), int64(9))
    dirty = []
    for _ in range(4):
        step = manager.plan(100)
        dirty.append(manager.dirty_rows[: step.num_dirty_rows].tolist())
        commit(manager, step)
    assert dirty == [[0, 1], [1], [], [0]]  # new; a second block of row 1; nothing; a second block of row 0


# Groups, forks and copies


@pytest.mark.parametrize("length", [6, 8])
def test_a_group_is_prefilled_once(length: int) -> None:
    computed = []
    for samples in (1, 8):
        manager = new_manager()
        manager.submit(int64(*range(length)), int64(*[5] * samples))
        step = manager.plan(100)
        assert manager.sample_ids[: step.num_samples].tolist() == list(range(samples))
        assert set(manager.sample_positions[: step.num_samples].tolist()) == {length - 1}
        assert step.num_members == 1
        computed.append(manager.statistics.prefill_tokens)
        commit(manager, step)
        assert manager.plan(100).num_decodes == samples
    assert computed == [length, length]
    assert manager.statistics.hit_tokens == 7 * length


def test_samples_copy_the_partial_block_of_their_prompt() -> None:
    """All but the last one, which then has it alone."""
    manager = new_manager()
    manager.submit(prompt(1, rest=2), int64(5, 5, 5))
    run(manager)
    assert [blocks(manager, sequence) for sequence in range(3)] == [[1, 2]] * 3
    step = manager.plan(100)
    assert copies(manager, step) == [[2, 3], [2, 4]]
    assert manager.slot_mapping[:3].tolist() == [4 * 3 + 2, 4 * 4 + 2, 4 * 2 + 2]
    assert [blocks(manager, sequence) for sequence in range(3)] == [[1, 3], [1, 4], [1, 2]]
    assert manager.statistics.copies == 2
    commit(manager, step)
    assert manager.plan(100).num_copies == 0


def test_samples_of_full_blocks_copy_nothing() -> None:
    manager = new_manager()
    manager.submit(prompt(1, 2), int64(5, 5, 5))
    run(manager)
    assert run(manager).num_copies == 0
    assert [blocks(manager, sequence) for sequence in range(3)] == [[1, 2, 3], [1, 2, 4], [1, 2, 5]]


def test_samples_without_a_row_follow_for_one_token() -> None:
    """Their prompt's blocks are held for them, the partial one too, and given back with the last of them."""
    manager = new_manager(max_sequences=2)
    manager.submit(prompt(1, 2, rest=2), int64(2, 2, 2, 2, 2))
    run(manager)
    assert manager.statistics.prefill_tokens == 10
    step = manager.step(int64(), 100)
    assert step.num_copies == 2, "the held block is nobody's to write to"
    step = manager.step(int64(0, 0), 100)
    assert (step.num_tokens, step.num_samples) == (1, 2)
    assert manager.positions[0] == 9
    assert manager.slot_mapping[0] == -1
    assert manager.statistics.prefill_tokens == 11
    while step.num_members:
        step = manager.step(int64(*[0] * step.num_samples), 100)
        manager.check_integrity()
    assert manager.statistics.prefill_tokens == 12
    assert (manager.statistics.blocks_in_use, manager.statistics.running) == (0, 0)


def test_fork_at_any_token() -> None:
    """8 + 2 tokens: after all of them, inside the partial block, inside a full cached one, at a block's edge."""
    manager = new_manager()
    parent = manager.submit(prompt(1, 2), int64(9))
    run(manager)
    run(manager)
    forks = {count: manager.fork(parent, count) for count in (10, 9, 6, 4)}
    manager.check_integrity()
    assert [blocks(manager, fork) for fork in forks.values()] == [[1, 2, 3], [1, 2, 3], [1, 2], [1]]
    step = manager.plan(100)
    assert step.num_decodes == 2, "the parent and the fork after all of its tokens go on"
    assert [manager.slot_mapping[i] for i in range(2, 5)] == [-1] * 3, "what is cached is only read again"
    assert manager.positions[2:5].tolist() == [8, 5, 3]
    assert copies(manager, step) == [[3, 4], [3, 5]]
    commit(manager, step, 1, 2, 3, 4, 5)
    step = manager.plan(100)
    assert copies(manager, step) == [[2, 6]], "a cached block is copied even where one alone refers to it"
    commit(manager, step)
    tokens = {count: manager.tokens_of(fork).tolist() for count, fork in forks.items()}
    whole = [1] * 4 + [2] * 4 + [0, 0]
    assert tokens == {10: [*whole, 2, 0], 9: [*whole[:9], 3, 0], 6: [*whole[:6], 4, 0], 4: [*whole[:4], 5, 0]}


def test_a_fork_without_a_row_waits() -> None:
    manager = new_manager(max_sequences=1)
    parent = manager.submit(prompt(1, rest=2), int64(3))
    run(manager)
    child = manager.fork(parent, 6)
    assert manager.sequence(child).row == -1
    run(manager)
    manager.plan(100)
    (finished,) = manager.commit(int64(0))
    assert finished.id == parent
    before = manager.statistics.prefill_tokens
    run(manager)
    assert manager.statistics.prefill_tokens - before == 2, "its full block is cached"


def test_a_copy_is_no_other_copys_source() -> None:
    """A block that loses its last reader in the step that copies it must not be given away in that step."""
    manager = KVCacheManager(4, 4, 4, 3)
    manager.submit(int64(1, 2), int64(2))
    manager.submit(int64(3, 4), int64(3))
    run(manager)
    manager.fork(1, 3)
    youngest = manager.fork(0, 3)
    step = manager.plan(0)
    manager.check_integrity()
    assert copies(manager, step) == [[1, 3]]
    assert step.preempted == [youngest, 2], "block 1 could not be had, so one more had to give way"


# Prefixes


def test_the_longest_cached_prefix_is_found() -> None:
    manager = new_manager()
    manager.submit(prompt(1, 2, 3, rest=1), int64(1))
    manager.plan(100)
    manager.commit(int64(0))
    for tokens, hits in ((prompt(1, 2, 4), 8), (prompt(1, 3), 4), (prompt(2, 1), 0), (prompt(1, 2, 3, 4), 12)):
        before = manager.statistics.hit_tokens
        manager.submit(tokens, int64(1))
        step = manager.plan(100)
        assert manager.statistics.hit_tokens - before == hits
        assert step.num_tokens == tokens.size - hits
        manager.commit(int64(0))
        manager.check_integrity()


def test_generated_tokens_are_cached_as_their_blocks_fill() -> None:
    manager = new_manager()
    manager.submit(int64(1, 2), int64(9))
    for _ in range(3):
        run(manager)
    manager.submit(int64(1, 2, 0, 0, 5), int64(9))
    before = manager.statistics.hit_tokens
    run(manager)
    assert manager.statistics.hit_tokens - before == 4
    assert blocks(manager, 0)[0] == blocks(manager, 1)[0]


def test_the_last_token_of_a_cached_prompt_is_computed_and_not_written() -> None:
    manager = new_manager()
    manager.submit(prompt(1, 2), int64(1))
    manager.plan(100)
    manager.commit(int64(0))
    manager.submit(prompt(1, 2), int64(1))
    step = manager.plan(100)
    assert step.num_tokens == 1
    assert (manager.positions[0], manager.slot_mapping[0], manager.seq_lens[0]) == (7, -1, 8)


def test_a_prefix_of_the_same_step_is_found_but_not_one_that_is_still_to_come() -> None:
    manager = new_manager()
    manager.submit(prompt(1, 2, rest=1), int64(5))
    manager.submit(prompt(1, 2, 3), int64(5))
    step = manager.plan(6)
    assert step.num_members == 1, "the first one's second block is not full yet"
    commit(manager, step)
    step = manager.plan(6)
    assert blocks(manager, 1)[:2] == blocks(manager, 0)[:2], "it is full with this step"
    assert np.diff(manager.cu_seqlens[:3]).tolist() == [3, 3]


def test_a_block_that_is_cached_already_is_not_kept_twice() -> None:
    """Two samples draw the same tokens: both blocks fill in one step, and one is given back after it."""
    manager = new_manager()
    manager.submit(prompt(1), int64(20, 20))
    for _ in range(5):
        run(manager)
    assert blocks(manager, 0) == blocks(manager, 1) == [1, 2]
    assert manager.statistics.blocks_in_use == 2
    step = manager.plan(0)
    assert manager.dirty_rows[: step.num_dirty_rows].tolist() == [1, 0]
    assert [blocks(manager, sequence)[-1] for sequence in (0, 1)] == [3, 4] or blocks(manager, 0)[-1] == 4
    commit(manager, step)


def test_namespaces_share_nothing() -> None:
    manager = new_manager(namespaces=2)
    for namespace in (0, 1, 0, 1):
        manager.submit(prompt(1, 2), int64(1), namespace)
        manager.plan(100)
        manager.commit(int64(0))
    assert manager.statistics.hit_tokens == 16
    assert manager.statistics.prefill_tokens == 2 * (8 + 1)
    assert manager.bump_version(1) == manager.version(1) == 1
    assert manager.version(0) == 0
    for namespace, hits in ((0, 8), (1, 0)):
        before = manager.statistics.hit_tokens
        manager.submit(prompt(1, 2), int64(1), namespace)
        manager.plan(100)
        manager.commit(int64(0))
        assert manager.statistics.hit_tokens - before == hits


# Versions


def test_a_new_version_finds_nothing_and_leaves_what_runs() -> None:
    manager = new_manager()
    manager.submit(prompt(1, 2), int64(1))
    manager.plan(100)
    manager.commit(int64(0))
    manager.submit(prompt(1, 2, 3), int64(2))
    run(manager)
    assert manager.statistics.hit_tokens == 8
    assert manager.bump_version() == 1
    manager.check_integrity()
    assert manager.statistics.cached_blocks == 0
    assert blocks(manager, 1) == [1, 2, 3]
    manager.submit(prompt(1, 2, 3), int64(1))
    step = manager.plan(100)
    assert manager.statistics.hit_tokens == 8
    assert (manager.sequence(1).version, manager.sequence(2).version) == (0, 1)
    finished = manager.commit(int64(*[0] * step.num_samples))
    assert [(f.id, f.version) for f in finished] == [(1, 0), (2, 1)]
    manager.check_integrity()
    assert manager.statistics.cached_blocks == 3, "those of the new version alone"


def test_what_old_weights_fill_is_not_found_under_new_ones() -> None:
    """The two that begin before the bump go on after it; nothing that they write is found, by themselves neither."""
    manager = new_manager(block_size=2)
    manager.submit(int64(1, 2, 3, 4), int64(7))
    manager.submit(int64(1, 2, 3, 4, 5, 5, 0, 0, 0), int64(7))
    step = manager.plan(6)
    assert manager.sequence(1).cached_tokens == 6
    commit(manager, step, 5)
    for token in (5, 0, 0, 0):
        commit(manager, manager.plan(0), token)
    manager.release(int64(0))  # its blocks of 5, 5 and 0, 0 are cached, and the other one comes to them next
    manager.bump_version()
    manager.submit(int64(1, 2, 3, 4, 5, 5, 0, 0, 0), int64(7))
    hits = manager.statistics.hit_tokens
    manager.plan(100)
    manager.check_integrity()
    assert manager.statistics.hit_tokens == hits
    assert not set(blocks(manager, 1)) & set(blocks(manager, 2))


def test_samples_that_wait_start_under_the_new_version() -> None:
    manager = new_manager(max_sequences=2)
    manager.submit(prompt(1, 2, rest=1), int64(2, 2, 2))
    run(manager)
    manager.bump_version()
    manager.step(int64(), 100)
    step = manager.step(int64(0, 0), 100)
    assert step.num_tokens == 9, "the blocks held for it were of the old weights"
    assert manager.sequence(2).version == 1


def test_samples_do_not_join_a_leader_of_the_old_version() -> None:
    manager = new_manager()
    manager.submit(prompt(1, 2), int64(5, 5))
    run(manager, 5)
    manager.bump_version()
    step = manager.plan(100)
    assert step.num_tokens == 3 + 8
    assert [manager.sequence(sequence).version for sequence in (0, 1)] == [0, 1]


def test_a_preempted_sequence_is_computed_again_under_the_new_version() -> None:
    manager = new_manager()
    manager.submit(prompt(1), int64(9))
    run(manager)
    run(manager)
    manager.bump_version()
    manager.preempt(int64(0))
    assert (manager.sequence(0).row, manager.sequence(0).version, manager.sequence(0).cached_tokens) == (-1, -1, 0)
    step = manager.plan(100)
    assert manager.tokens[: step.num_tokens].tolist() == [1, 1, 1, 1, 0, 0]
    assert manager.sequence(0).version == 1


def test_clearing_the_cache_leaves_versions() -> None:
    manager = new_manager(namespaces=2)
    for namespace in (0, 1):
        manager.submit(prompt(1), int64(1), namespace)
        manager.plan(100)
        manager.commit(int64(0))
    assert manager.statistics.cached_blocks == 2
    manager.clear_cache()
    manager.check_integrity()
    assert manager.statistics.cached_blocks == manager.version(0) == manager.version(1) == 0


# Eviction and preemption


def fill(manager: KVCacheManager, *prompts: np.ndarray) -> None:
    """Each runs alone and leaves its full blocks in the cache."""
    for tokens in prompts:
        manager.submit(tokens, int64(1))
        manager.plan(100)
        manager.commit(int64(0))


def cached_blocks(manager: KVCacheManager, *prompts: np.ndarray) -> list[int]:
    """How many blocks of each prompt are found (which makes them the ones used last)."""
    found = []
    for tokens in prompts:
        before = manager.statistics.hit_tokens
        fill(manager, tokens)
        found.append((manager.statistics.hit_tokens - before) // manager.block_size)
    return found


def test_blocks_that_were_never_cached_are_used_first() -> None:
    manager = new_manager(num_blocks=9)
    fill(manager, prompt(1, 2))
    manager.submit(prompt(3, 4, 5, rest=2), int64(9))
    run(manager)
    assert blocks(manager, 0 + 1) == [3, 4, 5, 6]
    assert manager.statistics.evictions == 0


def test_the_least_recently_used_goes_first() -> None:
    manager = new_manager(num_blocks=7)
    fill(manager, prompt(1, 1), prompt(2, 2), prompt(3, 3))
    fill(manager, prompt(1, 1))
    fill(manager, prompt(4, 4))
    assert manager.statistics.evictions == 2
    assert cached_blocks(manager, prompt(1, 1), prompt(3, 3), prompt(4, 4)) == [2, 2, 2]


def test_the_least_recently_used_of_all_namespaces_goes_first() -> None:
    manager = KVCacheManager(3, 4, 1, 2, namespaces=2)
    for token, namespace in ((1, 1), (2, 0), (3, 0), (2, 0)):
        manager.submit(prompt(token), int64(1), namespace)
        manager.plan(100)
        manager.commit(int64(0))
    assert manager.statistics.evictions == 1
    assert manager.statistics.hit_tokens == 4


def test_children_go_before_parents() -> None:
    manager = new_manager(num_blocks=7)
    fill(manager, prompt(1, 2, 3, 4), prompt(5, 6, 7))
    assert manager.statistics.evictions == 1
    assert cached_blocks(manager, prompt(1, 2, 3, 4)) == [3]


def test_a_parent_outlives_children_of_several_sequences() -> None:
    manager = new_manager(num_blocks=6)
    fill(manager, prompt(1, 2), prompt(1, 3), prompt(1, 4))
    fill(manager, prompt(5, 6, 7))
    assert cached_blocks(manager, prompt(1, 4)) == [2]


def test_blocks_that_waiting_samples_need_go_last() -> None:
    """After what nobody is known to need, and before a running sequence gives way."""
    manager = KVCacheManager(8, 4, 3, 6)
    fill(manager, prompt(9))
    for token in (5, 6):
        manager.submit(prompt(token), int64(8))
    manager.submit(prompt(1, 2), int64(1, 1))
    step = manager.plan(100)
    counts = []
    for _ in range(7):
        step = manager.step(int64(*[0] * step.num_samples), 0)
        manager.check_integrity()
        statistics = manager.statistics
        counts.append((statistics.blocks_in_use, statistics.cached_blocks, statistics.evictions))
        assert (statistics.running, statistics.waiting) == (2, 1)
    # second blocks: two that are free. Third blocks: the cached one of 9s, then one of the two that were held
    assert counts == [(6, 1, 0)] * 4 + [(6, 1, 2)] * 3
    manager.commit(int64(0, 0))
    manager.plan(100)
    assert manager.statistics.hit_tokens == 4, "a child went, its parent is left"


def test_the_youngest_gives_way_and_comes_back() -> None:
    manager = KVCacheManager(9, 4, 3, 8)
    for token in (1, 2, 3):
        manager.submit(prompt(token, rest=1), int64(20))
    preempted: list[int] = []
    responses: dict[int, list[int]] = {}
    drawn: dict[int, list[int]] = {sequence: [] for sequence in range(3)}
    step = manager.plan(100)
    while step.num_members:
        running = {s for s in drawn if s not in responses and manager.sequence(s).row >= 0}
        sampled = [10 * sequence + len(drawn[sequence]) for sequence in manager.sample_ids[: step.num_samples]]
        for sequence, token in zip(manager.sample_ids.tolist(), sampled, strict=False):
            drawn[sequence].append(token)
        step = manager.step(int64(*sampled), 100)
        manager.check_integrity()
        responses |= {finished.id: finished.response.tolist() for finished in step.finished}
        assert step.preempted == sorted(running - set(responses))[::-1][: len(step.preempted)]
        preempted += step.preempted
    assert set(preempted) == {1, 2}, "the oldest never gives way"
    assert responses == drawn
    assert all(len(response) == 20 for response in responses.values())
    assert manager.statistics.preemptions == len(preempted)


@pytest.mark.parametrize(
    ("num_blocks", "prompts", "limits", "running"),
    [
        (8, [prompt(1, rest=1), prompt(2, rest=1), prompt(3, rest=1)], [9], 2),
        (6, [prompt(1), prompt(2), prompt(3)], [9], 2),
        (5, [prompt(1, 2), prompt(1, 2, rest=1)], [4], 2),
        (4, [prompt(1, 2), prompt(1, 2, rest=1)], [2], 1),
        (5, [prompt(1, rest=2)], [3, 3, 3, 3], 2),
    ],
    ids=["prompts", "first tokens", "shared blocks", "shared blocks, too few", "samples"],
)
def test_admission_leaves_a_block_for_each_that_runs(
    num_blocks: int, prompts: list[np.ndarray], limits: list[int], running: int
) -> None:
    """Beside its own present tokens and the next one."""
    manager = KVCacheManager(num_blocks, 4, 4, 7)
    for tokens in prompts:
        manager.submit(tokens, int64(*limits))
    run(manager)
    assert manager.statistics.running == running


@pytest.mark.parametrize(
    ("prompt_tokens", "max_new", "match"),
    [
        (1, 32, "1 [+] 32 tokens never fits a row of 8 blocks of 4"),
        (17, 4, "17 [+] 4 tokens needs 6 blocks of 4 and never fits the pool of 5"),
        (1, 0, "max_new_tokens must be from 1 .* got 0"),
        (1, 2**40, "max_new_tokens must be"),
    ],
)
def test_a_sequence_that_never_fits(prompt_tokens: int, max_new: int, match: str) -> None:
    manager = new_manager(num_blocks=6)
    tokens = np.ones(prompt_tokens, np.int64)
    raises_and_changes_nothing(manager, lambda: manager.submit(tokens, int64(1, max_new)), match)


def test_a_sequence_that_just_fits_runs_to_its_end() -> None:
    manager = KVCacheManager(6, 4, 2, 5)
    manager.submit(int64(1, 2, 3), int64(17, 17))
    step, count = manager.plan(100), 0
    while step.num_members:
        step = manager.step(int64(*range(count, count + step.num_samples)), 100)
        manager.check_integrity()
        count += 7
    assert manager.statistics.preemptions > 0
    assert manager.statistics.peak_blocks_in_use == 5


def test_the_last_free_block_is_no_copy_where_a_block_is_needed() -> None:
    """The oldest can have its own last block back from the one that shares it, but no other fourth block."""
    manager = KVCacheManager(5, 3, 2, 4)
    manager.submit(int64(*range(11)), int64(1))
    run(manager, 7)
    child = manager.fork(0, 7)
    step = manager.plan(100)
    manager.check_integrity()
    assert (step.preempted, step.num_copies, step.num_tokens) == ([child], 0, 4)


# Wrong calls and resets


def test_double_release_and_use_after_release() -> None:
    manager = new_manager()
    first = manager.submit(int64(1, 2), int64(5, 5))
    run(manager)
    manager.release(int64(first))
    for call in (manager.release, manager.preempt):
        raises_and_changes_nothing(manager, lambda call=call: call(int64(first + 1, first)), "unknown sequence 0")
        raises_and_changes_nothing(manager, lambda call=call: call(int64(1, 1)), "sequence 1 is named twice")
    for call in (manager.sequence, manager.tokens_of, lambda sequence: manager.fork(sequence, 1)):
        raises_and_changes_nothing(manager, lambda call=call: call(first), "unknown sequence 0")
    again = manager.submit(int64(1, 2), int64(5))
    assert again == 2, "an id is not used again"
    raises_and_changes_nothing(manager, lambda: manager.preempt(int64(1, again)), "sequence 2 is not running")
    manager.release(int64(again, 1))
    assert manager.statistics.blocks_in_use == manager.statistics.waiting == 0


def test_nothing_changes_under_a_planned_step() -> None:
    manager = new_manager()
    manager.submit(prompt(1), int64(5))
    manager.plan(100)
    for name, arguments in {
        "plan": (0,), "fork": (0, 1), "preempt": (int64(0),), "release": (int64(0),), "bump_version": (),
        "clear_cache": (),
    }.items():  # fmt: skip
        call = getattr(manager, name)
        raises_and_changes_nothing(manager, lambda call=call, a=arguments: call(*a), f"{name}: a step is planned")
    manager.submit(prompt(2), int64(5))  # waits for the next one


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m.step(int64(1), 0), "samples 2 tokens, got 1"),
        (lambda m: m.step(int64(1, -1), 0), r"tokens\[1\] is -1"),
        (lambda m: m.step(int64(2**31, 1), 0), r"tokens\[0\] is 2147483648"),
        (lambda m: m.step(int64(1, 1), 0, np.array([True])), "stopped has 1 entries for 2 tokens"),
        (lambda m: m.step(int64(1, 1), 8193), "prefill_tokens must be from 0 to 8192, got 8193"),
        (lambda m: m.commit(int64(1)), "samples 2 tokens, got 1"),
        (lambda m: m.submit(int64(), int64(1)), "at least 1 token"),
        (lambda m: m.submit(int64(1), int64()), "at least 1"),
        (lambda m: m.submit(int64(1, -2), int64(1)), r"prompt\[1\] is -2"),
        (lambda m: m.submit(int64(1), int64(1), 1), "unknown namespace 1: they go from 0 to 0"),
        (lambda m: m.submit(int64(1)[None], int64(1)), "prompt must have 1 dimension, got 2"),
        (lambda m: m.version(-1), "unknown namespace -1"),
    ],
)
def test_a_failed_call_leaves_no_trace(call: Callable[[KVCacheManager], Any], match: str) -> None:
    """And the step that was planned can be ended as if it had not been made."""
    manager = new_manager()
    manager.submit(prompt(1, rest=1), int64(3, 3))
    run(manager)
    manager.plan(0)
    raises_and_changes_nothing(manager, lambda: call(manager), match)
    assert manager.step(int64(5, 6), 0).num_decodes == 2


@pytest.mark.parametrize("count", [0, 4])
def test_fork_of_more_tokens_than_there_are(count: int) -> None:
    manager = new_manager()
    manager.submit(int64(1, 2), int64(5))
    run(manager)
    raises_and_changes_nothing(manager, lambda: manager.fork(0, count), f"has 3 tokens, asked to fork it after {count}")


def test_what_a_dropped_step_was_to_write_is_never_found() -> None:
    manager = new_manager()
    manager.submit(prompt(1, 2), int64(5, 5))
    manager.plan(100)
    manager.reset()
    manager.check_integrity()
    assert manager.statistics.free_blocks == 32
    manager.submit(prompt(1, 2), int64(5))
    hits = manager.statistics.hit_tokens
    assert manager.plan(100).num_tokens == 8
    assert manager.statistics.hit_tokens == hits


def test_a_leader_that_is_released_is_succeeded() -> None:
    """While it waits, and while it computes the prompt."""
    manager = new_manager()
    manager.submit(prompt(1, 2), int64(5, 5, 5))
    manager.release(int64(0))
    run(manager, 5)
    manager.release(int64(1))
    step = manager.plan(100)
    assert manager.sample_ids[: step.num_samples].tolist() == [2]
    assert step.num_tokens == 4, "the first block is cached"


@pytest.mark.parametrize("name", ["release", "preempt"])
def test_arrays_must_be_contiguous_and_of_their_dtype(name: str) -> None:
    manager = new_manager()
    manager.submit(int64(1), int64(5, 5, 5, 5))
    run(manager)
    ids = int64(0, 1, 2, 3)
    call = getattr(manager, name)
    for wrong in (ids.astype(np.int32), ids[::2], ids.tolist()):
        raises_and_changes_nothing(manager, lambda wrong=wrong: call(wrong), "incompatible", TypeError)
    raises_and_changes_nothing(manager, lambda: call(ids[None]), "1 dimension, got 2")


@pytest.mark.parametrize(
    ("sizes", "options", "match"),
    [
        ((1, 4, 2, 2), {}, "num_blocks must be from 2 .* got 1"),
        ((2**31, 4, 2, 2), {}, "num_blocks must be"),
        ((5, 0, 2, 2), {}, "block_size must be from 1 .* got 0"),
        ((5, 4, -1, 2), {}, "max_sequences must be"),
        ((5, 4, 2, 0), {}, "max_blocks_per_sequence must be"),
        ((5, 2**16, 2, 2**15), {}, "max_blocks_per_sequence 32768 x block_size 65536"),
        ((5, 4, 2, 2), {"max_prefill_tokens": 0}, "max_prefill_tokens must be"),
        ((5, 4, 2, 2), {"max_prefill_tokens": 2**31 - 1}, "max_sequences 2 [+] max_prefill_tokens"),
        ((5, 4, 2, 2), {"namespaces": 0}, "namespaces must be"),
    ],
)
def test_wrong_sizes(sizes: tuple[int, int, int, int], options: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        KVCacheManager(*sizes, **options)


# Memory that is shared


def test_views_share_memory_that_never_moves() -> None:
    manager = new_manager(max_sequences=4, max_prefill_tokens=16)
    views = {name: getattr(manager, name) for name in VIEWS}
    assert {name: view.shape for name, view in views.items()} == {
        "block_table": (5, 8), "dirty_rows": (4,), "copies": (4, 2), "tokens": (20,), "positions": (20,),
        "slot_mapping": (20,), "rows": (4,), "seq_lens": (4,), "cu_seqlens": (5,), "sample_ids": (4,),
        "sample_positions": (4,),
    }  # fmt: skip
    addresses = {name: view.ctypes.data for name, view in views.items()}
    manager.submit(prompt(1, rest=1), int64(8, 8, 8))
    for _ in range(5):
        run(manager, 16)
    for name, view in views.items():
        assert getattr(manager, name).ctypes.data == addresses[name]
        assert view.base is manager
        assert not view.flags.owndata
        assert not view.flags.writeable
        np.testing.assert_array_equal(view, getattr(manager, name))


def test_views_keep_the_manager_alive() -> None:
    manager = new_manager()
    manager.submit(int64(1, 2, 3, 4, 5), int64(8))
    manager.plan(100)
    table, slots = manager.block_table[:1, :3], manager.slot_mapping[:6]
    del manager
    gc.collect()
    assert table.tolist() == [[1, 2, 0]]
    assert slots.tolist() == [4, 5, 6, 7, 8, -1]


@pytest.mark.parametrize(
    ("name", "index", "value", "match"),
    [
        ("block_table", 0, 2, "block 2 of sequence 0 is not cached under its tokens"),
        ("block_table", 1, 40, r"block_table\[0, 1\] is 40"),
        ("block_table", 1, 3, "sequence 0 goes on at slot 9"),
        ("block_table", 8, 3, r"block_table\[1, 0\] is 3"),
        ("slot_mapping", 5, 4, r"slot_mapping\[5\] is 4"),
        ("rows", 1, 0, r"rows\[1\] is 0"),
    ],
)
def test_integrity_check_sees_a_change_from_outside(name: str, index: int, value: int, match: str) -> None:
    manager = new_manager()
    manager.submit(int64(1, 2, 3, 4, 5), int64(8))
    manager.plan(100)
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
