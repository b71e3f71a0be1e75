"""What a committed figure has to say of where it was measured."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib import metadata

import torch


def environment() -> dict[str, str | int]:
    """Machine, versions, date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a release's build is not in its metadata
        **{name: _version(name) for name in ("triton", "transformers", "ppomax")},
    }


def peers() -> dict[str, str]:
    """Versions of the packages that operations are measured beside, of those that are installed."""
    versions = {name: _version(name) for name in ("liger-kernel", "trl", "cut-cross-entropy", "flash-attn")}
    return {name: version for name, version in versions.items() if version != "none"}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
