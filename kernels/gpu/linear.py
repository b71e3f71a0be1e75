"""The LM head's operations on a GPU: the library's matrix products around row kernels; the maths is in `lm_head.py`.

For one chunk of rows after another: fp32 logits into a workspace, a row kernel that leaves log-probs, entropies and
dL/dlogits, and two products with these. A gradient costs 6 N V H FLOPs where it is formed with the loss, 8 N V H where
logits are recomputed for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head_gradient import formed_gradients
from ..lm_head import Head, gpu_chunk_rows
from ..matmul import full_precision, matmul_t
from ..ppo_terms import PolicyInputs, PolicyOptions, ValueOptions, row_numbers
from . import linear_statistics
from .launch import configuration, launch
from .linear_rows import linear_policy_rows, linear_rows
from .rows import KL_KINDS

PITCH = 64  # rows of a workspace take multiples of this many elements: accesses are 16 bytes wide at any V


class Chunk(NamedTuple):
    """Rows whose logits are in memory."""

    rows: slice
    logits: Tensor  # [r, V] fp32: x W^T, before bias and softcap
    gradient: Tensor | None  # [r, V]: for dL/d(x W^T), in the memory of the logits where it is fp32


def forward(hidden: Tensor, labels: Tensor, kept: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [N], entropy [N], saved [2, N]: largest logit, log sum exp(z - largest z)); 0 where not kept.

    Without logits in memory where configs.json asks for that and the inputs are halves. The log-probs of `policy`
    equal those of the chunked form alone.
    """
    halves = hidden.dtype == head.weight.dtype != torch.float32
    if halves and configuration("linear_logprobs", hidden.device)["fused"]:
        return linear_statistics.forward(hidden, labels, kept, head)
    return chunked_forward(hidden, labels, kept, head)


@full_precision
def chunked_forward(hidden: Tensor, labels: Tensor, kept: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` with the logits of a chunk of rows in memory."""
    logprobs, entropy, saved = _per_row(hidden), _per_row(hidden), _per_row(hidden, 2)
    per_row = {"logprobs_ptr": logprobs, "entropy_ptr": entropy, "top_ptr": saved[0], "log_sum_ptr": saved[1]}
    _sweep(hidden, labels, kept, head, None, linear_rows, per_row, c_ptr=None, h_ptr=None, KNOWN=False)
    return logprobs, entropy, saved


def backward(
    hidden: Tensor,
    labels: Tensor,
    kept: Tensor,
    head: Head,
    entropy: Tensor,
    saved: Tensor,
    c: Tensor | None,
    h: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) from recomputed logits, with `entropy` and `saved` of the forward."""
    grads = Gradients(hidden, head, wants, None)
    per_row = {"c_ptr": c, "h_ptr": h, "entropy_ptr": entropy, "top_ptr": saved[0], "log_sum_ptr": saved[1]}
    _sweep(hidden, labels, kept, head, grads, linear_rows, per_row, logprobs_ptr=None, KNOWN=True)
    return grads.results(hidden)


def policy(
    hidden: Tensor,
    labels: Tensor,
    kept: Tensor,
    head: Head,
    inputs: PolicyInputs,
    weights: Tensor,
    options: PolicyOptions,
    wants: Sequence[bool],
    weight_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, dX, dW, db) of the policy loss sum_i weights_i term_i."""
    grads = Gradients(hidden, head, wants, weight_grad)
    if not grads.wanted:
        logprobs, entropy, _ = chunked_forward(hidden, labels, kept, head)
        return logprobs, entropy, *grads.results(hidden)
    logprobs, entropy = _per_row(hidden), _per_row(hidden)
    numbers, kl = row_numbers(options, ValueOptions()), options.kl_coef != 0.0
    _sweep(
        hidden,
        labels,
        kept,
        head,
        grads,
        linear_policy_rows,
        {
            "weights_ptr": weights,
            "old_ptr": inputs.old_logprobs,
            "advantages_ptr": inputs.advantages,
            "importance_ptr": inputs.importance_weights,
            "ref_ptr": inputs.ref_logprobs if kl else None,
            "logprobs_ptr": logprobs,
            "entropy_ptr": entropy,
        },
        lower=numbers.lower,
        upper=numbers.upper,
        dual=numbers.dual,
        log_ratio_clamp=numbers.log_ratio_clamp,
        entropy_coef=numbers.entropy_coef,
        entropy_bound=numbers.entropy_bound,
        kl_coef=numbers.kl_coef,
        HAS_ENTROPY=options.entropy_coef != 0.0,
        KL_KIND=KL_KINDS[options.kl_kind] if kl else 0,
    )
    return logprobs, entropy, *grads.results(hidden)


def given(
    hidden: Tensor,
    labels: Tensor,
    kept: Tensor,
    head: Head,
    c: Tensor,
    wants: Sequence[bool],
    weight_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, dX, dW, db) of a loss with dL/dlogprob_i = c_i, known beforehand."""
    grads = Gradients(hidden, head, wants, weight_grad)
    logprobs, entropy = _per_row(hidden), _per_row(hidden)
    per_row = {"c_ptr": c, "logprobs_ptr": logprobs, "entropy_ptr": entropy}
    rest = {"h_ptr": None, "top_ptr": None, "log_sum_ptr": None, "KNOWN": False}
    _sweep(hidden, labels, kept, head, grads if grads.wanted else None, linear_rows, per_row, **rest)
    return logprobs, entropy, *grads.results(hidden)


def _per_row(hidden: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, hidden.shape[0], dtype=torch.float32, device=hidden.device)


@full_precision
def _sweep(
    hidden: Tensor,
    labels: Tensor,
    kept: Tensor,
    head: Head,
    grads: Gradients | None,
    kernel: Any,
    per_row: Mapping[str, Tensor | None],
    **constants: Any,
) -> None:
    """A row kernel over all rows, given their part of each vector in `per_row`; products with what it leaves."""
    t, vocab = head.temperature, head.weight.shape[0]
    per_row = {"labels_ptr": labels, "mask_ptr": kept, **per_row}
    config = configuration("linear_rows", hidden.device, vocab=vocab)
    for rows, logits, out in _chunks(hidden, head, gradient=grads is not None):
        launch(
            kernel,
            (logits.shape[0],),
            config,
            logits_ptr=logits,
            bias_ptr=head.bias,
            temperature_ptr=t if isinstance(t, Tensor) else None,
            out_ptr=out,
            temperature=1.0 if isinstance(t, Tensor) else t,
            softcap=head.softcap,
            stride_row=logits.stride(0),
            stride_out=None if out is None else out.stride(0),
            vocab=vocab,
            **{name: None if x is None else x[rows] for name, x in per_row.items()},
            **constants,
        )
        if grads is not None and out is not None:
            grads.add(rows, out, hidden, kept)


def _gradient_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of dL/dlogits and the products with it: bf16 where both are, else fp32. fp16 would lose p * c below 6e-8."""
    return torch.bfloat16 if hidden.dtype == weight.dtype == torch.bfloat16 else torch.float32


def _chunk_size(hidden: Tensor, weight: Tensor) -> int:
    """The same with and without a gradient: a product's bits may depend on how many rows it has."""
    apart = _gradient_dtype(hidden, weight) != torch.float32
    return gpu_chunk_rows(hidden.shape[0], weight.shape[0], bytes_per_logit=6 if apart else 4)


def _chunks(hidden: Tensor, head: Head, *, gradient: bool) -> Iterator[Chunk]:
    """One chunk after another in the same memory; its logits are there when it comes."""
    n_rows, vocab = hidden.shape[0], head.weight.shape[0]
    step, dtype = _chunk_size(hidden, head.weight), _gradient_dtype(hidden, head.weight)
    logits = workspace(hidden, step, vocab, torch.float32)
    out = None
    if gradient:
        out = logits if dtype == torch.float32 else workspace(hidden, step, vocab, dtype)
    same = hidden.dtype == head.weight.dtype
    weight = (head.weight if same else head.weight.float()).t()
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        size = rows.stop - start
        product(hidden[rows] if same else hidden[rows].float(), weight, logits[:size])
        yield Chunk(rows, logits[:size], None if out is None else out[:size])


def workspace(like: Tensor, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Memory for [rows, V]."""
    pitch = -(-vocab // PITCH) * PITCH
    return torch.empty(rows, pitch, dtype=dtype, device=like.device)[:, :vocab]


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a b, or out += a b; a and b of one dtype, sums in fp32."""
    if a.device.type == "cpu":  # Triton's interpreter: no product of halves has an fp32 result there
        result = matmul_t(a.float(), b.float().t())
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
        return
    elif out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if add else torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    else:
        result = torch.mm(a, b)
    out.add_(result) if add else out.copy_(result)


class Gradients:
    """Where the gradients of an operation go: dX is written, dW and db are summed over chunks in fp32."""

    def __init__(self, hidden: Tensor, head: Head, wants: Sequence[bool], weight_grad: Tensor | None) -> None:
        weight, bias, dtype = head.weight, head.bias, _gradient_dtype(hidden, head.weight)
        self.head, self.in_buffer = head, weight_grad is not None
        self.wanted = any(wants) or self.in_buffer
        self.hidden = torch.empty_like(hidden) if wants[0] else None
        self.factor = weight.to(dtype) if wants[0] else None
        alone = hidden.shape[0] <= _chunk_size(hidden, weight)  # nothing is added to the product
        kind = weight.dtype if alone and weight.dtype == dtype else torch.float32
        self.weight = torch.empty_like(weight, dtype=kind) if wants[1] else weight_grad
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if wants[2] and bias is not None else None
        self.started = self.in_buffer  # the first chunk overwrites, later ones add

    def add(self, rows: slice, g: Tensor, hidden: Tensor, kept: Tensor) -> None:
        """dX = g W, dW += g^T x, db += sum g for a chunk's g = dL/d(x W^T)."""
        if self.hidden is not None and self.factor is not None:
            product(g, self.factor, self.hidden[rows])
        if self.weight is not None:
            x = torch.where(kept[rows, None], hidden[rows], 0.0).to(g.dtype)  # g is 0 there, but 0 * NaN is not
            product(g.t(), x, self.weight, add=self.started)
        if self.bias is not None:
            self.bias += g.sum(0, dtype=torch.float32)
        self.started = True

    def results(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dX, dW, db) as an operation returns them."""
        if self.weight is not None and not self.started:
            self.weight.zero_()  # there were no rows
        dw = None if self.in_buffer else self.weight
        return formed_gradients(hidden, self.head, self.hidden, dw, self.bias)
