"""Log-probs and entropies of labels from hidden states and the LM head; logits never reach memory whole.

    z = softcap * tanh((x W^T + b) / softcap) / T        logprob_i = z_iy - lse_i        entropy_i = lse_i - sum_v p_iv z_iv

The backward takes any upstream gradient: it recomputes the logits tile by tile of the vocabulary, so that each tile of
the weight's gradient is written once. See `lm_head.py` for the passes and for how much memory a chunk takes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lm_head import (
    Head,
    HeadChunk,
    HeadGrads,
    RowStatistics,
    chunk_rows,
    finish_gradient,
    kept_rows,
    logits_gradient,
    make_head,
    row_chunks,
    rows_of,
    tile_logits,
)

BACKWARD_ROWS = 2048  # rows times columns of recomputed logits held at once on a CPU
BACKWARD_COLUMNS = 1024


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


def head_forward(
    hidden: Tensor, labels: Tensor, head: Head, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, lse), each [N]; 0 in rows that do not count."""
    n_rows, vocab = labels.numel(), head.weight.shape[0]
    out = hidden.new_zeros(3, n_rows, dtype=head.dtype)
    chunk = HeadChunk(head, chunk_rows(n_rows, vocab, hidden.device))
    for rows, kept_chunk in row_chunks(labels, kept, vocab):
        x = rows_of(hidden, rows, kept_chunk, head.dtype)
        stats = chunk.statistics(x, rows_of(labels, rows, kept_chunk, labels.dtype))
        values = torch.stack(stats)
        out[:, rows] = values if kept_chunk is None else torch.where(kept_chunk, values, 0.0)
    return out[0], out[1], out[2]


def head_backward(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    kept: Tensor | None,
    stats: RowStatistics,
    c: Tensor,
    h: Tensor | None,
    grads: HeadGrads,
) -> Tensor | None:
    """Recomputes the logits; adds to `grads` and returns dL/dhidden [N, H] where that is wanted."""
    dx = hidden.new_zeros(hidden.shape, dtype=head.dtype) if grads.hidden else None
    index = None if kept is None else kept.nonzero().squeeze(1)
    n_rows = labels.numel() if index is None else index.numel()
    for start in range(0, n_rows, BACKWARD_ROWS):
        rows: slice | Tensor = slice(start, start + BACKWARD_ROWS)
        rows = rows if index is None else index[rows]
        part = RowStatistics(*(s[rows] for s in stats))
        x = hidden[rows].to(head.dtype)
        dx_rows = torch.zeros_like(x) if dx is not None else None
        _backward_rows(x, labels[rows], head, part, c[rows], None if h is None else h[rows], grads, dx_rows)
        if dx is not None and dx_rows is not None:
            dx[rows] = dx_rows
    return dx


def _backward_rows(
    x: Tensor,
    labels: Tensor,
    head: Head,
    stats: RowStatistics,
    c: Tensor,
    h: Tensor | None,
    grads: HeadGrads,
    dx: Tensor | None,
) -> None:
    chunk = HeadChunk(head, x.shape[0], columns=min(BACKWARD_COLUMNS, head.weight.shape[0]))
    for start, stop in chunk.tiles:
        logp = tile_logits(x, head, start, stop, chunk.tile(x.shape[0], start, stop)).sub_(stats.lse[:, None])
        if head.bias is not None:
            logp.clamp_(min=-1e5)
        g = logits_gradient(logp, stats, c, h, chunk.scratch_like(logp))
        finish_gradient(g, logp, labels, stats, c, head, (start, stop))
        grads.add(g, x, head, (start, stop), dx)
    grads.started = True


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
        logprobs, entropy, lse = head_forward(hidden, labels, head, kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, labels, kept, logprobs, entropy, lse)
        ctx.temperature, ctx.softcap, ctx.dtype = head.temperature, head.softcap, head.dtype
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, c: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if c is None and h is None:
            return (None,) * 6
        hidden, weight, bias, labels, kept, *stats = ctx.saved_tensors
        head = Head(weight, bias, ctx.temperature, ctx.softcap, ctx.dtype)
        want = ctx.needs_input_grad
        grads = HeadGrads(head, hidden=want[0], weight=want[1], bias=want[2])
        c = torch.zeros_like(stats[0]) if c is None else c
        dx = head_backward(hidden, labels, head, kept, RowStatistics(*stats), c, h, grads)
        dw = grads.finish()
        dx = None if dx is None else dx.to(hidden.dtype)
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

    Both outputs are differentiable in `hidden`, `weight` and `bias`. Logits are computed in fp32 (fp64 where an input is)
    whatever the dtype of the inputs.

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
