"""GPUs are known by the names and sizes that CUDA reports."""

from types import SimpleNamespace

import pytest
import torch
from ppomax.engine.hardware import GIB, GPUS, chip_of


@pytest.mark.parametrize(
    ("name", "gib", "known"),
    [
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H100 80GB HBM3", 79.2, "h100-80"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100 80GB PCIe", 79.3, "a100-80"),
        ("NVIDIA B200", 178.4, "b200"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx-4090"),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA H200 MIG 3g.71gb", 69.8, None),
        ("NVIDIA GH200 480GB", 94.5, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA L40", 44.4, None),
        ("NVIDIA RTX A6000", 47.5, None),
    ],
)
def test_what_a_device_is(name: str, gib: float, known: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name=name, total_memory=int(gib * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    chip = chip_of(torch.device("cuda"))
    assert chip.memory == properties.total_memory
    assert (chip.name, chip.flops) == ((name, None) if known is None else (known, GPUS[known].flops))
