"""Estimators of a KL divergence from the log-probs of sampled tokens.

With `d = logprobs - ref_logprobs` on tokens drawn from the distribution of `logprobs`:

    k1   d                   unbiased, of either sign
    abs  |d|
    k2   d^2 / 2             biased, its gradient is an unbiased estimate of the KL's gradient
    k3   exp(-d) - 1 + d     unbiased and never negative

`k1+` and `k3+` are straight-through: the value of k1 and k3 with the gradient of k2. On a GPU they run in Triton
(`gpu/kl.py`), elsewhere in torch, whose autograd gives the gradients.
Source: J. Schulman, "Approximating KL Divergence" (2020); k1 is the penalty of arXiv 2307.04964, equation 10.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import dense, uses_triton
from .reductions import loss_dtype

KLKind = Literal["k1", "abs", "k2", "k3", "k1+", "k3+"]


def kl_terms(d: Tensor, kind: KLKind) -> Tensor:
    """The estimator `kind` of the module's docstring as a function of `d = logprobs - ref_logprobs`."""
    if kind == "k1":
        return d
    if kind == "abs":
        return d.abs()
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        return torch.expm1(-d) + d
    check_kind(kind)
    value, gradient = kl_terms(d, "k1" if kind == "k1+" else "k3"), kl_terms(d, "k2")
    return value.detach() + (gradient - gradient.detach())


def check_kind(kind: str) -> None:
    if kind not in get_args(KLKind):
        raise ValueError(f"unknown KL estimator {kind!r}, expected one of {', '.join(get_args(KLKind))}")


def kl_penalty_ref(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kind: KLKind = "k1",
    *,
    log_ratio_clamp: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """`kl_penalty` in float64."""
    return kl_penalty(logprobs.double(), ref_logprobs.double(), kind, log_ratio_clamp=log_ratio_clamp, clamp=clamp)


@torch.library.custom_op("ppomax::kl_forward", mutates_args=())
def _forward(
    logprobs: Tensor, ref_logprobs: Tensor, kind: str, log_ratio_clamp: float | None, clamp: float | None
) -> Tensor:
    """[N] fp32, of [N] inputs."""
    from .gpu import kl as triton_path

    return triton_path.forward(logprobs, ref_logprobs, kind, log_ratio_clamp, clamp)


@_forward.register_fake
def _(logprobs: Tensor, *others: Tensor | str | float | None) -> Tensor:
    return torch.empty_like(logprobs, dtype=torch.float32)


@torch.library.custom_op("ppomax::kl_backward", mutates_args=())
def _backward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    upstream: Tensor,
    kind: str,
    log_ratio_clamp: float | None,
    clamp: float | None,
    wants_logprobs: bool,
    wants_ref: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of both log-probs, fp32; without elements where they are not wanted."""
    from .gpu import kl as triton_path

    wants = (wants_logprobs, wants_ref)
    return triton_path.backward(logprobs, ref_logprobs, upstream, kind, log_ratio_clamp, clamp, wants)


@_backward.register_fake
def _(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    upstream: Tensor,
    kind: str,
    log_ratio_clamp: float | None,
    clamp: float | None,
    wants_logprobs: bool,
    wants_ref: bool,
) -> tuple[Tensor, Tensor]:
    sizes = (logprobs.shape[0] if wanted else 0 for wanted in (wants_logprobs, wants_ref))
    dlogprobs, dref = (upstream.new_empty(size) for size in sizes)
    return dlogprobs, dref


class _KLPenalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        kind: str,
        log_ratio_clamp: float | None,
        clamp: float | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logprobs, ref_logprobs)
        ctx.options = (kind, log_ratio_clamp, clamp)
        return _forward(logprobs, ref_logprobs, kind, log_ratio_clamp, clamp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        wants = ctx.needs_input_grad[:2]
        if upstream is None or not any(wants):
            return (None,) * 5
        grads = _backward(*ctx.saved_tensors, dense(upstream), *ctx.options, *wants)
        results = [g.to(x.dtype) if w else None for g, x, w in zip(grads, ctx.saved_tensors, wants, strict=True)]
        return (*results, None, None, None)


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kind: KLKind = "k1",
    *,
    log_ratio_clamp: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Per-token estimate of KL(p, p_ref), formulas in the module's docstring; differentiable in both arguments.

    Args:
        logprobs: log-probs of the sampled tokens, any shape.
        ref_logprobs: their log-probs under the reference, the same shape.
        kind: k1, abs, k2, k3, k1+ or k3+.
        log_ratio_clamp: clamp d to +- this first.
        clamp: clamp the result to +- this.

    Returns:
        fp32 (fp64 where an input is), the shape of `logprobs`.

    Raises:
        ValueError: shapes differ, or `kind` is unknown.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"shapes differ: {tuple(logprobs.shape)} and {tuple(ref_logprobs.shape)}")
    check_kind(kind)
    if uses_triton(logprobs, ref_logprobs):
        flat = [x.reshape(-1).contiguous() for x in (logprobs, ref_logprobs)]
        return _KLPenalty.apply(*flat, kind, log_ratio_clamp, clamp).view(logprobs.shape)
    dtype = loss_dtype(logprobs, ref_logprobs)
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if log_ratio_clamp is not None:
        d = d.clamp(-log_ratio_clamp, log_ratio_clamp)
    kl = kl_terms(d, kind)
    return kl if clamp is None else kl.clamp(-clamp, clamp)
