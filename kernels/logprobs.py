"""Log-probs and entropies of labels from logits.

    z = logits / T          logprob_i = z_iy - lse_i          entropy_i = lse_i - sum_v p_iv z_iv
    dL/dlogits_iv = (c_i [v = y_i] - p_iv (c_i + h_i (log p_iv + entropy_i))) / T

with lse_i = log sum_v exp(z_iv), c = dL/dlogprob, h = dL/dentropy.

On a GPU one Triton kernel reads the logits once, and one reads and writes them once (`gpu/logprobs.py`). In torch
rows are taken a few at a time, so that no second array of the logits' size appears but the gradient itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import dense, temperature_pair, traced, uses_triton
from .linear_logprobs import LogProbs
from .lm_head import LOWEST, kept_rows
from .matmul import full_precision
from .reductions import check_mask, host_sees, loss_dtype

CHUNK_ELEMENTS = 1 << 20
CACHED_ELEMENTS = 1 << 18  # what a CPU's thread keeps in its cache between passes


def logprobs_from_logits_ref(
    logits: Tensor, labels: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> LogProbs:
    """`logprobs_from_logits` in float64 with everything in memory, through autograd."""
    kept = labels != -100 if mask is None else mask.bool() & (labels != -100)
    logp = torch.log_softmax(torch.where(kept[..., None], logits.double(), 0.0) / temperature, -1)
    chosen = logp.gather(-1, torch.where(kept, labels, 0)[..., None]).squeeze(-1)
    entropy = -(logp.exp() * logp.clamp(min=-1e300)).sum(-1)
    return LogProbs(torch.where(kept, chosen, 0.0), torch.where(kept, entropy, 0.0))


def _chunks(logits: Tensor) -> Iterator[slice]:
    n_rows, vocab = logits.shape
    cached = CACHED_ELEMENTS * torch.get_num_threads()
    elements = min(CHUNK_ELEMENTS, cached) if host_sees(logits) else CHUNK_ELEMENTS << 8
    step = max(1, elements // max(vocab, 1))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _scaled(logits: Tensor, rows: slice, kept: Tensor | None, temperature: float | Tensor) -> Tensor:
    """The chunk's logits / T in fp32 or fp64, 0 in rows that do not count; perhaps the logits themselves."""
    z = logits[rows].to(loss_dtype(logits))
    z = z if kept is None else torch.where(kept[rows, None], z, 0.0)
    return z if not isinstance(temperature, Tensor) and temperature == 1.0 else z / temperature


def _safe_labels(labels: Tensor, kept: Tensor | None, vocab: int) -> Tensor:
    """Labels that can be gathered: 0 where a row does not count or, on a GPU, the label is outside the vocabulary."""
    if not host_sees(labels):  # elsewhere those that count have been looked at
        inside = (labels >= 0) & (labels < vocab)
        kept = inside if kept is None else inside & kept
    return labels.long() if kept is None else torch.where(kept, labels, 0).long()


def _softmax(z: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(p, z - max z, log sum exp(z - max z) [r, 1]); p in `out` where that is given."""
    p = torch.softmax(z, 1, out=out)
    d = z - z.amax(1, keepdim=True)
    return p, d, -p.amax(1, keepdim=True).log()  # the largest p is 1 / sum


@full_precision
def _forward_torch(
    logits: Tensor, labels: Tensor, kept: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy), each [N]."""
    n_rows, vocab = logits.shape
    logprobs, entropy = (logits.new_zeros(n_rows, dtype=loss_dtype(logits)) for _ in range(2))
    safe = _safe_labels(labels, kept, vocab)[:, None]
    for rows in _chunks(logits):
        p, d, log_sum = _softmax(_scaled(logits, rows, kept, temperature))
        logprobs[rows] = (d.gather(1, safe[rows]) - log_sum).squeeze(1)
        # -inf * 0 is 0 here
        entropy[rows] = log_sum.squeeze(1) - d.clamp_(min=LOWEST).mul_(p).sum(1)
    if not host_sees(labels):
        logprobs.masked_fill_((labels < 0) | (labels >= vocab), torch.nan)
    if kept is None:
        return logprobs, entropy
    return torch.where(kept, logprobs, 0.0), torch.where(kept, entropy, 0.0)


@full_precision
def _backward_torch(
    logits: Tensor,
    labels: Tensor,
    kept: Tensor | None,
    temperature: float | Tensor,
    entropy: Tensor,
    c: Tensor,
    h: Tensor | None,
    out: Tensor,
) -> None:
    """dL/dlogits into `out`, which may be the logits themselves."""
    safe = _safe_labels(labels, kept, logits.shape[1])[:, None]
    in_place = out.dtype == loss_dtype(logits) and out is not logits
    for rows in _chunks(logits):
        z, c_rows = _scaled(logits, rows, kept, temperature), c[rows, None]
        g = out[rows] if in_place else None
        if h is None:
            g = torch.softmax(z, 1, out=g).mul_(-c_rows)
        else:
            g, d, log_sum = _softmax(z, g)
            logp = d.clamp_(min=LOWEST).sub_(log_sum)
            g.mul_(logp.add_(entropy[rows, None]).mul_(h[rows, None]).add_(c_rows)).neg_()
        g.scatter_add_(1, safe[rows], c_rows)
        if isinstance(temperature, Tensor) or temperature != 1.0:
            g.div_(temperature)
        if not in_place:
            out[rows] = g


def _forward(
    logits: Tensor, labels: Tensor, mask: Tensor | None, temperature: float, temperature_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [N], entropy [N], what the Triton backward needs besides)."""
    if uses_triton(logits):
        from .gpu import logprobs as triton_path

        return triton_path.forward(logits, labels, mask, temperature, temperature_tensor)
    kept = kept_rows(labels, mask, *logits.shape)
    t = temperature if temperature_tensor is None else temperature_tensor
    return *_forward_torch(logits, labels, kept, t), logits.new_empty(0)


_forward_op = torch.library.custom_op("ppomax::logprobs_forward", mutates_args=())(_forward)


@_forward_op.register_fake
def _(
    logits: Tensor, labels: Tensor, mask: Tensor | None, temperature: float, temperature_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows = [logits.new_empty(labels.shape, dtype=loss_dtype(logits)) for _ in range(2)]
    shape = (2, labels.numel()) if uses_triton(logits) else (0,)
    return rows[0], rows[1], logits.new_empty(shape, dtype=torch.float32)


def _gradient(
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
    """dL/dlogits into `out`, which may be the logits."""
    if uses_triton(logits):
        from .gpu import logprobs as triton_path

        triton_path.backward(logits, labels, mask, temperature, temperature_tensor, entropy, saved, c, h, out)
        return
    kept = kept_rows(labels, mask, *logits.shape)
    c = torch.zeros_like(entropy) if c is None else c
    if kept is not None:
        c, h = torch.where(kept, c, 0.0), None if h is None else torch.where(kept, h, 0.0)
    _backward_torch(
        logits, labels, kept, temperature if temperature_tensor is None else temperature_tensor, entropy, c, h, out
    )


def _backward(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    entropy: Tensor,
    saved: Tensor,
    c: Tensor | None,
    h: Tensor | None,
) -> Tensor:
    """dL/dlogits."""
    out = torch.empty_like(logits)
    _gradient(logits, labels, mask, temperature, temperature_tensor, entropy, saved, c, h, out)
    return out


_backward_op = torch.library.custom_op("ppomax::logprobs_backward", mutates_args=())(_backward)


@_backward_op.register_fake
def _(logits: Tensor, *others: Tensor | float | None) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("ppomax::logprobs_backward_", mutates_args=("logits",))
def _backward_in_place(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    entropy: Tensor,
    saved: Tensor,
    c: Tensor | None,
    h: Tensor | None,
) -> None:
    """dL/dlogits over the logits."""
    _gradient(logits, labels, mask, temperature, temperature_tensor, entropy, saved, c, h, logits)


class _LogProbsFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        temperature: float,
        temperature_tensor: Tensor | None,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        run = _forward_op if traced(logits, labels, mask, temperature_tensor) else _forward
        logprobs, entropy, saved = run(logits, labels, mask, temperature, temperature_tensor)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, mask, temperature_tensor, entropy, saved)
        ctx.temperature, ctx.inplace_backward = temperature, inplace_backward
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0] or (c is None and h is None):
            return (None,) * 6
        logits, labels, mask, temperature_tensor, entropy, saved = ctx.saved_tensors
        rows = (labels, mask, ctx.temperature, temperature_tensor, entropy, saved, dense(c), dense(h))
        if not ctx.inplace_backward:
            run = _backward_op if traced(logits, labels, mask, temperature_tensor, c, h) else _backward
            return run(logits, *rows), None, None, None, None, None
        logits = logits.detach()
        _backward_in_place(logits, *rows)
        return logits, None, None, None, None, None


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> LogProbs:
    """Log-prob of each label and entropy of its distribution; both differentiable in `logits`.

    Args:
        logits: [..., V], any float dtype; arithmetic in fp32 (fp64 where they are).
        labels: [...] int64; rows labelled -100 are left out as if masked.
        temperature: divides the logits, a float or a 0-dim tensor (no gradient flows to it).
        mask: [...], True = keep. Other rows give 0, take no gradient, and may hold anything.
        inplace_backward: write the gradient over the logits; nothing else may read them, and the backward
            runs once.

    Returns:
        LogProbs(logprobs [...], entropy [...]).

    Raises:
        ValueError: shapes that do not fit; on a CPU a label outside [0, V) other than -100 (elsewhere its row
            is NaN).
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}")
    mask = check_mask(mask, labels.shape)
    flat = logits.reshape(-1, logits.shape[-1])
    result = _LogProbsFromLogits.apply(
        flat if flat.stride(1) == 1 else flat.contiguous(),
        labels.reshape(-1).contiguous(),
        None if mask is None else mask.reshape(-1).contiguous(),
        *temperature_pair(temperature, logits),
        inplace_backward,
    )
    return LogProbs(*(x.view(labels.shape) for x in result))
