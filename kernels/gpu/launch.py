"""How kernels are launched: committed configurations per chip and shape, and a record of launches in place of them.

`configs.json` holds, per chip and kernel, a list of configurations; each may state the largest shape it is
for (`"up_to": {"vocab": 4096}`), and the first that fits is taken. A chip without an entry for a kernel
takes `default`. Nothing is timed or searched for while training runs: `bench/tune.py` does that, and
writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}  # of the chips that launches are recorded for
_OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """A launch as it was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, constexprs included
    options: dict[str, int]  # num_warps, num_stages


class Recording(NamedTuple):
    chip: str
    launches: list[Launch]


_recording: Recording | None = None


@contextmanager
def recording(chip: str) -> Iterator[list[Launch]]:
    """Inside, `launch` notes what it would launch on `chip` and launches nothing; tensors may be on "meta"."""
    global _recording
    outer, _recording = _recording, Recording(chip, [])
    try:
        yield _recording.launches
    finally:
        _recording = outer


def launch(kernel: Any, grid: Sequence[int], config: Mapping[str, int], **arguments: Any) -> None:
    """kernel[grid](**arguments, **config); an empty grid launches nothing."""
    if min(grid) == 0:
        return
    options = {name: config[name] for name in _OPTIONS if name in config}
    arguments.update({name: value for name, value in config.items() if name not in _OPTIONS})
    if _recording is not None:
        _recording.launches.append(Launch(kernel, tuple(grid), arguments, options))
        return
    kernel[tuple(grid)](**arguments, **options, enable_fp_fusion=True)


def configuration(name: str, device: torch.device, **shape: int) -> dict[str, int]:
    """The launch configuration of a kernel for a shape: its block sizes, num_warps and num_stages."""
    return _configuration(name, chip_of(device), tuple(sorted(shape.items())))


@cache
def _configuration(name: str, chip: str, shape: tuple[tuple[str, int], ...]) -> dict[str, int]:
    tables = table()
    entries = tables.get(chip, {}).get(name) or tables["default"][name]
    sizes = dict(shape)
    for entry in entries:
        if all(sizes[key] <= most for key, most in entry.get("up_to", {}).items()):
            return {key: value for key, value in entry.items() if key != "up_to"}
    raise LookupError(f"configs.json has no configuration of {name} for {chip} at {sizes}")


@cache
def table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """configs.json: chip -> kernel -> configurations."""
    result: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(
        (Path(__file__).parent / "configs.json").read_text()
    )
    return result


def chip_of(device: torch.device) -> str:
    """ "sm_90" and the like; "default" where there is no GPU."""
    if _recording is not None:
        return _recording.chip
    return _capability(device) if device.type == "cuda" else "default"


@cache
def _capability(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 4 stand for them where there is no GPU."""
    if _recording is not None:
        return MULTIPROCESSORS[_recording.chip]
    return _multiprocessors(device) if device.type == "cuda" else 4


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def splits_of(rows: int, columns: int, block: int, device: torch.device) -> int:
    """Programs per row, a power of two: one where the rows alone fill the chip twice, more where they are few."""
    most = max(1, -(-columns // block))
    wanted = -(-2 * multiprocessors(device) // max(rows, 1))
    splits = 1
    while splits * 2 <= min(wanted, most):
        splits *= 2
    return splits


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
