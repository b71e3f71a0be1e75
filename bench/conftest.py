"""`pytest bench --benchmark-only`: every operation, the KV manager, rollouts and an iteration, providers side by side.

Cases and measurements are those of the scripts beside this file; `replay.py` says how samples alternate. A provider
that is wrong fails, one that cannot run here is skipped with the reason (`-rs` shows it). Rates, shares of the floor,
memory and errors are in each benchmark's `extra_info`, and for operations in the last table; machine, versions and date
are in the file's `machine_info`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import suites
from bench_kernels import device_name, show
from environment import environment, peers
from measure import Entry, Plan, Samples, gates, is_known, measured
from ops import Op
from timing import settle

OPS, ENTRIES = pytest.StashKey[list[Op]](), pytest.StashKey[list[Entry]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("bench", "ppomax's benchmarks")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    options.addoption("--device", choices=["cuda", "cpu"], default=default)
    options.addoption("--quick", action="store_true", help="the smallest sizes")
    options.addoption("--full", action="store_true", help="on a CPU the LM head of a vocabulary of 128256 too: minutes")


def pytest_configure(config: pytest.Config) -> None:
    settle()
    option = config.option
    config.stash[OPS] = suites.of(option.device, quick=option.quick, full=option.full)
    config.stash[ENTRIES] = []
    if getattr(option, "benchmark_columns", ()) is None:
        option.benchmark_columns = ["median", "iqr", "min", "rounds"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"operation", "provider"} <= set(metafunc.fixturenames):
        cases = [(op.title, name) for op in metafunc.config.stash[OPS] for name in op.providers]
        metafunc.parametrize(("operation", "provider"), cases)


@pytest.fixture(scope="session")
def measured_operation(pytestconfig: pytest.Config) -> Callable[[str], tuple[Entry, Samples]]:
    """An operation's entry and samples by its title; taken when the first of its providers asks."""
    device, quick = pytestconfig.option.device, pytestconfig.option.quick
    plan = Plan(device, known=is_known(device, quick))._replace(**{"samples": 3, "seconds": 0.0} if quick else {})

    @lru_cache(maxsize=1)  # the tests of an operation follow each other
    def measure(title: str) -> tuple[Entry, Samples]:
        entry, samples = measured(next(op for op in pytestconfig.stash[OPS] if op.title == title), plan)
        pytestconfig.stash[ENTRIES].append(entry)
        return entry, samples

    return measure


@pytest.fixture
def device(pytestconfig: pytest.Config) -> str:
    name: str = pytestconfig.option.device
    return name


@pytest.fixture
def quick(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.option.quick)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= {"environment": environment(), "peers": peers()}


def pytest_terminal_summary(config: pytest.Config) -> None:
    entries, option = config.stash[ENTRIES], config.option
    if entries:
        held = gates(config.stash[OPS], entries) if is_known(option.device, option.quick) else {}
        show({"device": device_name(option.device), "ops": entries, "gates": held})
