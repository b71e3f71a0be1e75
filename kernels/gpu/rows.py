"""The loss maths of `ppo_terms.py` and `kl.py` as Triton functions, with their derivatives: what every kernel calls.

The torch functions there are the definition; tests hold these to them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# KL estimators as constexpr numbers
KL_KINDS = {"k1": 1, "abs": 2, "k2": 3, "k3": 4, "k1+": 5, "k3+": 6}


@triton.jit
def tanh(x):
    """By its series near 0, where 1 - 2 / (exp(2|x|) + 1) cancels; 2 sigmoid(2x) - 1 would double what a GPU's
    division and exponential are off by."""
    s, size = x * x, tl.abs(x)
    series = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.15, series, tl.where(x < 0, -far, far))


@triton.jit
def exp_minus_linear(x):
    """exp(x) - 1 - x, by its series near 0, where the difference cancels."""
    tail = 1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320)))
    series = x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * tail)))
    return tl.where(tl.abs(x) < 0.4, series, tl.exp(x) - 1.0 - x)


@triton.jit
def exp_minus_one(x):
    """exp(x) - 1 without cancellation."""
    return tl.where(tl.abs(x) < 0.4, x + exp_minus_linear(x), tl.exp(x) - 1.0)


@triton.jit
def clamp(x, low, high):
    """x held between the bounds; NaN stays NaN, which tl.clamp, tl.minimum and tl.maximum would drop."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def kl_row(d, KIND: tl.constexpr):
    """(estimate, its derivative) as functions of d = logprob - ref_logprob; see `kl.kl_terms`."""
    if KIND == 1:
        value, slope = d, tl.full(d.shape, 1.0, tl.float32)
    elif KIND == 2:
        value, slope = tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    elif KIND == 3:
        value, slope = 0.5 * d * d, d
    elif KIND == 4:
        value, slope = exp_minus_linear(-d), -exp_minus_one(-d)
    elif KIND == 5:
        value, slope = d, d
    else:
        value, slope = exp_minus_linear(-d), d
    return value, slope


@triton.jit
def policy_row(
    logprob,
    old_logprob,
    advantage,
    importance_weight,
    entropy,
    ref_logprob,
    lower,
    upper,
    dual,
    log_ratio_clamp,
    entropy_coef,
    entropy_bound,
    kl_coef,
    HAS_ENTROPY: tl.constexpr,
    KL_KIND: tl.constexpr,
):
    """The policy term of each token: `ppo_terms.policy_terms` and its derivatives.

    Bounds that are off are inf, an absent importance weight is 1; KL_KIND 0 is no KL term.

    Returns:
        term, ratio, dterm/dlogprob, dterm/dentropy, and whether the token is held at the lower, the upper and
        the dual bound.
    """
    raw = logprob - old_logprob
    ratio = tl.exp(clamp(raw, -log_ratio_clamp, log_ratio_clamp))
    negative = advantage < 0
    least = tl.where(negative, lower, 0.0)
    most = tl.where(negative, dual, upper)
    weighted = -advantage * importance_weight
    term = weighted * clamp(ratio, least, most)
    stays = (ratio < least) | (ratio > most) | (tl.abs(raw) > log_ratio_clamp)
    slope = tl.where(stays, 0.0, weighted * ratio)
    entropy_slope = tl.zeros_like(term)
    if HAS_ENTROPY:
        unrewarded = entropy >= entropy_bound
        term -= tl.where(unrewarded, 0.0, entropy_coef * entropy)
        entropy_slope = tl.where(unrewarded, 0.0, -entropy_coef)
    if KL_KIND != 0:
        kl, kl_slope = kl_row(logprob - ref_logprob, KL_KIND)
        term += kl_coef * kl
        slope += kl_coef * kl_slope
    low = negative & (ratio < lower)
    high = (advantage > 0) & (ratio > upper)
    held = negative & (ratio > dual)
    return term, ratio, slope, entropy_slope, low, high, held


@triton.jit
def value_row(value, old_value, target, clip_eps, coef, CLIP: tl.constexpr):
    """(term, dterm/dvalue, whether the clipped error is the larger): `ppo_terms.value_terms`.

    Where both errors are equal the derivative is the mean of theirs, as torch.maximum has it.
    """
    error = value - target
    term = error * error
    slope = 2.0 * error
    clipped_larger = term < 0
    if CLIP:
        low, high = old_value - clip_eps, old_value + clip_eps
        free = (value >= low) & (value <= high)
        clipped_error = tl.where(free, value, tl.where(value < low, low, high)) - target
        clipped_term = clipped_error * clipped_error
        clipped_slope = tl.where(free, 2.0 * clipped_error, 0.0)
        clipped_larger = clipped_term > term
        mean_slope = 0.5 * (slope + clipped_slope)
        slope = tl.where(clipped_larger, clipped_slope, tl.where(clipped_term < term, slope, mean_slope))
        term = tl.maximum(term, clipped_term, propagate_nan=tl.PropagateNan.ALL)
    return coef * term, coef * slope, clipped_larger
