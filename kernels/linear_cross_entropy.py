"""Cross-entropy from hidden states and the LM head, its gradient formed in the forward.

    loss = sum_i w_i (-logprob_i) / normalizer

with logprob_i as in `linear_logprobs.py`, passes and memory as in `lm_head.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import uses_triton
from .head_gradient import HeadLoss, attach, fake_loss, sweep, wanted_gradients
from .head_pass import HeadGrads, RowGradients
from .linear_logprobs import linear_logprobs_ref
from .lm_head import check_head, make_head, row_mask, seen_rows
from .reductions import keep, loss_dtype


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


@torch.library.custom_op("ppomax::linear_cross_entropy", mutates_args=("weight_grad",))
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor,
    softcap: float | None,
    c: Tensor,
    weight_grad: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`HeadLoss` of sum_i c_i logprob_i; adds dW to `weight_grad`."""
    head = make_head(hidden, weight, bias, 1.0, None, softcap)
    if uses_triton(hidden, weight, bias):
        from .gpu import linear

        return linear.given(hidden, labels, kept, head, c, wants, weight_grad)

    def gradient(rows: slice | Tensor, logprobs: Tensor, entropy: Tensor) -> RowGradients:
        return RowGradients(c[rows], None)

    grads = HeadGrads(head, wants, weight_grad)
    seen = seen_rows(kept, labels, weight.shape[0])
    return (*sweep(hidden, labels, head, seen, gradient, grads, uses_entropy=False),)


@_linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    return fake_loss(hidden, weight, bias, loss_dtype(hidden, weight), others[-1])


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
        ValueError: shapes that do not fit; on a CPU a label outside [0, V) other than -100 (elsewhere its row
            is NaN).
    """
    check_head(hidden, weight, bias)
    wants, buffer = wanted_gradients(hidden, weight, bias, weight_grad)
    with torch.no_grad():
        weights, mask = _weights(labels, row_weights, normalizer, loss_dtype(hidden, weight))
        kept = row_mask(labels, mask, hidden.shape[0])
        head = (hidden, weight, bias, labels.contiguous(), kept, softcap)
        result = HeadLoss(*_linear_cross_entropy(*head, -weights, buffer, wants))
        loss = -(result.logprobs * weights).sum()
    loss = attach(hidden, weight, bias, loss, result, wants, buffer is not None)
    return LinearCrossEntropy(loss, result.logprobs, result.entropy)
