"""Every operation of `suites.py`, its providers side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from replay import CLOCK, replay


@pytest.mark.benchmark(timer=CLOCK)
def test_operation(operation: str, provider: str, measured_operation: Callable[[str], Any], benchmark: Any) -> None:
    entry, samples = measured_operation(operation)
    found = entry["providers"][provider]
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert "failed" not in found, f"{found['failed']}: error {found.get('error')}, at most {entry['tolerance']}"
    replay(benchmark, operation, provider, samples[provider], floor_ms=entry["floor_ms"], **found)
