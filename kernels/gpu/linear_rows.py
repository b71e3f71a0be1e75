"""Row kernels over fp32 logits of the LM head: statistics, and dL/dlogits; the maths is in `kernels/lm_head.py`.

Rows take a multiple of 16 elements of memory each: whole vectors are read and written whatever the vocabulary, and
what is beyond it is anything.

One program has a row. It reads the logits for the statistics, and once more, from the end, where tiles are still in
cache, for the gradient. What both kernels do with a row is the same code in the same order, so their log-probs are
equal bit for bit. For that the order of sums within a tile has to be the same too, which follows from how a tile lies
on threads: the compiler chooses one way for all tiles of a shape, by the widest of their accesses. So tiles of the
gradient, which may be halves, have a shape of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import policy_row, tanh
from .softmax import LOG2_E, LOG_2, LOWEST, add_tile, inverse_temperature, row_is_kept


@triton.jit
def logit(x, offs_v, vocab, bias_ptr, softcap):
    """Logits before the temperature, from products x W^T at columns offs_v; anything outside the vocabulary."""
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offs_v, mask=offs_v < vocab, other=0.0).to(tl.float32)
    if softcap is not None:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def load_logits(row_ptr, stride_row, offs_v, bias_ptr, softcap, vocab):
    """Logits of a row before the temperature, finite outside the vocabulary."""
    x = tl.load(row_ptr + offs_v, mask=offs_v < stride_row, other=0.0)
    return logit(tl.where(offs_v < vocab, x, 0.0), offs_v, vocab, bias_ptr, softcap)


@triton.jit
def row_results(target, m, s, u, inverse):
    """(logprob, entropy, log-sum) from the label's logit and what `add_tile` summed."""
    log_sum = tl.log(s)
    return (target - m) * inverse - log_sum, log_sum - LOG_2 * u / s, log_sum


@triton.jit
def row_statistics(row_ptr, stride_row, label, bias_ptr, softcap, inverse, vocab, BLOCK_V: tl.constexpr):
    """(logprob, entropy, largest logit, log-sum) of a row; the log-prob of a label outside the vocabulary is NaN."""
    m = tl.full((), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_V,), tl.float32)
    u = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, vocab, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        x = load_logits(row_ptr, stride_row, offs_v, bias_ptr, softcap, vocab)
        m, s, u = add_tile(tl.where(offs_v < vocab, x, float("-inf")), inverse * LOG2_E, m, s, u)
    known = (label >= 0) & (label < vocab)
    safe = tl.where(known, label, 0)
    target = logit(tl.load(row_ptr + safe), safe, vocab, bias_ptr, softcap)
    logprob, entropy, log_sum = row_results(target, m, tl.sum(s, 0), tl.sum(u, 0), inverse)
    return tl.where(known, logprob, float("nan")), entropy, m, log_sum


@triton.jit
def row_gradient(
    row_ptr, stride_row, out_ptr, stride_out, label, bias_ptr, softcap, inverse, top, log_sum, entropy, c, h, vocab,
    HAS_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dL/d(x W^T) of a row into `out_ptr`, which may be the row itself; c = dL/dlogprob, h = dL/dentropy."""
    if (c != 0) | (h != 0):
        last = (vocab - 1) // BLOCK_V * BLOCK_V
        for start in range(0, vocab, BLOCK_V):
            offs_v = last - start + tl.arange(0, BLOCK_V)[None, :]
            x = load_logits(row_ptr, stride_row, offs_v, bias_ptr, softcap, vocab)
            logp = (x - top) * inverse - log_sum
            upstream = c
            if HAS_H:
                upstream = c + h * (tl.maximum(logp, LOWEST) + entropy)
            g = (tl.where(offs_v == label, c, 0.0) - tl.exp(logp) * upstream) * inverse
            if softcap is not None:
                t = x / softcap
                g *= 1.0 - t * t
            tl.store(out_ptr + offs_v, g.to(out_ptr.dtype.element_ty), mask=offs_v < stride_out)
    else:
        row_zeros(out_ptr, stride_out, vocab, BLOCK_V)


@triton.jit
def row_zeros(out_ptr, stride_out, vocab, BLOCK_V: tl.constexpr):
    for start in range(0, vocab, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)[None, :]
        tl.store(out_ptr + offs_v, tl.zeros((1, BLOCK_V), out_ptr.dtype.element_ty), mask=offs_v < stride_out)


@triton.jit
def linear_rows(
    logits_ptr,  # [r, V] fp32: x W^T
    labels_ptr,  # [r]
    mask_ptr,  # [r]
    bias_ptr,  # [V] or None
    temperature_ptr,  # scalar or None
    c_ptr,  # [r]: dL/dlogprob; None is 0
    h_ptr,  # [r]: dL/dentropy; None is 0
    logprobs_ptr,  # [r]
    entropy_ptr,  # [r]
    top_ptr,  # [r] or None
    log_sum_ptr,  # [r] or None
    out_ptr,  # [r, V]: dL/d(x W^T), or None
    temperature,
    softcap,
    stride_row,
    stride_out,
    vocab,
    KNOWN: tl.constexpr,  # entropy, top and log_sum are there; else they and the log-prob are computed
    BLOCK_V: tl.constexpr,
):
    """Statistics of rows, or their gradient under a known upstream gradient, or both."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    row_ptr = logits_ptr + row * stride_row
    inverse = inverse_temperature(temperature, temperature_ptr)
    if row_is_kept(label, mask_ptr, row, True):
        if KNOWN:
            entropy = tl.load(entropy_ptr + row)
            top, log_sum = tl.load(top_ptr + row), tl.load(log_sum_ptr + row)
        else:
            logprob, entropy, top, log_sum = row_statistics(
                row_ptr, stride_row, label, bias_ptr, softcap, inverse, vocab, BLOCK_V
            )  # fmt: skip
            tl.store(logprobs_ptr + row, logprob)
            tl.store(entropy_ptr + row, entropy)
            if top_ptr is not None:
                tl.store(top_ptr + row, top)
                tl.store(log_sum_ptr + row, log_sum)
        if out_ptr is not None:
            c, h = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
            if c_ptr is not None:
                c = tl.load(c_ptr + row)
            if h_ptr is not None:
                h = tl.load(h_ptr + row)
            row_gradient(
                row_ptr, stride_row, out_ptr + row * stride_out, stride_out, label, bias_ptr, softcap, inverse, top,
                log_sum, entropy, c, h, vocab, h_ptr is not None, BLOCK_V,
            )  # fmt: skip
    else:
        if not KNOWN:
            tl.store(logprobs_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            if top_ptr is not None:
                tl.store(top_ptr + row, 0.0)
                tl.store(log_sum_ptr + row, 0.0)
        if out_ptr is not None:
            row_zeros(out_ptr + row * stride_out, stride_out, vocab, BLOCK_V)


@triton.jit
def linear_policy_rows(
    logits_ptr,  # [r, V] fp32: x W^T
    labels_ptr,  # [r]
    mask_ptr,  # [r]
    bias_ptr,  # [V] or None
    temperature_ptr,  # scalar or None
    weights_ptr,  # [r]: of each token's term in the loss
    old_ptr,  # [r]
    advantages_ptr,  # [r]
    importance_ptr,  # [r] or None
    ref_ptr,  # [r] or None
    logprobs_ptr,  # [r]
    entropy_ptr,  # [r]
    out_ptr,  # [r, V]: dL/d(x W^T)
    temperature,
    softcap,
    lower,
    upper,
    dual,
    log_ratio_clamp,
    entropy_coef,
    entropy_bound,
    kl_coef,
    stride_row,
    stride_out,
    vocab,
    HAS_ENTROPY: tl.constexpr,
    KL_KIND: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Statistics of rows, and their gradient under the clipped policy loss."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    row_ptr = logits_ptr + row * stride_row
    inverse = inverse_temperature(temperature, temperature_ptr)
    if row_is_kept(label, mask_ptr, row, True):
        logprob, entropy, top, log_sum = row_statistics(
            row_ptr, stride_row, label, bias_ptr, softcap, inverse, vocab, BLOCK_V
        )
        tl.store(logprobs_ptr + row, logprob)
        tl.store(entropy_ptr + row, entropy)
        importance, ref = tl.full((), 1.0, tl.float32), tl.zeros((), tl.float32)
        if importance_ptr is not None:
            importance = tl.load(importance_ptr + row)
        if ref_ptr is not None:
            ref = tl.load(ref_ptr + row)
        old, advantage = tl.load(old_ptr + row), tl.load(advantages_ptr + row)
        _, _, slope, entropy_slope, _, _, _ = policy_row(
            logprob, old, advantage, importance, entropy, ref, lower, upper, dual, log_ratio_clamp, entropy_coef,
            entropy_bound, kl_coef, HAS_ENTROPY, KL_KIND,
        )  # fmt: skip
        weight = tl.load(weights_ptr + row)
        row_gradient(
            row_ptr, stride_row, out_ptr + row * stride_out, stride_out, label, bias_ptr, softcap, inverse, top,
            log_sum, entropy, weight * slope, weight * entropy_slope, vocab, HAS_ENTROPY, BLOCK_V,
        )  # fmt: skip
    else:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        row_zeros(out_ptr + row * stride_out, stride_out, vocab, BLOCK_V)
