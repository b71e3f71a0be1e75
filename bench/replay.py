"""Samples taken elsewhere, handed to pytest-benchmark.

It times one function after another, so a machine that slows down for a while slows one provider. Here the providers of
a case are timed in turn, a sample of each a round, when the first of them is asked for; each one's test then lets
pytest-benchmark time a clock that advances by the samples, one a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


class Clock:
    """Seconds; stands still but for `advance`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        self.now += next(self.steps, 0.0)  # a call more where pytest-benchmark times nothing


CLOCK = Clock()


def replay(benchmark: Any, case: str, provider: str, samples_ms: Sequence[float], **extra: Any) -> None:
    """Makes the samples those of this test's benchmark; the test is marked `benchmark(timer=CLOCK)`."""
    benchmark.group = case
    benchmark.extra_info.update(provider=provider, **extra)
    CLOCK.now, CLOCK.steps = 0.0, iter([ms / 1e3 for ms in samples_ms])
    benchmark.pedantic(CLOCK.advance, rounds=len(samples_ms))
