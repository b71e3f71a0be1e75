"""Log-probs and entropies from logits in Triton; the maths is in `kernels/logprobs.py`.

Forward: one read of the logits, a row by one program or, where rows are few, by several whose partial
statistics a second launch merges. Backward: one read and one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, configuration, launch, splits_of
from .softmax import LOG2_E, LOG_2, LOWEST, add_tile, inverse_temperature, merge, row_is_kept


@triton.jit(do_not_specialize=["n_rows"])
def logprobs_forward(
    logits_ptr,  # [N, V]
    labels_ptr,  # [N]
    mask_ptr,  # [N] or None
    temperature_ptr,  # scalar or None
    logprobs_ptr,  # [N]
    entropy_ptr,  # [N]
    saved_ptr,  # [2, N]: largest logit, log-sum
    parts_ptr,  # [3, SPLITS, N]: m, s, u; SPLITS > 1
    temperature,
    stride_row,
    vocab,
    n_rows,
    SPLITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    label = tl.load(labels_ptr + row)
    kept = row_is_kept(label, mask_ptr, row, True)
    m = tl.full((), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_V,), tl.float32)
    u = tl.zeros((BLOCK_V,), tl.float32)
    if kept:
        scale = inverse_temperature(temperature, temperature_ptr) * LOG2_E
        row_ptr = logits_ptr + row * stride_row
        for start in range(split * BLOCK_V, vocab, SPLITS * BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            x = tl.load(row_ptr + offs_v, mask=offs_v < vocab, other=float("-inf")).to(tl.float32)
            m, s, u = add_tile(x, scale, m, s, u)
    if SPLITS == 1:
        s, u = tl.sum(s, 0), tl.sum(u, 0)
        _finish(logits_ptr, label, kept, temperature_ptr, logprobs_ptr, entropy_ptr, saved_ptr, row, m, s, u,
                temperature, stride_row, vocab, n_rows)  # fmt: skip
    else:
        part = parts_ptr + split.to(tl.int64) * n_rows + row
        stride = SPLITS * n_rows.to(tl.int64)
        tl.store(part, m)
        tl.store(part + stride, tl.sum(s, 0))
        tl.store(part + 2 * stride, tl.sum(u, 0))


@triton.jit
def _finish(
    logits_ptr, label, kept, temperature_ptr, logprobs_ptr, entropy_ptr, saved_ptr, row, m, s, u,
    temperature, stride_row, vocab, n_rows,
):  # fmt: skip
    """Stores the results of rows whose statistics are known; scalars or blocks of rows."""
    known = kept & (label >= 0) & (label < vocab)
    x = tl.load(logits_ptr + row * stride_row + label, mask=known, other=0.0).to(tl.float32)
    inside = row < n_rows
    log_sum = tl.log(tl.where(kept, s, 1.0))
    logprob = tl.where(known, (x - m) * inverse_temperature(temperature, temperature_ptr) - log_sum, float("nan"))
    tl.store(logprobs_ptr + row, tl.where(kept, logprob, 0.0), mask=inside)
    entropy = log_sum - LOG_2 * u / tl.where(kept, s, 1.0)
    tl.store(entropy_ptr + row, tl.where(kept, entropy, 0.0), mask=inside)
    tl.store(saved_ptr + row, tl.where(kept, m, 0.0), mask=inside)
    tl.store(saved_ptr + n_rows.to(tl.int64) + row, log_sum, mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def logprobs_merge(
    logits_ptr, labels_ptr, mask_ptr, temperature_ptr, logprobs_ptr, entropy_ptr, saved_ptr, parts_ptr,
    temperature, stride_row, vocab, n_rows, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Second stage where rows were split: arguments as in `logprobs_forward`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < n_rows
    label = tl.load(labels_ptr + row, mask=inside, other=-100)
    kept = row_is_kept(label, mask_ptr, row, inside)
    part = parts_ptr + tl.arange(0, SPLITS).to(tl.int64)[:, None] * n_rows + row[None, :]
    stride = SPLITS * n_rows.to(tl.int64)
    m = tl.load(part, mask=inside[None, :], other=float("-inf"))
    s = tl.load(part + stride, mask=inside[None, :], other=0.0)
    u = tl.load(part + 2 * stride, mask=inside[None, :], other=0.0)
    m, s, u = merge(m, s, u, inverse_temperature(temperature, temperature_ptr) * LOG2_E)
    _finish(logits_ptr, label, kept, temperature_ptr, logprobs_ptr, entropy_ptr, saved_ptr, row, m, s, u,
            temperature, stride_row, vocab, n_rows)  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def logprobs_backward(
    logits_ptr,  # [N, V]
    labels_ptr,
    mask_ptr,
    temperature_ptr,
    entropy_ptr,  # [N], of the forward
    saved_ptr,  # [2, N], of the forward
    c_ptr,  # [N]: dL/dlogprob, or None
    h_ptr,  # [N]: dL/dentropy, or None
    out_ptr,  # [N, V], may be the logits
    temperature,
    stride_row,
    stride_out,
    vocab,
    n_rows,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = offs_v < vocab
    label = tl.load(labels_ptr + row)
    out_ptr += row * stride_out
    if row_is_kept(label, mask_ptr, row, True):
        inverse = inverse_temperature(temperature, temperature_ptr)
        top, log_sum = tl.load(saved_ptr + row), tl.load(saved_ptr + n_rows.to(tl.int64) + row)
        c = tl.zeros((), tl.float32)
        if c_ptr is not None:
            c = tl.load(c_ptr + row)
        x = tl.load(logits_ptr + row * stride_row + offs_v, mask=inside, other=float("-inf")).to(tl.float32)
        logp = (x - top) * inverse - log_sum
        upstream = c
        if h_ptr is not None:
            entropy = tl.load(entropy_ptr + row)
            upstream = c + tl.load(h_ptr + row) * (tl.maximum(logp, LOWEST) + entropy)
        g = (tl.where(offs_v == label, c, 0.0) - tl.exp(logp) * upstream) * inverse
        tl.store(out_ptr + offs_v, g.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + offs_v, tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty), mask=inside)


def forward(
    logits: Tensor, labels: Tensor, mask: Tensor | None, temperature: float, temperature_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [N], entropy [N], saved [2, N]: largest logit, log sum exp(z - largest z)), fp32; 0 where masked."""
    n_rows, vocab = logits.shape
    logprobs, entropy, saved = (
        torch.empty(*k, n_rows, dtype=torch.float32, device=logits.device) for k in ((), (), (2,))
    )
    config = configuration("logprobs_forward", logits.device, vocab=vocab)
    splits = splits_of(n_rows, vocab, config["BLOCK_V"], logits.device)
    parts = None if splits == 1 else saved.new_empty(3, splits, n_rows)
    common = {
        "logits_ptr": logits, "labels_ptr": labels, "mask_ptr": mask, "temperature_ptr": temperature_tensor,
        "logprobs_ptr": logprobs, "entropy_ptr": entropy, "saved_ptr": saved, "parts_ptr": parts,
        "temperature": temperature, "stride_row": logits.stride(0), "vocab": vocab, "n_rows": n_rows,
        "SPLITS": splits,
    }  # fmt: skip
    launch(logprobs_forward, (n_rows, splits), config, **common)
    if splits > 1:
        config = configuration("logprobs_merge", logits.device)
        launch(logprobs_merge, (cdiv(n_rows, config["BLOCK_N"]),), config, **common)
    return logprobs, entropy, saved


def backward(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    entropy: Tensor,
    saved: Tensor,
    c: Tensor | None,
    h: Tensor | None,
    out: Tensor,
) -> None:
    """dL/dlogits into `out`, which may be the logits; `entropy` and `saved` are the forward's."""
    n_rows, vocab = logits.shape
    config = configuration("logprobs_backward", logits.device, vocab=vocab)
    launch(
        logprobs_backward,
        (n_rows, cdiv(vocab, config["BLOCK_V"])),
        config,
        logits_ptr=logits,
        labels_ptr=labels,
        mask_ptr=mask,
        temperature_ptr=temperature_tensor,
        entropy_ptr=entropy,
        saved_ptr=saved,
        c_ptr=c,
        h_ptr=h,
        out_ptr=out,
        temperature=temperature,
        stride_row=logits.stride(0),
        stride_out=out.stride(0),
        vocab=vocab,
        n_rows=n_rows,
    )
