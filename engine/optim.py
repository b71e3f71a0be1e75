"""One optimizer step: schedule, gradient norm, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import OptimConfig, ScheduleConfig


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
    """AdamW for one model, its schedule and its own global gradient-norm clipping."""

    def __init__(self, model: nn.Module, config: OptimConfig, total_steps: int, grad_clip: float | None) -> None:
        self.config, self.total_steps, self.grad_clip = config, total_steps, grad_clip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(
            _decay_groups(self.parameters, config.weight_decay),
            lr=config.lr, betas=config.betas, eps=config.eps, fused=True,
        )  # fmt: skip
        self.steps = 0
        self.skipped = 0

    def step(self) -> dict[str, Tensor | float]:
        """Clip, step, clear the gradients. A step whose gradient norm is not finite is skipped and counted.

        Returns:
            grad_norm: before clipping; lr: as used; skipped_steps: so far.
        """
        lr = self.config.lr * lr_factor(self.config.schedule, self.steps, self.total_steps)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm):
            if self.grad_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        else:
            self.skipped += 1
        self.adamw.zero_grad(set_to_none=True)
        self.steps += 1
        return {"grad_norm": norm, "lr": lr, "skipped_steps": float(self.skipped)}

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        self.steps, self.skipped = state["steps"], state["skipped"]


def _decay_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay acts on matrices; norms and biases are left alone."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
