"""Log-probs and entropies of labels from hidden states and the LM head; logits never reach memory whole.

    z = softcap * tanh((x W^T + b) / softcap) / T          lse_i = log sum_v exp(z_iv)
    logprob_i = z_iy - lse_i                               entropy_i = lse_i - sum_v p_iv z_iv

The backward takes any upstream gradient: it recomputes the logits. See `lm_head.py` for the passes and for how
much memory they take.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lm_head import (
    Head,
    HeadGrads,
    HeadPass,
    RowGradients,
    RowStatistics,
    kept_rows,
    make_head,
    row_chunks,
    rows_of,
)
from .matmul import full_precision


class LogProbs(NamedTuple):
    """`logprobs` and `entropy` in the shape of the labels, fp32 (fp64 where an input is)."""

    logprobs: Tensor
    entropy: Tensor


def linear_logprobs_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> LogProbs:
    """`linear_logprobs` in float64 with all logits in memory, through autograd."""
    kept = labels != -100 if mask is None else mask.bool() & (labels != -100)
    z = torch.where(kept[:, None], hidden.double(), 0.0) @ weight.double().t()
    z = z if bias is None else z + bias.double()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature, -1)
    chosen = logp.gather(1, torch.where(kept, labels, 0)[:, None]).squeeze(1)
    entropy = -(logp.exp() * logp.clamp(min=-1e300)).sum(-1)
    return LogProbs(torch.where(kept, chosen, 0.0), torch.where(kept, entropy, 0.0))


@full_precision
def head_forward(hidden: Tensor, labels: Tensor, head: Head, kept: Tensor | None) -> RowStatistics:
    """Statistics of all rows, 0 in rows that do not count."""
    n_rows, n_tiles = labels.numel(), len(head.tiles)
    out = hidden.new_zeros(4 + n_tiles, n_rows, dtype=head.dtype)
    head_pass = HeadPass(head)
    for rows, kept_chunk in row_chunks(labels, kept, head, "nothing"):
        x = rows_of(hidden, rows, kept_chunk, head.dtype)
        stats = head_pass.statistics(x, rows_of(labels, rows, kept_chunk, torch.int64))
        values = torch.cat([torch.stack(stats[:4]), stats.shares])
        out[:, rows] = values if kept_chunk is None else torch.where(kept_chunk, values, 0.0)
    return RowStatistics(out[0], out[1], out[2], out[3], out[4:])


@full_precision
def head_backward(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    kept: Tensor | None,
    stats: RowStatistics,
    upstream: RowGradients,
    grads: HeadGrads,
) -> Tensor | None:
    """Recomputes the logits; adds to `grads` and returns dL/dhidden [N, H] where that is wanted."""
    dx = torch.zeros_like(hidden) if grads.hidden else None
    head_pass = HeadPass(head)
    for rows, kept_chunk in row_chunks(labels, kept, head, "nothing"):
        x = rows_of(hidden, rows, kept_chunk, head.dtype)
        c, h = (None if g is None else rows_of(g, rows, kept_chunk, head.dtype) for g in upstream)
        assert c is not None
        y = rows_of(labels, rows, kept_chunk, torch.int64)
        dx_rows = head_pass.backward(x, y, stats.rows(rows), RowGradients(c, h), grads)
        if dx is not None and dx_rows is not None:
            dx[rows] = dx_rows.to(dx.dtype)
    return dx


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        head: Head,
        kept: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        stats = head_forward(hidden, labels, head, kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, labels, kept, *stats)
        ctx.temperature, ctx.softcap, ctx.dtype = head.temperature, head.softcap, head.dtype
        return stats.logprobs, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if c is None and h is None:
            return (None,) * 6
        hidden, weight, bias, labels, kept, *stats = ctx.saved_tensors
        head = Head(weight, bias, ctx.temperature, ctx.softcap, ctx.dtype)
        want = ctx.needs_input_grad
        grads = HeadGrads(head, hidden=want[0], weight=want[1], bias=want[2])
        c = torch.zeros_like(stats[0]) if c is None else c
        dx = head_backward(hidden, labels, head, kept, RowStatistics(*stats), RowGradients(c, h), grads)
        dw = grads.finish()
        dw = None if dw is None else dw.to(weight.dtype)
        db = None if grads.bias is None else grads.bias.to(bias.dtype)
        return dx, dw, db, None, None, None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> LogProbs:
    """Log-prob of each label and entropy of its distribution, from hidden states and the LM head.

    Both outputs are differentiable in `hidden`, `weight` and `bias`. Logits are computed in fp32 (fp64 where
    an input is) whatever the dtype of the inputs.

    Args:
        hidden: [N, H], the hidden states that predict the labels.
        weight: [V, H], the LM head.
        labels: [N] int64; rows labelled -100 are left out as if masked.
        bias: [V].
        temperature: divides the logits, a float or a 0-dim tensor (no gradient flows to it).
        softcap: z -> softcap * tanh(z / softcap) before the temperature.
        mask: [N], True = keep. Other rows give 0, take no gradient, and may hold anything.

    Returns:
        LogProbs(logprobs [N], entropy [N]).

    Raises:
        ValueError: shapes that do not fit; on a CPU a label outside [0, V) other than -100.
    """
    head = make_head(hidden, weight, bias, temperature, softcap)
    kept = kept_rows(labels, mask, hidden.shape[0], weight.shape[0])
    return LogProbs(*_LinearLogProbs.apply(hidden, weight, bias, labels, head, kept))
