"""The GPUs that a run can be planned for: memory and ceilings, each with where it comes from."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .errors import InputError

MIB, GIB = 1 << 20, 1 << 30

MEASURED = "measured: matmul in bfloat16, bytes read and written; peak and links: vendor data sheet"
PRODUCTS_REACHED, BANDWIDTH_REACHED = 0.8, 0.9  # by that H200, of the 989 TFLOP/s and 4.8 TB/s on its data sheet
SHEET = "vendor data sheet: 80 % of its dense bfloat16 products and 90 % of its bandwidth, as measured on an H200"


@dataclass(frozen=True)
class Chip:
    """What a plan has to know of a device."""

    name: str
    memory: int
    """Bytes that a program can have"""
    flops: float | None
    """The vendor's peak of dense bfloat16 products with float32 sums, FLOP/s, which MFU is of; None: unknown"""
    rate: float | None
    """FLOP/s that products are taken to reach"""
    bandwidth: float | None
    """That its memory is taken to reach, bytes/s read and written"""
    link: float | None
    """To another GPU of the machine, bytes/s in one direction"""
    host_link: float | None
    """To the host, bytes/s in one direction"""
    source: str

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


def _gpu(name: str, gib: float, tflops: float, tb_s: float, link: float, host: float) -> Chip:
    rate, bandwidth = PRODUCTS_REACHED * tflops * 1e12, BANDWIDTH_REACHED * tb_s * 1e12
    return Chip(name, int(gib * GIB), tflops * 1e12, rate, bandwidth, link * 1e9, host * 1e9, SHEET)


# usable GiB; TFLOP/s, TB/s; GB/s in one direction to another GPU (NVLink, PCIe where there is none) and to the host
GPUS = {
    chip.name: chip
    for chip in (
        Chip("h200", 139 * GIB, 989e12, 790e12, 4.3e12, 450e9, 64e9, MEASURED),
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
        return Chip("cpu", memory, None, None, None, None, None, "this machine")
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
        model = known.name if known.name.startswith("rtx") else known.name.partition("-")[0]
        # a part of a GPU, a laptop's and a superchip's bear the same name
        if model in called and abs(memory - known.memory) < 5 * GIB:
            return Chip(**{**vars(known), "memory": memory})
    return Chip(properties.name, memory, None, None, None, None, None, "a GPU whose ceilings are not known here")
