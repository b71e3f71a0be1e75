"""The matrix product under the LM head on a CPU, and arithmetic that autocast leaves alone.

fp32 products go to oneDNN's inner product, which uses all of a CPU's vector width where torch's default
library may use half (measured on an AVX-512 AMD CPU: 230 against 100 GFLOP/s), reads transposed operands as
they lie, and gives each row of the result the same bits whatever the number of rows, from two rows on. Other
dtypes and builds without it take `torch.mm`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
MIN_ROWS = 16  # below this a row's bits may depend on how many there are, in any of the libraries


def _inner_product() -> Callable[..., Tensor] | None:
    if not torch.backends.mkldnn.is_available():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default


_INNER_PRODUCT = _inner_product()


def matmul_t(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] times w [N, K] transposed: [M, N]. Either may be a transposed view; no gradient flows."""
    if _INNER_PRODUCT is None or x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel():
        return torch.mm(x, w.t())
    return _INNER_PRODUCT(x, w, None, "none", [], "")


def pad_rows(x: Tensor) -> Tensor:
    """`x` with zero rows appended up to MIN_ROWS, so that its rows' products have the bits they have among many."""
    missing = MIN_ROWS - x.shape[0]
    return x if missing <= 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


def full_precision(
    function: Callable[Concatenate[Tensor, Parameters], Result],
) -> Callable[Concatenate[Tensor, Parameters], Result]:
    """Switches autocast off inside a function whose first argument is a tensor on its device."""

    @wraps(function)
    def run(x: Tensor, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        device = x.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(x, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(x, *args, **kwargs)

    return run
