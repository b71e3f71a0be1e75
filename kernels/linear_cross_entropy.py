"""Cross-entropy from hidden states and the LM head, its gradient formed in the forward.

    loss = sum_i w_i (-logprob_i) / normalizer

with logprob_i as in `linear_logprobs.py`, passes and memory as in `lm_head.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .head_gradient import attach, make_grads, sweep
from .linear_logprobs import linear_logprobs_ref
from .lm_head import RowGradients, kept_rows, make_head
from .reductions import keep


class LinearCrossEntropy(NamedTuple):
    """`loss` is differentiable; `logprobs` and `entropy` [N] carry no gradient and are 0 in rows that do not count."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    normalizer: float | Tensor | None = None,
) -> LinearCrossEntropy:
    """`linear_cross_entropy` in float64 with all logits in memory, through autograd."""
    kept = labels != -100 if row_weights is None else (row_weights != 0) & (labels != -100)
    logprobs, entropy = linear_logprobs_ref(hidden, weight, labels, bias=bias, softcap=softcap, mask=kept)
    nll = -logprobs if row_weights is None else -logprobs * keep(row_weights, kept, torch.float64)
    total = kept.sum().clamp(min=1) if normalizer is None else normalizer
    return LinearCrossEntropy(nll.sum() / total, logprobs.detach(), entropy.detach())


def _weights(
    labels: Tensor, row_weights: Tensor | None, normalizer: float | Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(w_i / normalizer [N], mask of the rows with w_i != 0)."""
    if row_weights is None:
        mask = None
        weights = (labels != -100).to(dtype)
    else:
        if row_weights.shape != labels.shape:
            raise ValueError(f"row_weights have shape {tuple(row_weights.shape)}, labels {tuple(labels.shape)}")
        mask = row_weights != 0
        weights = keep(row_weights.detach(), labels != -100, dtype)
    total = (weights != 0).sum().clamp(min=1) if normalizer is None else normalizer
    return weights / total, mask


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    normalizer: float | Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> LinearCrossEntropy:
    """Weighted cross-entropy of the labels; logits never reach memory whole, nothing is recomputed in the backward.

    Args:
        hidden: [N, H], the hidden states that predict the labels.
        weight: [V, H], the LM head.
        labels: [N] int64; rows labelled -100 are left out.
        row_weights: [N] weight of each row, constants; rows of weight 0 are left out and may hold anything.
            None is 1.
        bias, softcap: as in `linear_logprobs`.
        normalizer: divides the sum; defaults to the number of rows that count.
        weight_grad: as in `linear_ppo_loss`: filled in the forward, needs an upstream gradient of 1.

    Returns:
        LinearCrossEntropy(loss, logprobs [N], entropy [N]), fp32 (fp64 where an input is).

    Raises:
        ValueError: shapes that do not fit; on a CPU a label outside [0, V) other than -100.
    """
    head = make_head(hidden, weight, bias, 1.0, softcap)
    weights, mask = _weights(labels, row_weights, normalizer, head.dtype)
    kept = kept_rows(labels, mask, hidden.shape[0], weight.shape[0])
    grads = make_grads(hidden, head, weight_grad)

    def gradient(rows: slice | Tensor, logprobs: Tensor, entropy: Tensor) -> RowGradients:
        return RowGradients(-weights[rows], None)

    with torch.no_grad():
        result = sweep(hidden, labels, head, kept, gradient, grads, uses_entropy=False)
        loss = -(result.logprobs * weights).sum()
    loss = attach(hidden, head, loss, result, grads.wanted and weight_grad is not None)
    return LinearCrossEntropy(loss, result.logprobs, result.entropy)
