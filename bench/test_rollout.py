"""Rollouts by the engine and by `generate` of transformers; work, models and script are those of `bench_rollout.py`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from bench_rollout import measure, title
from replay import CLOCK, replay


@lru_cache(maxsize=1)
def rollouts(device: str, quick: bool) -> dict[str, Any]:
    return measure(torch.device(device), rounds=2 if quick else 3, count=4 if quick else 48)


@pytest.mark.parametrize("provider", ["ppomax", "transformers"])
@pytest.mark.benchmark(timer=CLOCK)
def test_rollouts(provider: str, device: str, quick: bool, benchmark: Any) -> None:
    result = rollouts(device, quick)
    times = [1e3 * seconds for seconds in result["seconds"][provider]]
    rate = result["tokens_per_second"][provider]
    replay(benchmark, title(result["prompts"]), provider, times, tokens=result["tokens"], tokens_per_second=rate)
