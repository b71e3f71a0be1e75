"""What training large bfloat16 models takes of AdamW: masters in 2 more bytes a weight, moments in 2, and optimizer
state that waits in host memory while another model is updated. The arithmetic stands in `kernels/adamw.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..kernels.adamw import Hyper, adamw_, new_state
from .config import OptimConfig
from .errors import InputError


def decays(parameter: Tensor) -> bool:
    """Weight decay acts on matrices; norms and biases are left alone."""
    return parameter.ndim >= 2


class MasterAdamW:
    """AdamW over float32 or bfloat16 weights; a bfloat16 one keeps the low bits of a float32 master.

    With 8-bit moments those of norms and biases, which are few, stay float32.

    Raises:
        InputError: weights in another dtype.
    """

    def __init__(self, parameters: Sequence[Tensor], config: OptimConfig) -> None:
        self.parameters, self.config = parameters, config
        self.state: dict[Tensor, dict[str, Any]] = {}
        """Of each parameter that had a gradient: that of `kernels.adamw.new_state`, and the number of its steps"""
        for dtype in {p.dtype for p in parameters} - {torch.float32, torch.bfloat16}:
            raise InputError(
                f"OptimConfig.moments = {config.moments!r}: expected float32 or bfloat16 weights beside it, got {dtype}"
            )

    def step(self, lr: float, grad_scale: Tensor | None) -> None:
        """Update each parameter that has a gradient; `grad_scale` (0-dim float32) multiplies the gradients."""
        config = self.config
        for p in self.parameters:
            if p.grad is None:
                continue
            if p not in self.state:
                eight_bit = config.moments == "8bit" and p.ndim >= 2
                self.state[p] = {"step": 0, **new_state(p, eight_bit=eight_bit)}
            state = self.state[p]
            state["step"] += 1
            hyper = Hyper(state["step"], lr, *config.betas, config.eps, config.weight_decay if decays(p) else 0.0)
            adamw_(p, p.grad, state, hyper, grad_scale=grad_scale)


class Offload:
    """Optimizer state that is on the GPU only for an update, and in pinned host memory else.

    Copies run beside the computation, on one stream that all optimizers of a device share: so what one sends out
    has left before the next one's state takes the same memory.
    """

    def __init__(self, adamw: MasterAdamW | torch.optim.AdamW, device: torch.device) -> None:
        self.adamw, self.device, self.stream = adamw, device, _copy_stream(device)
        self.host: dict[tuple[Tensor, str], Tensor] = {}

    def bring_in(self) -> None:
        """Begin to copy what is outside to the device."""
        with torch.cuda.stream(self.stream):
            for key, state, name, x in self._tensors():
                if x is self.host.get(key):
                    state[name] = torch.empty_like(x, device=self.device).copy_(x, non_blocking=True)

    def wait(self) -> None:
        """Let the computation that follows wait for `bring_in`; the host does not wait."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def send_out(self) -> None:
        """Begin to copy what is on the device to the host, once what computes with it is done."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for key, state, name, x in self._tensors():
                if key not in self.host:
                    self.host[key] = _pinned_like(x)
                if x is not self.host[key]:
                    state[name] = self.host[key].copy_(x, non_blocking=True)
                    x.record_stream(self.stream)

    def synchronize(self) -> None:
        """Wait until what was sent out is there to be read."""
        self.stream.synchronize()

    def _tensors(self) -> Iterator[tuple[tuple[Tensor, str], dict[str, Any], str, Tensor]]:
        for parameter, state in self.adamw.state.items():
            for name, x in list(state.items()):
                if isinstance(x, Tensor):
                    yield (parameter, name), state, name, x


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _pinned_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu", pin_memory=True)
