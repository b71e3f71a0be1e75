"""100,000 random calls of the KV-cache manager against a naive model of the K and V in every slot."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ppomax.engine._kv import KVCacheManager, Step

STOP = 3  # tokens go from 0 to 3, so that sequences have prefixes in common
COUNTS = ("free_blocks", "cached_blocks", "blocks_in_use", "peak_blocks_in_use", "running", "waiting", "hit_tokens",
          "prefill_tokens", "evictions", "preemptions", "copies")  # fmt: skip
VIEWS = ("block_table", "tokens", "positions", "slot_mapping", "rows", "seq_lens", "cu_seqlens", "sample_ids",
         "sample_positions", "copies", "dirty_rows")  # fmt: skip


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


class NaiveCache:
    """What every slot must hold: K and V of a token depend on the weights and on all tokens up to it, so they are
    one number for each (namespace, version, tokens). Nothing here knows of sharing, caching or blocks' owners."""

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager, self.size = manager, manager.block_size
        self.memory = np.zeros((manager.num_blocks, self.size), np.int64)
        self.device_table = manager.block_table.copy()
        self.numbers: dict[tuple[int, ...], int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.prompt: dict[int, int] = {}
        self.limit: dict[int, int] = {}
        self.space: dict[int, int] = {}

    def add(self, sequence: int, tokens: list[int], prompt: int, limit: int, space: int) -> None:
        self.tokens[sequence], self.prompt[sequence] = list(tokens), prompt
        self.limit[sequence], self.space[sequence] = limit, space

    def end(self, sequence: int) -> None:
        for field in (self.tokens, self.prompt, self.limit, self.space):
            del field[sequence]

    def contents(self, sequence: int, version: int) -> list[int]:
        """The number of each of the sequence's tokens."""
        number, numbers = self.numbers.setdefault((-1, self.space[sequence], version), len(self.numbers) + 1), []
        for token in self.tokens[sequence]:
            number = self.numbers.setdefault((number, token), len(self.numbers) + 1)
            numbers.append(number)
        return numbers

    def run(self, step: Step) -> None:
        """Do what a forward pass does, then look at all that attention may read."""
        manager, infos = self.manager, {sequence: self.manager.sequence(sequence) for sequence in self.tokens}
        dirty = manager.dirty_rows[: step.num_dirty_rows]
        self.device_table[dirty] = manager.block_table[dirty]
        for source, destination in manager.copies[: step.num_copies]:
            self.memory[destination] = self.memory[source]
        contents = {i.row: self.contents(sequence, i.version) for sequence, i in infos.items() if i.row >= 0}
        ends = manager.cu_seqlens[: step.num_members + 1]
        rows = np.repeat(manager.rows[: step.num_members], np.diff(ends)).tolist()
        computed = [contents[row][position] for row, position in zip(rows, manager.positions, strict=False)]
        for slot, number in zip(manager.slot_mapping, computed, strict=False):
            if slot >= 0:
                self.memory.reshape(-1)[slot] = number
        for sequence, place in zip(manager.sample_ids[: step.num_samples], manager.sample_positions, strict=False):
            assert computed[place] == contents[infos[sequence].row][-1], "logits of other tokens"
            assert manager.tokens[place] == self.tokens[sequence][-1]
        for sequence, info in infos.items():
            if info.row >= 0:
                cached = self.memory[self.device_table[info.row]].reshape(-1)[: info.cached_tokens]
                assert cached.tolist() == contents[info.row][: info.cached_tokens], sequence

    def append(self, sequence: int, token: int, stop: bool) -> tuple[int, bool, list[int]] | None:
        self.tokens[sequence].append(token)
        if stop or token == STOP or len(self.tokens[sequence]) == self.limit[sequence]:
            ended = (sequence, stop or token == STOP, self.tokens[sequence][self.prompt[sequence] :])
            self.end(sequence)
            return ended
        return None


class Driver:
    """Random calls of a manager beside the model."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        draw = self.random.randint
        self.size, self.rows, self.spaces = draw(1, 4), draw(1, 6), draw(1, 2)
        blocks, columns, self.most_prefill = draw(3, 16), draw(2, 12), draw(1, 9)
        self.longest = min(blocks, columns) * self.size
        self.manager = KVCacheManager(
            blocks + 1, self.size, self.rows, columns,
            max_prefill_tokens=self.most_prefill, stop_tokens=[STOP], namespaces=self.spaces,
        )  # fmt: skip
        self.naive, self.planned, self.versions = NaiveCache(self.manager), False, [0] * self.spaces
        self.decoding: set[int] = set()
        self.running: set[int] = set()
        self.base = [draw(0, 2) for _ in range(self.longest)]
        self.weights = [4, 4, 2, 1 if draw(0, 1) else 0.1]

    def operate(self) -> None:
        calls: list[Callable[[], None]] = [self.submit, self.fork, self.preempt, self.release, self.bump, self.wrong]
        weights = [3, 1, 0.3, 0.5, 0.2, 0.5]
        if self.planned or self.random.random() < 0.7:
            self.random.choices([self.step, self.submit, self.reset, self.wrong], [10, 1, 0.05, 0.3])[0]()
        else:
            self.random.choices([self.step, *calls], [5, *weights])[0]()
        self.manager.check_integrity()
        statistics = self.manager.statistics
        assert statistics.running + statistics.waiting == len(self.naive.tokens)
        total = statistics.free_blocks + statistics.cached_blocks + statistics.blocks_in_use
        assert total == self.manager.num_blocks - 1

    def some(self, running: bool = False) -> list[int]:
        known = [s for s in self.naive.tokens if not running or self.manager.sequence(s).row >= 0]
        return self.random.sample(known, min(len(known), self.random.randint(0, 2)))

    def submit(self) -> None:
        if self.longest < 2 or len(self.naive.tokens) > 12:
            return
        draw = self.random.randint
        prompt = self.base[: draw(1, min(self.longest - 1, draw(1, 20)))]
        if draw(0, 1):
            prompt[-1] = draw(0, 2)
        limits = [draw(1, self.longest - len(prompt)) for _ in range(draw(1, 4))]
        space = draw(0, self.spaces - 1)
        first = self.manager.submit(int64(*prompt), int64(*limits), space)
        for sequence, limit in enumerate(limits, first):
            self.naive.add(sequence, prompt, len(prompt), len(prompt) + limit, space)

    def step(self) -> None:
        """The step that is planned ends, and often another one is planned at once."""
        count = self.samples if self.planned else 0
        sampled = [self.random.choices(range(4), self.weights)[0] for _ in range(count)]
        stops = [self.random.random() < 0.02 for _ in sampled]
        ids = self.manager.sample_ids[:count].tolist()
        budget = self.random.choice([0, self.most_prefill, self.random.randint(0, self.most_prefill)])
        if self.planned and self.random.random() < 0.4:
            finished = self.manager.commit(int64(*sampled), np.array(stops, bool))
            self.planned = False
            step = None
        else:
            step = self.manager.step(int64(*sampled), budget, np.array(stops, bool))
            finished = step.finished
        ended = [self.naive.append(*drawn) for drawn in zip(ids, sampled, stops, strict=True)]
        assert [(f.id, f.stopped, f.response.tolist()) for f in finished] == [e for e in ended if e]
        if step is not None:
            self.look_at(step, budget)

    def look_at(self, step: Step, budget: int) -> None:
        naive, manager = self.naive, self.manager
        self.planned, self.samples = step.num_members > 0, step.num_samples
        assert self.planned or not naive.tokens or budget == 0, "somebody always gets on"
        assert step.num_tokens - step.num_decodes <= budget
        infos = {sequence: manager.sequence(sequence) for sequence in naive.tokens}
        running = {sequence for sequence, info in infos.items() if info.row >= 0}
        done = {sequence for sequence in running if infos[sequence].cached_tokens == len(naive.tokens[sequence])}
        sampling = manager.sample_ids[: step.num_samples].tolist()
        assert len(set(sampling)) == len(sampling)
        assert (self.decoding & running) - set(step.preempted) <= set(sampling) <= done
        self.decoding = set(sampling)
        for sequence in running - self.running:
            assert infos[sequence].version == self.versions[naive.space[sequence]], "starts under the present weights"
        self.running = running
        assert all(manager.tokens_of(sequence).tolist() == tokens for sequence, tokens in naive.tokens.items())
        assert step.preempted == sorted(step.preempted, reverse=True), "the youngest first"
        naive.run(step)

    def fork(self) -> None:
        for parent in self.some()[:1]:
            count = self.random.randint(1, len(self.naive.tokens[parent]))
            child = self.manager.fork(parent, count)
            naive = self.naive
            prompt = min(count, naive.prompt[parent])
            naive.add(child, naive.tokens[parent][:count], prompt, naive.limit[parent], naive.space[parent])
            self.running.add(child)

    def preempt(self) -> None:
        ids = self.some(running=True)
        self.manager.preempt(int64(*ids))
        self.decoding -= set(ids)

    def release(self) -> None:
        ids = self.some()
        self.manager.release(int64(*ids))
        for sequence in ids:
            self.naive.end(sequence)

    def bump(self) -> None:
        if self.random.random() < 0.2:
            return self.manager.clear_cache()
        space = self.random.randrange(self.spaces)
        self.versions[space] += 1
        assert self.manager.bump_version(space) == self.manager.version(space) == self.versions[space]
        return None

    def reset(self) -> None:
        self.manager.reset()
        for sequence in list(self.naive.tokens):
            self.naive.end(sequence)
        self.planned = False
        statistics = self.manager.statistics
        assert (statistics.blocks_in_use, statistics.cached_blocks, statistics.running) == (0, 0, 0)

    def wrong(self) -> None:
        manager, good = self.manager, self.some()
        empty, unknown = int64(), int64(*good, 10**9)
        calls: list[Callable[[], Any]] = [
            lambda: manager.submit(empty, int64(1)),
            lambda: manager.submit(int64(1), int64(1, self.longest)),
            lambda: manager.submit(int64(-1), int64(1)),
            lambda: manager.submit(int64(1), int64(1), self.spaces),
            lambda: manager.release(unknown),
            lambda: manager.release(int64(*good, *good, -1)),
            lambda: manager.preempt(unknown),
            lambda: manager.fork(-1, 1),
            lambda: manager.bump_version(self.spaces),
            lambda: manager.step(empty, self.most_prefill + 1),
            lambda: manager.step(int64(*[0] * 99), 0),
        ]
        calls += [lambda: manager.fork(good[0], len(self.naive.tokens[good[0]]) + 1)] if good else []
        calls += [lambda: manager.plan(0), lambda: manager.release(empty)] if self.planned else []
        before = self.snapshot()
        with pytest.raises(ValueError, match=r"\w"):
            self.random.choice(calls)()
        assert self.snapshot() == before

    def snapshot(self) -> tuple[Any, ...]:
        manager, statistics = self.manager, self.manager.statistics
        return *(getattr(manager, name).tobytes() for name in VIEWS), *(getattr(statistics, n) for n in COUNTS)


@pytest.mark.parametrize("seed", range(10))
def test_random_operations(seed: int) -> None:
    for part in range(50):
        driver = Driver(1000 * seed + part)
        for _ in range(200):
            driver.operate()
