"""The clipped PPO policy loss straight from hidden states and the LM head, its gradient formed in the forward.

    logprob_i, entropy_i as in `linear_logprobs.py`          loss = sum_i w_i term_i as in `ppo_loss.py`

`c_i = dL/dlogprob_i` (and dL/dentropy_i under an entropy bonus) come from autograd over a chunk's per-token
vectors, on a GPU from the row kernel that has the row (`gpu/linear_rows.py`); dL/dX and dL/dW follow while the
chunk's logits are there. Three matrix products instead of the four of a recomputing backward. On a CPU only
kept rows are touched; elsewhere rows that do not count cost their share of the products: leave them out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .dispatch import temperature_pair, uses_triton
from .head_gradient import HeadLoss, RowGradient, attach, fake_loss, sweep, wanted_gradients
from .head_pass import HeadGrads, RowGradients
from .kl import KLKind
from .linear_logprobs import linear_logprobs_ref
from .lm_head import check_head, make_head, row_mask, seen_rows
from .ppo_loss import policy_loss_ref
from .ppo_stats import PolicyStats, policy_statistics
from .ppo_terms import PolicyInputs, PolicyOptions, policy_inputs, policy_terms
from .reductions import Reduction, loss_dtype, token_weights


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
    # a custom op's body runs with autograd's dispatch excluded: let it in again, for these few vectors
    autograd_in_op = torch._C._SetExcludeDispatchKeyGuard

    def gradient(rows: slice | Tensor, logprobs: Tensor, entropy: Tensor) -> RowGradients:
        bonus = options.entropy_coef != 0.0
        with torch.enable_grad(), autograd_in_op(torch._C.DispatchKey.AutogradFunctionality, False):
            leaves = [logprobs.detach().requires_grad_(), entropy.detach().requires_grad_(bonus)]
            terms, _ = policy_terms(leaves[0], leaves[1], inputs.rows(rows), options)
            grads = torch.autograd.grad(terms, leaves if bonus else leaves[:1], weights[rows])
        return RowGradients(grads[0], grads[1] if bonus else None)

    return gradient


class _Rows(NamedTuple):
    """Per-row arguments of the operation, [N]."""

    labels: Tensor
    kept: Tensor
    weights: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    importance_weights: Tensor | None
    ref_logprobs: Tensor | None


def _numbers(options: PolicyOptions) -> list[float]:
    """`PolicyOptions` without the estimator's name; what is off is inf."""
    high = options.clip_eps if options.clip_eps_high is None else options.clip_eps_high
    bound, clamp = (math.inf if x is None else x for x in (options.entropy_bound, options.log_ratio_clamp))
    return [options.clip_eps, high, options.dual, options.entropy_coef, bound, options.kl_coef, clamp]


@torch.library.custom_op("ppomax::linear_ppo", mutates_args=("weight_grad",))
def _linear_ppo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    softcap: float | None,
    rows: Sequence[Tensor | None],
    numbers: Sequence[float],
    kl_kind: str,
    weight_grad: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`HeadLoss` of sum_i weights_i term_i; adds dW to `weight_grad`. `rows` are `_Rows`, `numbers` are `_numbers`."""
    head = make_head(hidden, weight, bias, temperature, temperature_tensor, softcap)
    labels, kept, weights, *fields = _Rows(*cast(Any, rows))
    inputs = PolicyInputs(*cast(Any, fields))
    options = PolicyOptions(*cast(Any, (*numbers[:-1], kl_kind, numbers[-1])))
    if uses_triton(hidden, weight, bias):
        from .gpu import linear

        return linear.policy(hidden, labels, kept, head, inputs, weights, options, wants, weight_grad)
    grads = HeadGrads(head, wants, weight_grad)
    gradient = row_gradient(inputs, weights, options)
    seen = seen_rows(kept, labels, weight.shape[0])
    return (*sweep(hidden, labels, head, seen, gradient, grads, uses_entropy=options.entropy_coef != 0.0),)


@_linear_ppo.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    return fake_loss(hidden, weight, bias, loss_dtype(hidden, weight), others[-1])


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

    The log-probs equal those of `linear_logprobs` on the same rows bit for bit; on a GPU, the same batch of rows, and
    `linear_logprobs` in its chunked form.

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
        ValueError: shapes that do not fit; on a CPU a label outside [0, V) other than -100 (elsewhere its row
            is NaN); kl_coef without ref_logprobs.
    """
    options = PolicyOptions(
        clip_eps, clip_eps_high, dual_clip, entropy_coef, entropy_bound, kl_coef, kl_kind, log_ratio_clamp
    )
    if kl_coef != 0.0 and ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs")
    check_head(hidden, weight, bias)
    kept = row_mask(labels, mask, hidden.shape[0])
    wants, buffer = wanted_gradients(hidden, weight, bias, weight_grad)
    with torch.no_grad():
        inputs = policy_inputs(
            old_logprobs,
            advantages,
            kept,
            loss_dtype(hidden, weight),
            importance_weights=importance_weights,
            ref_logprobs=ref_logprobs,
            whiten=whiten,
        )
        weights = token_weights(
            kept, inputs.advantages, reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens
        )
        head = (hidden, weight, bias, *temperature_pair(temperature, hidden), softcap)
        rows = _Rows(labels.contiguous(), kept, weights, *inputs)
        result = HeadLoss(*_linear_ppo(*head, rows, _numbers(options), kl_kind, buffer, wants))
        logprobs, entropy = result.logprobs, result.entropy
        terms, ratio = policy_terms(logprobs, entropy, inputs, options)
        stats = policy_statistics(logprobs, entropy, ratio, kept, inputs, options)
        loss = (terms * weights).sum()
    loss = attach(hidden, weight, bias, loss, result, wants, buffer is not None)
    return LinearPPOLoss(loss, logprobs, entropy, stats)
