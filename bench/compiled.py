"""Recorded launches, compiled ahead of time for a chip that need not be there, and what the machine code shows."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from intermediate import Access, accesses
from ppomax.kernels.gpu.launch import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDE = 16  # bytes a thread moves in the widest access that every chip has
MASK_WIDE = 4
_GLOBAL = re.compile(r"\b(?:LDG|STG|LDGSTS|RED|ATOMG)\.([\w.]+)")
_BULK = re.compile(r"\b(?:UTMALDG|UTMASTG|UTMAREDG|UBLKCP)\b")
_MATRIX = re.compile(r"\b(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)\b")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class Resources(NamedTuple):
    """What a compiled kernel takes of a multiprocessor, and what it moves and multiplies with."""

    registers: int  # of a thread
    local: int  # bytes of stack and local memory of a thread: spills
    shared: int  # bytes of a program
    widest: int  # bytes of the widest global access of a thread; 0 without any but bulk copies
    bulk: int  # instructions of the tensor memory accelerator
    matrix: tuple[str, ...]  # matrix instructions
    accesses: tuple[Access, ...]


class Specialised(NamedTuple):
    """A launch as the JIT would compile it."""

    source: ASTSource
    target: GPUTarget
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for launches that share a compiled kernel."""
        return f"{self.target.arch}-{self.source.hash()}-{sorted(self.options.items(), key=str)}"


def specialised(launch: Launch, chip: str) -> Specialised:
    """Signature, constants, divisibility and options of a launch, by the JIT's own functions."""
    target = GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialisation, options = bind(**launch.arguments, **launch.options, enable_fp_fusion=True)
    packed = launch.kernel._pack_args(backend, dict(options), bound, specialisation, options)
    return Specialised(ASTSource(launch.kernel, *packed[1:]), target, packed[0].__dict__)


def compile_launch(launch: Launch, chip: str) -> Resources:
    """The launch's kernel, from Triton's cache where it is there."""
    it = specialised(launch, chip)
    kernel = triton.compile(it.source, target=it.target, options=it.options)
    usage, sass = _disassembled(kernel.asm["cubin"])
    return Resources(
        registers=usage["REG"],
        local=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        widest=max(map(_width, _GLOBAL.findall(sass)), default=0),
        bulk=len(_BULK.findall(sass)),
        matrix=tuple(sorted(set(_MATRIX.findall(sass)))),
        accesses=tuple(accesses(kernel.asm["ttir"], kernel.asm["llir"])),
    )


def _disassembled(cubin: bytes) -> tuple[dict[str, int], str]:
    """(registers, stack and local bytes by cuobjdump's names, SASS)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (_tool("cuobjdump", option, path) for option in ("-res-usage", "-sass"))
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}, sass


def _tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _width(modifiers: str) -> int:
    """Bytes of LDG.E.128 and the like; 4 where none are named."""
    return max((_BYTES[part] for part in modifiers.split(".") if part in _BYTES), default=4)


def bytes_of(launch: Launch, access: Access) -> int:
    """What a launch moves by an access: the tensor once, or less where its programs together touch less of it.

    What caches serve again, and what masks leave out, is not seen.
    """
    tensor = tensor_of(launch, access)
    programs = 1
    for size in launch.grid:
        programs *= size
    return int(min(tensor.numel(), programs * access.elements)) * tensor.element_size()


def tensor_of(launch: Launch, access: Access) -> torch.Tensor:
    argument = launch.arguments[access.argument]
    tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
    assert isinstance(tensor, torch.Tensor)
    return tensor


def traffic(launch: Launch, found: Resources) -> int:
    return sum(bytes_of(launch, access) for access in found.accesses)


def wide_share(launch: Launch, found: Resources) -> float:
    """Of the bytes that blocks of values make up, the share moved in accesses of 16 bytes; 1 where there are none.

    A tensor counts as moved in the widest of the kernel's accesses to it: narrower ones beside that take the ends
    of a sequence, or what the cache holds already. A mask, one byte or one bit a token, counts from 4 bytes on: it
    goes with wider accesses to the same tokens' values. Tensors that are only ever touched a single value at a
    time (a row's label or statistics) are not counted: no width is to be had there.
    """
    blocks = [access for access in found.accesses if access.block]
    wide = sum(bytes_of(launch, access) for access in blocks if not is_narrow(launch, access))
    return wide / sum(bytes_of(launch, access) for access in blocks) if blocks else 1.0


def is_narrow(launch: Launch, access: Access) -> bool:
    mask = tensor_of(launch, access).dtype == torch.bool or access.argument == "bits_ptr"
    return access.block and access.widest < (MASK_WIDE if mask else WIDE)
