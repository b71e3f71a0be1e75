"""The GPUs that a run can be planned for: memory and ceilings, each with where it comes from."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .errors import InputError

MIB, GIB = 1 << 20, 1 << 30

MEASURED = "measured: matmul in bfloat16, bytes read and written; links: vendor data sheet"
SHEET = "vendor data sheet: dense bfloat16 with float32 sums; a program reaches less"


@dataclass(frozen=True)
class Chip:
    """What a plan has to know of a device."""

    name: str
    memory: int
    """Bytes that a program can have"""
    flops: float | None
    """Dense bfloat16 products, FLOP/s; None: unknown"""
    bandwidth: float | None
    """Of its memory, bytes/s read and written"""
    link: float | None
    """To another GPU of the machine, bytes/s in one direction"""
    host_link: float | None
    """To the host, bytes/s in one direction"""
    source: str

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


def _gpu(name: str, gib: float, tflops: float, tb_s: float, link: float, host: float, source: str = SHEET) -> Chip:
    return Chip(name, int(gib * GIB), tflops * 1e12, tb_s * 1e12, link * 1e9, host * 1e9, source)


# usable GiB, TFLOP/s, TB/s; GB/s in one direction to another GPU (NVLink, PCIe where there is none) and to the host
GPUS = {
    chip.name: chip
    for chip in (
        _gpu("h200", 139, 790, 4.3, 450, 64, MEASURED),
        _gpu("h100-80", 79, 989, 3.35, 450, 64),
        _gpu("a100-80", 79, 312, 2.04, 300, 32),
        _gpu("a100-40", 39, 312, 1.56, 300, 32),
        _gpu("b200", 178, 2250, 8.0, 900, 64),
        _gpu("l40s", 44, 362, 0.864, 32, 32),
        _gpu("rtx-4090", 23.5, 165, 1.01, 32, 32),
    )
}


def chip(name: str) -> Chip:
    """The GPU of that name, or this machine's `cpu`; InputError lists those that are known."""
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Chip("cpu", memory, None, None, None, None, "this machine")
    if name not in GPUS:
        raise InputError(f"unknown GPU {name!r}; expected one of {', '.join(GPUS)}, cpu")
    return GPUS[name]


def chip_of(device: torch.device) -> Chip:
    """The device that a run is on, with ceilings where its name is known here."""
    if device.type != "cuda":
        return chip("cpu")
    properties = torch.cuda.get_device_properties(device)
    called, memory = properties.name.lower().replace(" ", "-"), properties.total_memory
    for known in GPUS.values():
        family, _, size = known.name.partition("-")
        model = known.name if family == "rtx" else family
        if model in called and (family == "rtx" or not size or abs(memory / GIB - int(size)) < 8):
            return Chip(**{**vars(known), "memory": memory})
    return Chip(properties.name, memory, None, None, None, None, "a GPU whose ceilings are not known here")
