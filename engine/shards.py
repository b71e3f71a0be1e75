"""What optimizers do with sharded parameters: each process updates its own rows as plain tensors.

All here passes over parameters that are not sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from ..kernels.adamw import BLOCK
from .errors import InputError


def local_part(x: Tensor) -> Tensor:
    """What this process has of `x`: the same memory."""
    if not isinstance(x, DTensor):
        return x
    with torch.no_grad():  # a plain tensor, and no part of a graph
        return x.to_local()


def check_blocks(parameters: Sequence[Tensor]) -> None:
    """Raise InputError where blocks of 8-bit moments would lie across rows, which processes share among them."""
    for p in parameters:
        if isinstance(p, DTensor) and p.ndim >= 2 and _columns(p) % BLOCK:
            raise InputError(
                f"OptimConfig.moments = '8bit': with several processes expected weights with rows of a multiple of "
                f"{BLOCK} numbers, found {_columns(p)}"
            )


def as_whole(x: Tensor, parameter: Tensor) -> Tensor:
    """State `x` of this process's part of `parameter` as its part of the state of all of it.

    Scales of blocks `[2, blocks]` become `[2, rows, blocks of a row]` where blocks do not lie across rows, so that
    they are dealt with the rows.
    """
    if not x.ndim:
        return x
    if x.shape != local_part(parameter).shape and not _columns(parameter) % BLOCK:
        x = x.view(2, local_part(parameter).shape[0], _columns(parameter) // BLOCK)
    if not isinstance(parameter, DTensor):
        return x
    rows = 0 if x.shape == local_part(parameter).shape else 1
    shape = torch.Size([*x.shape[:rows], parameter.shape[0], *x.shape[rows + 1 :]])
    stride = torch.empty(shape, device="meta").stride()
    mesh = _mesh_of(x, parameter.device_mesh)
    placements = [Shard(rows) if each.is_shard() else each for each in parameter.placements]
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=shape, stride=stride)


def new_whole(shape: torch.Size, dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """Room for saved state of `parameter`, of which this process has the part that belongs to its part of it."""
    if not isinstance(parameter, DTensor):
        return torch.empty(shape, dtype=dtype, device=parameter.device)
    rows = local_part(parameter).shape[0]
    local = [rows, *shape[1:]] if shape == parameter.shape else [shape[0], rows, *shape[2:]]
    return as_whole(torch.empty(local, dtype=dtype, device=parameter.device), parameter)


def as_part(x: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of `as_whole`, on the parameter's device; what is there is not copied."""
    x = local_part(x)
    if x.ndim and x.shape != local_part(parameter).shape:
        x = x.flatten(1)
    return x.to(parameter.device)


def over_processes(norm: Tensor, like: Tensor) -> Tensor:
    """The norm of all parts of what is sharded as `like`, from that of this process's."""
    if not isinstance(like, DTensor):
        return norm
    placements = [Partial() if each.is_shard() else each for each in like.placements]
    squares = DTensor.from_local(norm.square(), like.device_mesh, placements, run_check=False)
    return squares.full_tensor().sqrt()


def _columns(parameter: Tensor) -> int:
    return parameter.numel() // max(parameter.shape[0], 1)


def _mesh_of(x: Tensor, mesh: DeviceMesh) -> DeviceMesh:
    """The processes of `mesh`, for tensors where `x` is: state may wait in host memory."""
    return mesh if x.device.type == mesh.device_type else _host_mesh(mesh)


@cache
def _host_mesh(mesh: DeviceMesh) -> DeviceMesh:
    return DeviceMesh("cpu", mesh.mesh)
