"""Log-probs and entropies of labels from hidden states and the LM head; logits never reach memory whole.

    z = softcap * tanh((x W^T + b) / softcap) / T          lse_i = log sum_v exp(z_iv)
    logprob_i = z_iy - lse_i                               entropy_i = lse_i - sum_v p_iv z_iv

The backward takes any upstream gradient: it recomputes the logits. See `lm_head.py` for how much memory that
takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import dense, temperature_pair, uses_triton
from .head_gradient import fake_gradients, formed_gradients
from .head_pass import HeadGrads, HeadPass, RowGradients, RowStatistics
from .lm_head import Head, check_head, make_head, row_chunks, row_mask, rows_of, seen_rows
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
def head_forward(hidden: Tensor, labels: Tensor, head: Head, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [N], entropy [N], top, log_sum and shares [2 + tiles, N]), 0 in rows that do not count."""
    n_rows, n_tiles = labels.numel(), len(head.tiles)
    logprobs, entropy, saved = (hidden.new_zeros(*k, n_rows, dtype=head.dtype) for k in ((), (), (2 + n_tiles,)))
    head_pass = HeadPass(head)
    for rows, kept_chunk in row_chunks(labels, kept, head, "nothing"):
        x = rows_of(hidden, rows, kept_chunk, head.dtype)
        stats = head_pass.statistics(x, rows_of(labels, rows, kept_chunk, torch.int64))
        values = torch.cat([torch.stack(stats[:4]), stats.shares])
        values = values if kept_chunk is None else torch.where(kept_chunk, values, 0.0)
        logprobs[rows], entropy[rows], saved[:, rows] = values[0], values[1], values[2:]
    return logprobs, entropy, saved


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


@torch.library.custom_op("ppomax::linear_logprobs_forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor,
    temperature: float,
    temperature_tensor: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [N], entropy [N], what else of the rows the backward needs [.., N])."""
    head = make_head(hidden, weight, bias, temperature, temperature_tensor, softcap)
    if uses_triton(hidden, weight, bias):
        from .gpu import linear

        return linear.forward(hidden, labels, kept, head)
    return head_forward(hidden, labels, head, seen_rows(kept, labels, weight.shape[0]))


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor,
    temperature: float,
    temperature_tensor: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    head = make_head(hidden, weight, bias, temperature, temperature_tensor, softcap)
    saved = 2 if uses_triton(hidden, weight, bias) else 2 + len(head.tiles)
    rows = [hidden.new_empty(*k, hidden.shape[0], dtype=head.dtype) for k in ((), (), (saved,))]
    return rows[0], rows[1], rows[2]


@torch.library.custom_op("ppomax::linear_logprobs_backward", mutates_args=())
def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor,
    temperature: float,
    temperature_tensor: Tensor | None,
    softcap: float | None,
    logprobs: Tensor,
    entropy: Tensor,
    saved: Tensor,
    c: Tensor | None,
    h: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db); those that `wants` does not ask for are empty."""
    head = make_head(hidden, weight, bias, temperature, temperature_tensor, softcap)
    if uses_triton(hidden, weight, bias):
        from .gpu import linear

        return linear.backward(hidden, labels, kept, head, entropy, saved, c, h, wants)
    stats = RowStatistics(logprobs, entropy, saved[0], saved[1], saved[2:])
    upstream = RowGradients(torch.zeros_like(entropy) if c is None else c, h)
    grads = HeadGrads(head, wants)
    dx = head_backward(hidden, labels, head, seen_rows(kept, labels, weight.shape[0]), stats, upstream, grads)
    return formed_gradients(hidden, head, dx, grads.finish(), grads.bias)


@_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias, others[-1])


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        kept: Tensor,
        temperature: float,
        temperature_tensor: Tensor | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, saved = _forward(
            hidden, weight, bias, labels, kept, temperature, temperature_tensor, softcap
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, labels, kept, temperature_tensor, logprobs, entropy, saved)
        ctx.temperature, ctx.softcap = temperature, softcap
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        wants = list(ctx.needs_input_grad[:3])
        if (c is None and h is None) or not any(wants):
            return (None,) * 8
        hidden, weight, bias, labels, kept, temperature_tensor, *rows = ctx.saved_tensors
        head = (hidden, weight, bias, labels, kept, ctx.temperature, temperature_tensor, ctx.softcap)
        grads = _backward(*head, *rows, dense(c), dense(h), wants)
        return *(g if wanted else None for g, wanted in zip(grads, wants, strict=True)), None, None, None, None, None


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
    an input is) whatever the dtype of the inputs; fp32 products on a GPU follow torch's setting for them, which
    is full precision unless changed.

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
        ValueError: shapes that do not fit; on a CPU a label outside [0, V) other than -100 (elsewhere its row
            is NaN).
    """
    check_head(hidden, weight, bias)
    kept = row_mask(labels, mask, hidden.shape[0])
    t, t_tensor = temperature_pair(temperature, hidden)
    return LogProbs(*_LinearLogProbs.apply(hidden, weight, bias, labels.contiguous(), kept, t, t_tensor, softcap))
