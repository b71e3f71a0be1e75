"""The optimizer's step."""

from __future__ import annotations

from typing import Any

import torch
from ops import Inputs, Op, Results, against
from ppomax.kernels.adamw import Hyper, adamw_, adamw_ref, new_state
from torch import Tensor

HYPER = Hyper(step=1, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)


def adamw(n: int, device: str, *, eight_bit: bool) -> list[Op]:
    """The first step of n bfloat16 weights that keep a float32 master; changes weights and state in place."""

    def inputs() -> Inputs:
        weight, grad = torch.randn(2, n, device=device).mul_(0.02).bfloat16()
        return {"weight": weight, "grad": grad, **new_state(weight, eight_bit=eight_bit)}

    def ours(weight: Tensor, grad: Tensor, **state: Tensor) -> Results:
        adamw_(weight, grad, state, HYPER)
        return (weight,)

    def exact(weight: Tensor, grad: Tensor, **state: Any) -> Results:
        zeros = torch.zeros_like(weight)
        return adamw_ref(weight, grad, zeros, zeros, HYPER)[:1]

    moments = 4 if eight_bit else 16  # bytes, read and written
    name = f"adamw_ with {'8-bit' if eight_bit else 'float32'} moments"
    return [Op(name, f"{n} weights", inputs, {"ppomax": ours}, against(exact), 5e-3, (10.0 + moments) * n)]
