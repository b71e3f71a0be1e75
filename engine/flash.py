"""Attention kernels of other packages on a GPU: flash-attn's, and torch's own for sequences of varying length.

Each is called over packed sequences (training, scoring) and over the paged KV cache (sampling), behind one signature:
`packed(kernel)` and `paged(kernel)`. What runs is settled before a model is loaded, by `resolve_packed` and
`resolve_paged`: a package that is asked for and missing is an InputError, and so is a model that it does not fit.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import InputError

KERNELS = ("flash-attn", "torch")
_HALVES = (torch.bfloat16, torch.float16)
_MAX_HEAD = 256
_PACKED = {"scale", "window_size"}  # arguments of torch's function without which it cannot do what is asked here
_PAGED = _PACKED | {"enable_gqa", "seqused_k", "block_table", "num_splits"}


def resolve_packed(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What `RuntimeConfig.attention` = `name` stands for here: flash-attn, torch or sdpa.

    Raises:
        InputError: the kernels asked for are not installed, or take neither the device nor the dtype.
    """
    if name == "auto":
        fits = device.type == "cuda" and dtype in _HALVES
        return next((other for other in KERNELS if fits and _missing(other, _PACKED) is None), "sdpa")
    if name != "sdpa":
        _require(f"RuntimeConfig.attention = {name!r}", name, _PACKED, device, dtype)
    return name


def resolve_paged(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What `RolloutConfig.attention` = `name` stands for here: flash-attn, torch, triton, or gather on a CPU.

    Raises:
        InputError: as `resolve_packed`.
    """
    if name == "auto":
        return "triton" if device.type == "cuda" else "gather"
    if name == "triton":
        if device.type != "cuda":
            raise InputError(f"RolloutConfig.attention = 'triton' runs on a GPU, and the device is {device}")
    else:
        _require(f"RolloutConfig.attention = {name!r}", name, _PAGED, device, dtype)
    return name


def check_fits(kernel: str, config: Any) -> None:
    """Raise InputError where the kernels `kernel` cannot run a model with this transformers config."""
    if kernel not in KERNELS:
        return
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if size > _MAX_HEAD or size % 8:
        raise InputError(
            f"attention = {kernel!r} takes heads of multiples of 8 up to {_MAX_HEAD}, and the model's are of {size}: "
            "ask for 'sdpa' (in rollouts 'triton')"
        )
    softcap = getattr(text, "attn_logit_softcapping", None)
    if kernel == "torch" and softcap is not None:
        raise InputError(
            f"attention = 'torch' has no soft cap, and the model caps its attention at {softcap:g}: install flash-attn "
            "or ask for 'sdpa' (in rollouts 'triton')"
        )


def _require(field: str, name: str, needed: set[str], device: torch.device, dtype: torch.dtype) -> None:
    if missing := _missing(name, needed):
        raise InputError(f"{field}: {missing}")
    if device.type != "cuda":
        raise InputError(f"{field} runs on a GPU, and the device is {device}")
    if dtype not in _HALVES:
        raise InputError(f"{field} computes in bfloat16, and the dtype is {str(dtype).removeprefix('torch.')}")


def _missing(name: str, needed: set[str]) -> str | None:
    """What would have to be installed for the kernels `name`, torch's with the arguments `needed`; None where they are
    there."""
    if name == "flash-attn":
        return None if find_spec("flash_attn") else "the package flash-attn is not installed"
    if not find_spec("torch.nn.attention.varlen") or needed - _parameters(_library(name)):
        of = "over a paged cache" if "block_table" in needed else "of packed sequences with windows"
        return f"torch {torch.__version__} has no attention {of}"
    return None


class Packed(Protocol):
    """Causal attention inside each of the packed sequences."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, *, scale: float, window: int | None,
        softcap: float | None, deterministic: bool,
    ) -> Tensor:  # fmt: skip
        """q `[T, Hq, D]`, k and v `[T, Hkv, D]`, cu_seqlens `[S + 1]` int32 on their device, tokens of the longest
        sequence -> `[T, Hq, D]`."""


class PagedKernel(Protocol):
    """Causal attention of each sequence's newest tokens over the paged cache."""

    def __call__(
        self, q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor, longest: int, *, scale: float, window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """q `[T, Hq, D]`, pools `[blocks, block_size, Hkv, D]`, block table `[S, blocks]`, cached tokens `[S]`, bounds
        `[S + 1]` of the queries and of the cached tokens, queries of one sequence at most -> `[T, Hq, D]`."""


@cache
def packed(kernel: str) -> Packed:
    """The library's attention over packed sequences."""
    library = _library(kernel)
    if kernel == "flash-attn":
        return partial(_flash_packed, library)
    return partial(_torch_packed, library, "enable_gqa" in _parameters(library))


@cache
def paged(kernel: str) -> PagedKernel:
    """The library's attention over the paged cache."""
    run: Any = {"flash-attn": _flash_paged, "torch": _torch_paged}[kernel]
    return partial(run, _library(kernel))


def _library(kernel: str) -> Callable[..., Tensor]:
    if kernel == "flash-attn":
        return importlib.import_module("flash_attn").flash_attn_varlen_func
    return importlib.import_module("torch.nn.attention.varlen").varlen_attn


def _parameters(function: Callable[..., Tensor]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _window(window: int | None) -> tuple[int, int]:
    """(left, right) of the kernels, which count without the query's own position, from a window that counts it."""
    return (-1 if window is None else window - 1, 0)


def _flash_packed(
    run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, *, scale: float,
    window: int | None, softcap: float | None, deterministic: bool,
) -> Tensor:  # fmt: skip
    return run(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest,
        softmax_scale=scale,
        causal=True,
        window_size=_window(window),
        softcap=softcap or 0.0,
        deterministic=deterministic,
    )  # fmt: skip


def _torch_packed(
    run: Callable[..., Tensor], has_flag: bool, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, *,
    scale: float, window: int | None, softcap: float | None, deterministic: bool,
) -> Tensor:  # fmt: skip
    """Deterministic where `torch.use_deterministic_algorithms` says so. Releases whose function has no flag for grouped
    heads (`has_flag`) take them without."""
    _no_softcap(softcap)
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if has_flag else {}
    return run(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=_window(window), **grouped
    )  # fmt: skip


def _flash_paged(
    run: Callable[..., Tensor], q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest: int, *, scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    # Releases that let the number of splits be chosen lose rows of packed queries with any other than one.
    one_split = {"num_splits": 1} if "num_splits" in _parameters(run) else {}
    return run(
        q, k_pool, v_pool, cu_seqlens_q, cu_seqlens_k, longest, _most_keys(block_table, k_pool),
        softmax_scale=scale,
        causal=True,
        window_size=_window(window),
        softcap=softcap or 0.0,
        block_table=block_table,
        **one_split,
    )  # fmt: skip


def _torch_paged(
    run: Callable[..., Tensor], q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, seq_lens: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest: int, *, scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    _no_softcap(softcap)
    return run(
        q, k_pool, v_pool, cu_seqlens_q, cu_seqlens_k, longest, _most_keys(block_table, k_pool),
        scale=scale,
        window_size=_window(window),
        enable_gqa=q.shape[1] != k_pool.shape[2],
        seqused_k=seq_lens,
        block_table=block_table,
        num_splits=1,  # with more, rows of all sequences but the first are lost
    )  # fmt: skip


def _most_keys(block_table: Tensor, pool: Tensor) -> int:
    """Cached tokens of a sequence at most: a bound that stays true when a CUDA graph is replayed."""
    return block_table.shape[1] * pool.shape[1]


def _no_softcap(softcap: float | None) -> None:
    if softcap is not None:
        raise InputError("attention = 'torch' has no soft cap: install flash-attn, or ask for 'sdpa' or 'triton'")
