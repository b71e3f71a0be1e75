"""The scripts of bench/ as modules."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """bench(name): the module bench/name.py. Without a GPU its kernels are for Triton's interpreter, as in the tests
    of the kernels."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return import_module
