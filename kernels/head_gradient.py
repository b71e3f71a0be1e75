"""A loss over an LM head whose gradient is formed in the forward pass.

The loss needs each row only through (logprob, entropy), so `c_i = dL/dlogprob_i` and `h_i = dL/dentropy_i`
are known as soon as a chunk of rows has passed over the vocabulary, while its logits are still there: dX and
dW follow at once. Nothing is recomputed; the backward multiplies by the upstream gradient, one scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lm_head import Head, HeadGrads, HeadPass, RowGradients, row_chunks, rows_of
from .matmul import full_precision
from .reductions import host_sees

# (rows, their logprobs, their entropy) -> gradients with respect to these
RowGradient = Callable[[slice | Tensor, Tensor, Tensor], RowGradients]


class HeadLoss(NamedTuple):
    """What one sweep over the rows leaves: per-row results and the finished gradients."""

    logprobs: Tensor
    entropy: Tensor
    hidden_grad: Tensor | None
    weight_grad: Tensor | None
    bias_grad: Tensor | None


@full_precision
def sweep(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    kept: Tensor | None,
    gradient: RowGradient,
    grads: HeadGrads,
    *,
    uses_entropy: bool,
) -> HeadLoss:
    """One pass over the rows in chunks, gradients included where `grads` wants any."""
    out = hidden.new_zeros(2, labels.numel(), dtype=head.dtype)
    dx = torch.zeros_like(hidden) if grads.hidden else None
    keeps = "logits" if uses_entropy or head.softcap is not None else "softmax"
    keeps = keeps if grads.wanted else "nothing"
    head_pass = HeadPass(head, keeps)
    for rows, kept_chunk in row_chunks(labels, kept, head, keeps):
        x = rows_of(hidden, rows, kept_chunk, head.dtype)
        y = rows_of(labels, rows, kept_chunk, torch.int64)
        stats = head_pass.statistics(x, y)
        values = torch.stack(stats[:2])
        values = values if kept_chunk is None else torch.where(kept_chunk, values, 0.0)
        out[:, rows] = values
        if grads.wanted:
            dx_rows = head_pass.backward(x, y, stats, gradient(rows, *values), grads)
            if dx is not None and dx_rows is not None:
                dx[rows] = dx_rows.to(dx.dtype)
    return HeadLoss(out[0], out[1], dx, grads.finish(), grads.bias)


class FormedGradient(torch.autograd.Function):
    """Gives a loss the gradients that were formed with it; the backward scales them by the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        dx: Tensor | None,
        dw: Tensor | None,
        db: Tensor | None,
        in_buffer: bool,
    ) -> Tensor:
        ctx.save_for_backward(dx, dw, db)
        ctx.set_materialize_grads(False)
        ctx.in_buffer = in_buffer
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 8
        unit = host_sees(upstream) and float(upstream) == 1.0
        if ctx.in_buffer and not unit:
            _require_unit(upstream)
        grads = [g if g is None or unit else (g * upstream).to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)


def _require_unit(upstream: Tensor) -> None:
    message = "weight_grad was filled in the forward: scale the loss by its normalizer, not after it"
    if host_sees(upstream):
        raise RuntimeError(f"{message} (upstream gradient {float(upstream)})")
    torch._assert_async(upstream == 1.0, message)


def make_grads(hidden: Tensor, head: Head, weight_grad: Tensor | None) -> HeadGrads:
    """Which gradients a loss has to form now, under the current grad mode."""
    enabled = torch.is_grad_enabled()
    return HeadGrads(
        head,
        hidden=enabled and hidden.requires_grad,
        weight=enabled and head.weight.requires_grad,
        bias=enabled and head.bias is not None and head.bias.requires_grad,
        weight_grad=weight_grad if enabled else None,
    )


def attach(hidden: Tensor, head: Head, loss: Tensor, result: HeadLoss, in_buffer: bool) -> Tensor:
    """The loss with its gradients behind it."""
    dx, db = result.hidden_grad, result.bias_grad
    dw = None if in_buffer or result.weight_grad is None else result.weight_grad.to(head.weight.dtype)
    db = None if db is None or head.bias is None else db.to(head.bias.dtype)
    weight = head.weight.detach() if in_buffer else head.weight
    return FormedGradient.apply(hidden, weight, head.bias, loss, dx, dw, db, in_buffer)
