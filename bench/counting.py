"""The work of torch operations, counted from shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_FREE = (_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided)
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.baddbmm: 1}  # where the left factor stands


class TorchWork(TorchDispatchMode):
    """Within it, `bytes` grows by the inputs and results of each torch operation that is no view and no allocation,
    `flops` by those of matrix products. Tensors may be on "meta".

    Our own custom operations run their bodies, whatever the device, where torch would only ask for the results'
    shapes: so that what they launch and compute is seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("ppomax::"):
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        result = kwargs["out"] if _unknown_on_meta(func, kwargs) else func(*args, **kwargs)
        packet = func.overloadpacket
        if packet not in _FREE and not _is_view(func):
            read = {name: x for name, x in kwargs.items() if name != "out"}
            self.bytes += sum(x.numel() * x.element_size() for x in tree_leaves((args, read, result)) if _is_tensor(x))
        if packet in _PRODUCTS:
            self.flops += 2 * result.numel() * args[_PRODUCTS[packet]].shape[-1]
        return result


def _unknown_on_meta(func: Any, kwargs: Any) -> bool:
    """Torch 2.11 takes this one's dtype for a factor where there is nothing to compute."""
    return func is _aten.addmm.dtype_out and kwargs["out"].is_meta


def _is_view(func: Any) -> bool:
    aliases = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)
