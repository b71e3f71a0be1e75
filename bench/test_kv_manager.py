"""A step of the KV-cache manager at each number of running sequences; the load is that of `bench_kv_manager.py`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from bench_kv_manager import SIZES, measure, title
from replay import CLOCK, replay


@lru_cache(maxsize=1)  # its checks of integrity, evictions and copies come before any figure
def steps(sequences: int, quick: bool) -> tuple[dict[str, Any], dict[str, list[float]]]:
    return measure(sequences, 50 if quick else 1000)


@pytest.mark.parametrize("kind", ["decode", "decode, cold", "with prefill"])
@pytest.mark.parametrize("sequences", SIZES)
@pytest.mark.benchmark(timer=CLOCK)
def test_step(sequences: int, kind: str, quick: bool, benchmark: Any) -> None:
    figures, times = steps(sequences, quick)
    found = figures["microseconds"][kind]
    replay(benchmark, title(sequences, kind), "ppomax", times[kind], per_step=figures["per_step"], microseconds=found)
