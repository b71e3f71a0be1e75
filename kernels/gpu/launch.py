"""How kernels are launched: committed configurations per chip and shape, and a record of launches in place of them.

`configs.json` holds, per chip and kernel, a list of configurations; each may state the largest shape it is
for (`"up_to": {"vocab": 4096}`), and the first that fits is taken. A chip without an entry for a kernel
takes `default`, which fits into 99 KiB of shared memory: no chip from sm_80 on has less for a program. Nothing
is timed or searched for while training runs: `bench/tune.py` does that, and writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import dispatch

# of the chips that launches are recorded for
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170}
_NEXT_OF_KIN = {"sm_103": "sm_100", "sm_121": "sm_120"}  # whose entries serve a chip without its own
_OLDEST = (8, 0)
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Launch(NamedTuple):
    """A launch as it was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, constexprs included
    options: dict[str, int]  # of _OPTIONS


class Recording(list[Launch]):
    """Launches in order, and what `configuration` was asked for: (kernel, its result)."""

    def __init__(self, chip: str) -> None:
        super().__init__()
        self.chip = chip
        self.configurations: list[tuple[str, dict[str, int]]] = []


_recording: Recording | None = None
_overriding: dict[str, Mapping[str, int]] = {}


@contextmanager
def recording(chip: str) -> Iterator[Recording]:
    """Inside, `launch` notes what it would launch on `chip` and launches nothing; tensors are on "meta"."""
    global _recording
    if chip not in MULTIPROCESSORS:
        raise ValueError(f"launches are recorded for {', '.join(MULTIPROCESSORS)}, not for {chip}")
    outer, _recording, dispatch.recording = _recording, Recording(chip), True
    try:
        yield _recording
    finally:
        _recording, dispatch.recording = outer, outer is not None


@contextmanager
def overriding(name: str, config: Mapping[str, int]) -> Iterator[None]:
    """Inside, `configuration` of the kernel is `config` whatever the shape."""
    outer = dict(_overriding)
    _overriding[name] = config
    try:
        yield
    finally:
        _overriding.clear()
        _overriding.update(outer)


def launch(kernel: Any, grid: Sequence[int], config: Mapping[str, int], **arguments: Any) -> None:
    """kernel[grid](**arguments, **config) on the device of its tensors; an empty grid launches nothing.

    Raises:
        RuntimeError: the kernel cannot be compiled or launched; names it, its configuration and its tensors.
    """
    if min(grid) == 0:
        return
    options = {name: config[name] for name in _OPTIONS if name in config}
    arguments.update({name: value for name, value in config.items() if name not in _OPTIONS})
    if _recording is not None:
        _recording.append(Launch(kernel, tuple(grid), arguments, options))
        return
    try:
        with _device_of(arguments):
            kernel[tuple(grid)](**arguments, **options, enable_fp_fusion=True)
    except Exception as error:
        shapes = {name: tuple(x.shape) for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        raise RuntimeError(f"{kernel.__name__}: grid {tuple(grid)}, {dict(config)}, {shapes}: {error}") from error


def _device_of(arguments: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Within it a launch is on the device of the first tensor: Triton takes the current one, whatever it is given."""
    device = next((x.device for x in arguments.values() if isinstance(x, torch.Tensor)), None)
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def configuration(name: str, device: torch.device, **shape: int) -> dict[str, int]:
    """The launch configuration of a kernel for a shape: its block sizes, num_warps and num_stages.

    Raises:
        LookupError: configs.json has none for this kernel and shape.
    """
    if name in _overriding:
        return dict(_overriding[name])
    config = dict(_configuration(name, chip_of(device), tuple(sorted(shape.items()))))
    if _recording is not None:
        _recording.configurations.append((name, dict(config)))
    return config


@cache
def _configuration(name: str, chip: str, shape: tuple[tuple[str, int], ...]) -> dict[str, int]:
    tables, sizes = table(), dict(shape)
    own = (tables.get(each, {}).get(name) for each in (chip, _NEXT_OF_KIN.get(chip, chip), "default"))
    for entry in next(filter(None, own), []):
        limits = entry.get("up_to", {})
        if not limits.keys() <= sizes.keys():
            raise LookupError(f"configurations of {name} go by {', '.join(limits)}; asked for {sizes}")
        if all(sizes[key] <= most for key, most in limits.items()):
            return {key: value for key, value in entry.items() if key != "up_to"}
    raise LookupError(f"configs.json has no configuration of {name} on {chip} at {sizes}")


@cache
def table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """configs.json: chip -> kernel -> configurations."""
    result: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(
        (Path(__file__).parent / "configs.json").read_text()
    )
    return result


def chip_of(device: torch.device) -> str:
    """ "sm_90" and the like; "default" where there is no GPU.

    Raises:
        RuntimeError: a GPU older than sm_80.
    """
    if _recording is not None:
        return _recording.chip
    return _capability(device) if device.type == "cuda" else "default"


@cache
def _capability(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} is sm_{capability[0]}{capability[1]}: the kernels are for sm_80 "
            "(Ampere) and later GPUs"
        )
    return f"sm_{capability[0]}{capability[1]}"


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
