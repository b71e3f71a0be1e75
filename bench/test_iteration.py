"""A whole PPO iteration: ours on any device (`bench_iteration.py`), and beside TRL's trainer on a CPU (`vs_trl.py`)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from bench_iteration import measure, small_setting
from ops import Absent, peer
from replay import CLOCK, replay
from vs_trl import measured

TRL = peer("trl.experimental.ppo", "PPOTrainer")  # of 1.12
CASE, ENGINES = "equal lengths", {"ppomax": "ppomax", "TRL": "trl"}


@pytest.mark.benchmark(timer=CLOCK)
def test_iteration(device: str, quick: bool, benchmark: Any) -> None:
    """Its phases' seconds, FLOP/s and memory are in `extra_info`."""
    prompts, response = (4, 8) if quick else (32, 64)
    setting = small_setting(prompts, prompt=response, response=response)
    result = measure(setting, torch.device(device), iterations=2 if quick else 5)
    rows = [times["ppomax"] for times in result["samples_ms"].values()]
    case = f"iteration, {prompts} prompts of {response} + {response} tokens"
    extra = {name: result[name] for name in ("tokens_per_second", "peak_bytes", "rows", "groups", "not_explained")}
    replay(benchmark, case, "ppomax", [sum(times) for times in zip(*rows, strict=True)], **extra)


@lru_cache(maxsize=1)
def beside(quick: bool) -> dict[str, dict[str, Any]]:
    """By provider the milliseconds of each iteration but a process's first, and the peak of memory above the models.
    Processes alternate."""
    present = [name for name in ENGINES if name != "TRL" or not isinstance(TRL, Absent)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in present}
    for _ in range(1 if quick else 2):
        for name, results in runs.items():
            results.append(measured(ENGINES[name], CASE, 2 if quick else 4))
    return {
        name: {"ms": [1e3 * s for r in results for s in r["seconds"]], "peak_bytes": max(r["above"] for r in results)}
        for name, results in runs.items()
    }


@pytest.mark.parametrize("provider", ENGINES)
@pytest.mark.benchmark(timer=CLOCK)
def test_iteration_beside_trl(provider: str, device: str, quick: bool, benchmark: Any) -> None:
    if device != "cpu":
        pytest.skip("on a CPU alone")
    if provider == "TRL" and isinstance(TRL, Absent):
        pytest.skip(TRL.reason)
    found = beside(quick)[provider]
    replay(benchmark, f"iteration, {CASE}", provider, found["ms"], peak_bytes=found["peak_bytes"])
