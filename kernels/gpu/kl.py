"""KL estimators of per-token log-probs in Triton, forward and backward; the maths is in `kernels/kl.py`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, configuration, launch
from .rows import KL_KINDS, clamp, kl_row
from .tiles import load_tile, store_tile, tile_offsets


@triton.jit
def kl_tile(
    logprobs_ptr, ref_logprobs_ptr, upstream_ptr, kl_ptr, dlogprobs_ptr, dref_ptr, start, offs_n, inside,
    log_ratio_clamp, kl_clamp, KIND: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    raw = load_tile(logprobs_ptr + start, offs_n, inside, WHOLE).to(tl.float32)
    raw -= load_tile(ref_logprobs_ptr + start, offs_n, inside, WHOLE).to(tl.float32)
    kl, slope = kl_row(clamp(raw, -log_ratio_clamp, log_ratio_clamp), KIND)
    if kl_ptr is not None:
        store_tile(kl_ptr + start, offs_n, clamp(kl, -kl_clamp, kl_clamp), inside, WHOLE)
    else:
        upstream = load_tile(upstream_ptr + start, offs_n, inside, WHOLE)
        stays = (tl.abs(raw) > log_ratio_clamp) | (tl.abs(kl) > kl_clamp)
        g = tl.where(stays, 0.0, slope * upstream)
        if dlogprobs_ptr is not None:
            store_tile(dlogprobs_ptr + start, offs_n, g, inside, WHOLE)
        if dref_ptr is not None:
            store_tile(dref_ptr + start, offs_n, -g, inside, WHOLE)


@triton.jit(do_not_specialize=["n_tokens"])
def kl_kernel(
    logprobs_ptr,  # [N]
    ref_logprobs_ptr,  # [N]
    upstream_ptr,  # [N], of the estimates; None in the forward
    kl_ptr,  # [N]; None in the backward
    dlogprobs_ptr,  # [N] or None
    dref_ptr,  # [N] or None
    log_ratio_clamp,  # inf is off
    kl_clamp,
    n_tokens,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The estimates, or the gradients with respect to both log-probs."""
    offs_n = tile_offsets(BLOCK_N)
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    inside = offs_n < n_tokens - start
    if start + BLOCK_N <= n_tokens:
        kl_tile(
            logprobs_ptr, ref_logprobs_ptr, upstream_ptr, kl_ptr, dlogprobs_ptr, dref_ptr, start, offs_n, inside,
            log_ratio_clamp, kl_clamp, KIND, True,
        )  # fmt: skip
    else:
        kl_tile(
            logprobs_ptr, ref_logprobs_ptr, upstream_ptr, kl_ptr, dlogprobs_ptr, dref_ptr, start, offs_n, inside,
            log_ratio_clamp, kl_clamp, KIND, False,
        )  # fmt: skip


def _launch(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kind: str,
    log_ratio_clamp: float | None,
    kl_clamp: float | None,
    upstream: Tensor | None = None,
    kl: Tensor | None = None,
    dlogprobs: Tensor | None = None,
    dref: Tensor | None = None,
) -> None:
    n_tokens = logprobs.numel()
    config = configuration("kl_kernel", logprobs.device)
    launch(
        kl_kernel,
        (cdiv(n_tokens, config["BLOCK_N"]),),
        config,
        logprobs_ptr=logprobs,
        ref_logprobs_ptr=ref_logprobs,
        upstream_ptr=upstream,
        kl_ptr=kl,
        dlogprobs_ptr=dlogprobs,
        dref_ptr=dref,
        log_ratio_clamp=math.inf if log_ratio_clamp is None else log_ratio_clamp,
        kl_clamp=math.inf if kl_clamp is None else kl_clamp,
        n_tokens=n_tokens,
        KIND=KL_KINDS[kind],
    )


def forward(
    logprobs: Tensor, ref_logprobs: Tensor, kind: str, log_ratio_clamp: float | None, kl_clamp: float | None
) -> Tensor:
    """[N] fp32."""
    kl = torch.empty_like(logprobs, dtype=torch.float32)
    _launch(logprobs, ref_logprobs, kind, log_ratio_clamp, kl_clamp, kl=kl)
    return kl


def backward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    upstream: Tensor,
    kind: str,
    log_ratio_clamp: float | None,
    kl_clamp: float | None,
    wants: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of both log-probs, fp32; without elements where they are not wanted."""
    n_tokens = logprobs.numel()
    grads = [torch.empty(n_tokens if w else 0, dtype=torch.float32, device=logprobs.device) for w in wants]
    dlogprobs, dref = (g if w else None for g, w in zip(grads, wants, strict=True))
    _launch(
        logprobs,
        ref_logprobs,
        kind,
        log_ratio_clamp,
        kl_clamp,
        upstream=upstream,
        dlogprobs=dlogprobs,
        dref=dref,
    )
    return grads[0], grads[1]
