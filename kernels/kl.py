"""Estimators of a KL divergence from the log-probs of sampled tokens.

With `d = logprobs - ref_logprobs` on tokens drawn from the distribution of `logprobs`:

    k1   d                   unbiased, of either sign
    abs  |d|
    k2   d^2 / 2             biased, its gradient is an unbiased estimate of the KL's gradient
    k3   exp(-d) - 1 + d     unbiased and never negative

`k1+` and `k3+` are straight-through: the value of k1 and k3 with the gradient of k2.
Source: J. Schulman, "Approximating KL Divergence" (2020); k1 is the penalty of arXiv 2307.04964, equation 10.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

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
    if kind in ("k1+", "k3+"):
        value, gradient = kl_terms(d, "k1" if kind == "k1+" else "k3"), kl_terms(d, "k2")
        return gradient + (value - gradient).detach()
    raise ValueError(f"unknown KL estimator {kind!r}, expected one of {', '.join(get_args(KLKind))}")


def kl_penalty_ref(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind = "k1") -> Tensor:
    """`kl_penalty` in float64."""
    return kl_penalty(logprobs.double(), ref_logprobs.double(), kind)


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
    dtype = loss_dtype(logprobs, ref_logprobs)
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if log_ratio_clamp is not None:
        d = d.clamp(-log_ratio_clamp, log_ratio_clamp)
    kl = kl_terms(d, kind)
    return kl if clamp is None else kl.clamp(-clamp, clamp)
