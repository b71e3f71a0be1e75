"""One optimizer step: schedule, gradient norm, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import OptimConfig, ScheduleConfig
from .errors import InputError
from .low_memory import MasterAdamW, Offload, decays
from .shards import as_part, as_whole, check_blocks, local_part, new_whole, over_processes
from .tensors import Stored, read_tensors


def lr_factor(schedule: ScheduleConfig, step: int, total: int) -> float:
    """Factor on the learning rate at optimizer step `step` (from 0) of `total`.

    Warm-up rises linearly to 1, from `floor` where the schedule is inverse-sqrt (as in the released scripts) and
    from 0 otherwise. After it: 1; a cosine that ends at `floor`; or sqrt(warmup / step).
    """
    warmup = schedule.warmup * total if schedule.warmup < 1 else schedule.warmup
    if step < warmup:
        start = schedule.floor if schedule.kind == "inverse-sqrt" else 0.0
        return max(start, (step + 1) / (warmup + 1))
    if schedule.kind == "inverse-sqrt":
        return math.sqrt(max(warmup, 1) / max(step, 1))
    if schedule.kind == "cosine":
        share = (step - warmup) / max(total - warmup, 1)
        return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return 1.0


class Optimizer:
    """AdamW for one model, its schedule and its own global gradient-norm clipping.

    float32 weights with float32 moments are left to `torch.optim.AdamW`; bfloat16 weights, and 8-bit moments, to
    `low_memory.MasterAdamW`, which trains the float32 masters of which the weights are the rounded upper halves.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, total_steps: int, grad_clip: float | None) -> None:
        self.config, self.total_steps, self.grad_clip = config, total_steps, grad_clip
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.parts = [local_part(p) for p in self.parameters]
        """Of sharded parameters what this process has and updates, of others the parameters themselves"""
        if config.moments == "8bit":
            check_blocks(self.parameters)
        self.adamw = _adamw(self.parts, config)
        device = self.parameters[0].device
        self.offload = Offload(self.adamw, device) if config.offload and device.type == "cuda" else None
        self.steps = 0
        self.skipped = 0

    @property
    def form(self) -> str:
        """What the state is made of; a run can only go on in the form that it was saved in."""
        bits = "8-bit" if self.config.moments == "8bit" else "float32"
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in self.parameters})
        return f"{bits} moments of {' and '.join(dtypes)} weights"

    def bring_in(self) -> None:
        """Begin to copy offloaded state to the device: call it before the forward pass, which hides the copy."""
        if self.offload:
            self.offload.bring_in()

    def step(self) -> dict[str, Tensor | float]:
        """Clip, step, clear the gradients. A step whose gradient norm is not finite is skipped and counted.

        Returns:
            grad_norm: before clipping; lr: as used; skipped_steps: so far.
        """
        self.bring_in()
        lr = self.config.lr * lr_factor(self.config.schedule, self.steps, self.total_steps)
        for part, p in zip(self.parts, self.parameters, strict=True):
            part.grad = None if p.grad is None else local_part(p.grad)
        norm = _total_norm([p.grad for p in self.parameters if p.grad is not None])
        if torch.isfinite(norm):
            if self.offload:
                self.offload.wait()
            self._update(lr, norm)
        else:
            self.skipped += 1
        for p in (*self.parameters, *self.parts):
            p.grad = None
        if self.offload:
            self.offload.send_out()
        self.steps += 1
        return {"grad_norm": norm, "lr": lr, "skipped_steps": float(self.skipped)}

    def _update(self, lr: float, norm: Tensor) -> None:
        if isinstance(self.adamw, MasterAdamW):
            # in float32 inside the update: gradients in bfloat16 are rounded once, not twice
            self.adamw.step(lr, None if self.grad_clip is None else (self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
            return
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parts, self.grad_clip, norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        if self.offload:
            self.offload.synchronize()
        entries = [
            {name: as_whole(x, p) if isinstance(x, Tensor) else x for name, x in self.adamw.state.get(part, {}).items()}
            for part, p in zip(self.parts, self.parameters, strict=True)
        ]
        return {"adamw": entries, "form": self.form, "steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, whose tensors it takes over, or reads where they are `Stored`.

        Raises:
            InputError: the state of another form, or of another number of parameters.
        """
        saved = state.get("form", "float32 moments of float32 weights")  # the only one there was at first
        if saved != self.form:
            raise InputError(
                f"optimizer state: saved with {saved}, expected {self.form} (OptimConfig.moments, RuntimeConfig.dtype)"
            )
        if len(state["adamw"]) != len(self.parameters):
            raise InputError(f"optimizer state: of {len(state['adamw'])} parameters, expected {len(self.parameters)}")
        stored: list[tuple[Stored, Tensor]] = []
        self.adamw.state.clear()
        for part, p, entry in zip(self.parts, self.parameters, state["adamw"], strict=True):
            if entry:
                self.adamw.state[part] = {name: _taken_over(x, p, stored) for name, x in entry.items()}
        read_tensors(stored)
        if self.offload:
            self.offload.send_out()
        self.steps, self.skipped = state["steps"], state["skipped"]


def _adamw(parameters: Sequence[Tensor], config: OptimConfig) -> torch.optim.AdamW | MasterAdamW:
    if config.moments == "8bit" or any(p.dtype == torch.bfloat16 for p in parameters):
        return MasterAdamW(parameters, config)
    groups = [
        {"params": [p for p in parameters if decays(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _taken_over(x: Any, parameter: Tensor, stored: list[tuple[Stored, Tensor]]) -> Any:
    """Saved state as the optimizer holds it; what is still to be read joins `stored`."""
    if isinstance(x, Stored):
        target = new_whole(x.shape, x.dtype, parameter)
        stored.append((x, target))
        x = target
    return as_part(x, parameter) if isinstance(x, Tensor) else x


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Of all gradients as one vector, in at least float32: torch's own leaves that of bfloat16 ones in bfloat16."""
    parts = [local_part(g) for g in gradients]
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in parts]
    return over_processes(torch.linalg.vector_norm(torch.stack(norms)), gradients[0]) if norms else torch.zeros(())
