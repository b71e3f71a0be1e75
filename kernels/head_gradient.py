"""A loss over an LM head whose gradient is formed in the forward pass.

The loss needs each row only through (logprob, entropy), so `c_i = dL/dlogprob_i` and `h_i = dL/dentropy_i`
are known as soon as a chunk of rows has passed over the vocabulary, while its logits are still there: dX and
dW follow at once. Nothing is recomputed; the backward multiplies by the upstream gradient, one scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .head_pass import HeadGrads, HeadPass, RowGradients
from .lm_head import Head, check_weight_grad, row_chunks, rows_of
from .matmul import full_precision
from .reductions import host_sees

# (rows, their logprobs, their entropy) -> gradients with respect to these
RowGradient = Callable[[slice | Tensor, Tensor, Tensor], RowGradients]


class HeadLoss(NamedTuple):
    """What an operation returns: per-row results, and the gradients that were wanted, others empty."""

    logprobs: Tensor
    entropy: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor
    bias_grad: Tensor


def wanted_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grad: Tensor | None
) -> tuple[list[bool], Tensor | None]:
    """(which of dX, dW, db a loss has to return, the buffer it has to fill), under the current grad mode."""
    if weight_grad is not None:
        check_weight_grad(weight_grad, weight)
    if not torch.is_grad_enabled():
        return [False] * 3, None
    in_bias = bias is not None and bias.requires_grad
    return [hidden.requires_grad, weight.requires_grad and weight_grad is None, in_bias], weight_grad


def formed_gradients(
    hidden: Tensor, head: Head, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) in the dtypes of what they belong to; empty tensors, which custom ops can return, for None."""
    tensors = ((hidden, dx), (head.weight, dw), (head.bias, db))
    dx, dw, db = (hidden.new_empty(0) if g is None or x is None else g.to(x.dtype) for x, g in tensors)
    return dx, dw, db


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `formed_gradients` gives, without values."""
    tensors = zip((hidden, weight, bias), wants, strict=True)
    dx, dw, db = (torch.empty_like(x) if wanted and x is not None else hidden.new_empty(0) for x, wanted in tensors)
    return dx, dw, db


def fake_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, wants: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What an operation returns, without values."""
    logprobs, entropy = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))
    return logprobs, entropy, *fake_gradients(hidden, weight, bias, wants)


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
    logprobs, entropy = (hidden.new_zeros(labels.numel(), dtype=head.dtype) for _ in range(2))
    dx = torch.zeros_like(hidden) if grads.hidden else None
    keeps = "logits" if uses_entropy or head.softcap is not None else "softmax"
    keeps = keeps if grads.wanted else "nothing"
    head_pass = HeadPass(head, keeps)
    for rows, kept_chunk in row_chunks(labels, kept, head, keeps):
        x = rows_of(hidden, rows, kept_chunk, head.dtype)
        y = rows_of(labels, rows, kept_chunk, torch.int64)
        stats = head_pass.statistics(x, y)
        values = [s if kept_chunk is None else torch.where(kept_chunk, s, 0.0) for s in stats[:2]]
        logprobs[rows], entropy[rows] = values
        if grads.wanted:
            dx_rows = head_pass.backward(x, y, stats, gradient(rows, *values), grads)
            if dx is not None and dx_rows is not None:
                dx[rows] = dx_rows.to(dx.dtype)
    return HeadLoss(logprobs, entropy, *formed_gradients(hidden, head, dx, grads.finish(), grads.bias))


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
        grads = ctx.saved_tensors
        visible = host_sees(upstream) and not torch.compiler.is_compiling()
        if not visible or float(upstream) != 1.0:
            factor = _require_unit(upstream) if ctx.in_buffer else upstream
            grads = [None if g is None else (g * factor).to(g.dtype) for g in grads]
        return (*grads, None, None, None, None, None)


@torch.library.custom_op("ppomax::require_unit", mutates_args=())
def _require_unit(upstream: Tensor) -> Tensor:
    """The upstream gradient, which must be 1 where the weight's gradient is in a buffer already."""
    message = "weight_grad was filled in the forward: scale the loss by its normalizer, not after it"
    if not host_sees(upstream):
        torch._assert_async(upstream == 1.0, message)
    elif float(upstream) != 1.0:
        raise RuntimeError(f"{message} (upstream gradient {float(upstream)})")
    return upstream.clone()


@_require_unit.register_fake
def _(upstream: Tensor) -> Tensor:
    return torch.empty_like(upstream)


def attach(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: Tensor,
    result: HeadLoss,
    wants: Sequence[bool],
    in_buffer: bool,
) -> Tensor:
    """The loss with its gradients behind it."""
    grads = (g if wanted else None for g, wanted in zip(result[2:], wants, strict=True))
    return FormedGradient.apply(hidden, weight.detach() if in_buffer else weight, bias, loss, *grads, in_buffer)
