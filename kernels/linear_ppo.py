"""The clipped PPO policy loss straight from hidden states and the LM head, its gradient formed in the forward.

    logprob_i, entropy_i as in `linear_logprobs.py`          loss = sum_i w_i term_i as in `ppo_loss.py`

`c_i = dL/dlogprob_i` (and dL/dentropy_i under an entropy bonus) come from autograd over a chunk's per-token
vectors; dL/dX and dL/dW follow while the chunk's logits are there. Three matrix products instead of the four
of a recomputing backward, and only kept rows are touched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .head_gradient import RowGradient, attach, make_grads, sweep
from .kl import KLKind
from .linear_logprobs import linear_logprobs_ref
from .lm_head import RowGradients, kept_rows, make_head
from .ppo_loss import (
    PolicyInputs,
    PolicyOptions,
    PolicyStats,
    policy_inputs,
    policy_loss_ref,
    policy_statistics,
    policy_terms,
)
from .reductions import Reduction, token_weights


class LinearPPOLoss(NamedTuple):
    """`loss` is differentiable; `logprobs` and `entropy` [N] carry no gradient and are 0 in masked rows."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    stats: PolicyStats


def linear_ppo_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    **options: Any,
) -> LinearPPOLoss:
    """`linear_ppo_loss` in float64 with all logits in memory, through autograd."""
    kept = labels != -100 if mask is None else mask.bool() & (labels != -100)
    logprobs, entropy = linear_logprobs_ref(
        hidden, weight, labels, bias=bias, temperature=temperature, softcap=softcap, mask=kept
    )
    loss, stats = policy_loss_ref(logprobs, old_logprobs, advantages, kept, entropy=entropy, **options)
    return LinearPPOLoss(loss, logprobs.detach(), entropy.detach(), stats)


def row_gradient(inputs: PolicyInputs, weights: Tensor, options: PolicyOptions) -> RowGradient:
    """dL/dlogprob and, under an entropy bonus, dL/dentropy of a chunk, by autograd over its rows."""

    def gradient(rows: slice | Tensor, logprobs: Tensor, entropy: Tensor) -> RowGradients:
        bonus = options.entropy_coef != 0.0
        leaves = [logprobs.detach().requires_grad_(), entropy.detach().requires_grad_(bonus)]
        with torch.enable_grad():
            terms, _ = policy_terms(leaves[0], leaves[1], inputs.rows(rows), options)
            grads = torch.autograd.grad(terms, leaves if bonus else leaves[:1], weights[rows])
        return RowGradients(grads[0], grads[1] if bonus else None)

    return gradient


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
    importance_weights: Tensor | None = None,
    entropy_coef: float = 0.0,
    entropy_bound: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: KLKind = "k3",
    log_ratio_clamp: float | None = None,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    whiten: tuple[Tensor, Tensor] | None = None,
    weight_grad: Tensor | None = None,
) -> LinearPPOLoss:
    """`policy_loss` of `linear_logprobs`, without logits in memory and without a recomputing backward.

    The log-probs equal those of `linear_logprobs` on the same rows bit for bit.

    Args:
        hidden: [N, H], the hidden states that predict the labels.
        weight: [V, H], the LM head.
        labels: [N] int64; rows labelled -100 are left out as if masked.
        old_logprobs, advantages: [N].
        mask: [N], True = keep; other rows may hold anything.
        bias, temperature, softcap: as in `linear_logprobs`.
        weight_grad: a buffer [V, H], fp32, to which this call adds the weight's gradient *in the forward*,
            once; the weight's `.grad` then gets nothing from it. The loss must then be used with an upstream
            gradient of 1 (fold factors into `normalizer`); anything else raises in the backward. Under
            `torch.no_grad()` it is left alone.
        others: as in `policy_loss`; entropy is the one computed here.

    Returns:
        LinearPPOLoss(loss, logprobs [N], entropy [N], PolicyStats); gradients flow through `loss` alone.

    Raises:
        ValueError: shapes that do not fit; on a CPU a label outside [0, V) other than -100; kl_coef without
            ref_logprobs.
    """
    options = PolicyOptions(
        clip_eps, clip_eps_high, dual_clip, entropy_coef, entropy_bound, kl_coef, kl_kind, log_ratio_clamp
    )
    if kl_coef != 0.0 and ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs")
    head = make_head(hidden, weight, bias, temperature, softcap)
    kept = kept_rows(labels, mask, hidden.shape[0], weight.shape[0])
    with torch.no_grad():
        inputs = policy_inputs(
            old_logprobs,
            advantages,
            kept,
            head.dtype,
            importance_weights=importance_weights,
            ref_logprobs=ref_logprobs,
            whiten=whiten,
        )
        weights = token_weights(
            kept, inputs.advantages, reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens
        )
    grads = make_grads(hidden, head, weight_grad)
    with torch.no_grad():
        result = sweep(
            hidden,
            labels,
            head,
            kept,
            row_gradient(inputs, weights, options),
            grads,
            uses_entropy=entropy_coef != 0.0,
        )
        logprobs, entropy = result.logprobs, result.entropy
        terms, ratio = policy_terms(logprobs, entropy, inputs, options)
        stats = policy_statistics(logprobs, entropy, ratio, kept, inputs, options)
        loss = (terms * weights).sum()
    loss = attach(hidden, head, loss, result, grads.wanted and weight_grad is not None)
    return LinearPPOLoss(loss, logprobs, entropy, stats)
