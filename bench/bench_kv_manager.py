"""Microseconds per step of the KV-cache manager at 256, 512 and 1024 running sequences.

    python bench/bench_kv_manager.py [--steps 4000] [--json bench/results/kv_manager.json]

One call of `step` per decode step: sampled tokens in, who ends, blocks hashed as they fill, blocks allocated, the next
step's tokens, positions, slots and block table out. The load: groups of 8 samples of one prompt of 64 to 512 tokens,
responses of 16 to 1024, blocks of 16, a pool that cached blocks of ended sequences fill, so that each new block evicts
one. Every 8th step takes prompts; after it the new samples copy their prompt's partial block. Called from Python in one
thread; the sampled tokens are drawn before. "Cold": before each step 8 MiB of other memory are read, as a forward pass
would. Beside the time on the clock stands that on the processor, which other load on the machine does not lengthen
by waiting.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import records
import torch
from environment import environment
from ppomax.engine._kv import KVCacheManager, Step
from rich.console import Console
from rich.table import Table

SIZES, BLOCK_SIZE, SAMPLES, EVERY, VOCABULARY, PREFILL = (256, 512, 1024), 16, 8, 8, 128_000, 8192
SHORTEST_PROMPT, LONGEST_PROMPT, SHORTEST, LONGEST = 64, 512, 16, 1024
BLOCKS_PER_SEQUENCE = 64  # of the pool; a sequence needs 41 on average when it ends


class Load:
    """A manager with `sequences` rows under a steady load."""

    def __init__(self, sequences: int) -> None:
        columns = -(-(LONGEST_PROMPT + LONGEST) // BLOCK_SIZE)
        blocks = sequences * BLOCKS_PER_SEQUENCE
        self.manager = KVCacheManager(blocks, BLOCK_SIZE, sequences, columns, max_prefill_tokens=PREFILL)
        self.random = np.random.default_rng(0)
        self.sampled = self.random.integers(0, VOCABULARY, (64, sequences))
        self.other = np.zeros(8 << 17)  # 8 MiB
        self.count = 0
        self.planned = self.manager.plan(0)

    def fill_queue(self) -> None:
        """Twice as many as there are rows, ended ones not counted."""
        statistics = self.manager.statistics
        for _ in range(statistics.waiting + statistics.running, 2 * self.manager.max_sequences, SAMPLES):
            prompt = self.random.integers(0, VOCABULARY, self.random.integers(SHORTEST_PROMPT, LONGEST_PROMPT + 1))
            self.manager.submit(prompt, self.random.integers(SHORTEST, LONGEST + 1, SAMPLES))

    def step(self, *, cold: bool = False) -> tuple[tuple[float, float], Step]:
        """((microseconds on the clock, on the processor), the step that was planned)"""
        self.fill_queue()
        tokens = self.sampled[self.count % len(self.sampled), : self.planned.num_samples]
        budget = PREFILL if self.count % EVERY == 0 else 0
        self.count += 1
        if cold:
            self.other.sum()
        used, started = time.thread_time_ns(), time.perf_counter_ns()
        self.planned = self.manager.step(tokens, budget)
        elapsed, used = time.perf_counter_ns() - started, time.thread_time_ns() - used
        return (elapsed / 1e3, used / 1e3), self.planned

    def warm_up(self) -> None:
        """Until all rows are taken and the pool is full of cached blocks."""
        while self.manager.statistics.free_blocks or self.manager.statistics.running < self.manager.max_sequences:
            self.step()
        self.manager.check_integrity()


def measure(sequences: int, steps: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """(figures, milliseconds of each step by its kind)."""
    load = Load(sequences)
    load.warm_up()
    times: dict[str, list[tuple[float, float]]] = {"decode": [], "decode, cold": [], "with prefill": []}
    copies = ended = decodes = 0
    before = load.manager.statistics
    for i in range(2 * steps):
        cold = i >= steps
        elapsed, step = load.step(cold=cold)
        decoding = step.num_decodes == step.num_members
        if decoding or not cold:
            times[("decode, cold" if cold else "decode") if decoding else "with prefill"].append(elapsed)
        copies, ended, decodes = copies + step.num_copies, ended + len(step.finished), decodes + step.num_decodes
    after = load.manager.statistics
    load.manager.check_integrity()
    assert after.evictions - before.evictions > 2 * steps, "each step should evict"
    assert copies > 2 * steps / EVERY, "new samples should copy"
    counts = {"decodes": decodes, "evictions": after.evictions - before.evictions, "copies": copies, "ended": ended}
    figures = {
        "sequences": sequences,
        "microseconds": {name: quantiles(values) for name, values in times.items()},
        "per_step": {name: round(count / (2 * steps), 2) for name, count in counts.items()},
    }
    return figures, {name: [elapsed / 1e3 for elapsed, _ in values] for name, values in times.items()}


def title(sequences: int, kind: str) -> str:
    return f"KV manager, {kind}, {sequences} sequences"


def quantiles(values: list[tuple[float, float]]) -> dict[str, float]:
    elapsed, used = np.array(values).T
    names = {"median": (elapsed, 50), "p99": (elapsed, 99), "cpu_median": (used, 50), "cpu_p99": (used, 99)}
    return {"steps": len(values)} | {name: round(float(np.percentile(*of)), 1) for name, of in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured = {sequences: measure(sequences, arguments.steps) for sequences in SIZES}
    results = [figures for figures, _ in measured.values()]
    table = Table("sequences", "steps", "", "median", "p99", "CPU median", "CPU p99", title="µs per step")
    for result in results:
        for name, figures in result["microseconds"].items():
            steps, *times = map(str, figures.values())
            table.add_row(str(result["sequences"]), steps, name, *times)
    Console().print(table)
    for result in results:
        print(result["sequences"], "sequences, per step:", result["per_step"])
    if arguments.json:
        load = {"block_size": BLOCK_SIZE, "samples": SAMPLES, "prompts": [SHORTEST_PROMPT, LONGEST_PROMPT],
                "responses": [SHORTEST, LONGEST], "blocks_per_sequence": BLOCKS_PER_SEQUENCE,
                "prompts_every": EVERY}  # fmt: skip
        samples = {
            title(sequences, kind): {"ppomax": records.thinned(times)}
            for sequences, (_, kinds) in measured.items()
            for kind, times in kinds.items()
        }
        records.write(arguments.json, {"load": load, "results": results, "environment": environment(),
                                       "samples_ms": samples})  # fmt: skip


if __name__ == "__main__":
    main()
