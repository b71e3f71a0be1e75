"""Which path an operation takes: Triton on a GPU and in Triton's interpreter, torch elsewhere.

Every operation is a `torch.library` custom op whose body asks `uses_triton`; the Triton side of `x.py` is
`gpu/x.py`, imported only where it runs.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


recording = False  # launches are noted and not made (`gpu/launch.py`): tensors on "meta" stand for a GPU's


def interpreting() -> bool:
    """Triton's interpreter is asked for: its kernels run on CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def uses_triton(*tensors: Tensor | None) -> bool:
    """Whether an operation on these floating-point tensors runs in Triton: on CUDA or under the interpreter, unless
    any of them is float64."""
    given = [t for t in tensors if t is not None]
    where = (
        all(t.is_cuda for t in given)
        or (interpreting() and all(t.device.type == "cpu" for t in given))
        or (recording and all(t.is_meta for t in given))
    )
    return where and all(t.dtype in TRITON_DTYPES for t in given)


def traced(*tensors: Tensor | None) -> bool:
    """Whether a call has to go through its custom op: under `torch.compile`, or for tensors that only stand for some.
    Elsewhere operations without a gradient call their bodies, which spares the dispatcher's tens of microseconds."""
    plain = (Tensor, torch.nn.Parameter, type(None))
    return torch.compiler.is_compiling() or any(type(t) not in plain for t in tensors)


def dense(x: Tensor | None) -> Tensor | None:
    """`x` contiguous: kernels index per-token tensors plainly, and upstream gradients may be expanded scalars."""
    return None if x is None else x.contiguous()


def temperature_pair(temperature: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """(value, None) or (1.0, 0-dim fp32/fp64 tensor on the device of `like`): custom ops take no unions.

    Raises:
        ValueError: a tensor of more than one number: rows have no temperatures (or normalizers) of their own.
    """
    if not isinstance(temperature, Tensor):
        return float(temperature), None
    if temperature.numel() != 1:
        raise ValueError(f"expected one number for all rows, got a tensor of shape {tuple(temperature.shape)}")
    return 1.0, temperature.detach().reshape(()).to(like.device)
