"""The linear layers of a model on a CPU: oneDNN's product forward and backward, or fixed tiles in the exact mode.

torch's own fp32 product uses a part of the vector width of some CPUs (`kernels/matmul.py`); under a transformer's
trunk that is most of the time of a training step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.matmul import MIN_ROWS, matmul_t
from .exact import TILE, pad_to_tiles

_tiled = False


@contextmanager
def tiled_linear() -> Iterator[None]:
    """Inside, the layers that `speed_up` has seen compute TILE rows at a time (see `exact.py`)."""
    global _tiled
    outer, _tiled = _tiled, True
    try:
        yield
    finally:
        _tiled = outer


def is_tiled() -> bool:
    """Whether the call is inside `tiled_linear`."""
    return _tiled


def speed_up(model: nn.Module) -> None:
    """Have the model's plain linear layers call `linear`. Parameters, names and results stay; on a GPU all does."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, x `[..., H]`."""
    if _tiled:
        rows = x.reshape(-1, x.shape[-1])
        tiles = [F.linear(tile, weight, bias) for tile in pad_to_tiles(rows).split(TILE)]
        return torch.cat(tiles)[: rows.shape[0]].view(*x.shape[:-1], weight.shape[0])
    if torch.compiler.is_compiling():  # one graph for any number of rows
        return F.linear(x, weight, bias)
    rows_count = x.numel() // max(x.shape[-1], 1)
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or rows_count < MIN_ROWS:
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = matmul_t(x, weight)
        return out if bias is None else out + bias  # not in place: selective checkpointing keeps the product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            matmul_t(g, weight.t()) if wants_x else None,
            matmul_t(g.t(), x.t()) if wants_weight else None,
            g.sum(0) if wants_bias else None,
        )
