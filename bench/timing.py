"""Times of functions beside each other, their memory, and their errors."""

from __future__ import annotations

import atexit
import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

Functions: TypeAlias = Mapping[str, Callable[[], Any]]
Timer: TypeAlias = Callable[[Functions, int], dict[str, list[float]]]

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far
AHEAD_CYCLES = 1_000_000  # of the GPU, about half a millisecond: the host is done launching by then


def cuda_times(functions: Functions, samples: int) -> dict[str, list[float]]:
    """Milliseconds of each sample, one sample of every function in each round.

    Before each, L2 is flushed and the GPU kept busy, so that the events enclose work on the device alone and no
    waiting for the host (where it launches in less than half a millisecond).
    """
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    warm_up(functions)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(samples):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            scratch.zero_()
            torch.cuda._sleep(AHEAD_CYCLES)
            start.record()
            function()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


def cpu_times(
    functions: Functions, samples: int, *, least: int = 3, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Milliseconds of each sample, one sample of every function in each round; fewer rounds, but `least`, where they
    would take longer than `seconds`. No round is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    begun = time.perf_counter()
    for done in range(samples):
        if done >= least and time.perf_counter() - begun > seconds:
            break
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - started) * 1e3)
    return times


def settle() -> None:
    """Before all measurements: one thread, and what has been imported is no matter of the garbage collector's, which
    would take longer over it than most operations do."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else extension modules report leaks


def warm_up(functions: Functions, runs: int = 3) -> None:
    for function in functions.values():
        for _ in range(runs):
            function()


def cuda_peak(function: Callable[[], Any]) -> int:
    """Bytes that a call holds at its peak beside what was there before, as torch's allocator counts them."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(function: Callable[[], Any]) -> int:
    """Bytes by which a call raises the process's resident memory at its peak (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is reset to what is resident now
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def relative_error(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact|, Euclidean; NaN where either holds one, or where shapes differ."""
    if x.shape != exact.shape:
        return math.nan
    size = float(torch.linalg.vector_norm(exact.double()))
    return float(torch.linalg.vector_norm(x.double() - exact.double())) / (size or 1.0)


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN where any is."""
    errors = list(errors)
    return math.nan if any(math.isnan(error) for error in errors) else max(errors, default=0.0)
