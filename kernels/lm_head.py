"""The LM head in chunks of rows and tiles of the vocabulary: what all `linear_*` operations share.

With `z = softcap * tanh((x W^T + b) / softcap) / T` (no tanh without a softcap) and `p = softmax(z)`:

    logprob_i = z_iy - lse_i          entropy_i = lse_i - sum_v p_iv z_iv          lse_i = log sum_v exp(z_iv)
    dL/dz_iv = c_i [v = y_i] - p_iv (c_i + h_i (log p_iv + entropy_i))     c = dL/dlogprob, h = dL/dentropy

Logits exist for one chunk of rows only. On a CPU a chunk passes over the vocabulary tile by tile (`head_pass.py`) and
holds `CHUNK_BYTES` of what has to be kept between passes, or `MIN_ROWS` rows where a vocabulary is so large that fewer
would fit; beside that a few tiles of `TILE_ELEMENTS` each. On a GPU (`gpu/linear.py`) it holds `GPU_CHUNK_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import dense
from .reductions import check_mask, host_sees, loss_dtype

IGNORE_INDEX = -100
LOWEST = -1e30  # stands for a logit of -inf, which a bias may ask for
CHUNK_BYTES = 18 << 20  # of kept fp32 logits on a CPU
MIN_ROWS = 128
TILE_COLUMNS = 1024
TILE_ELEMENTS = 1 << 19
# At V = 128256, fp32 logits and their gradient in bf16: 4096 rows. With fewer, adding to the weight's gradient,
# 8 V H bytes a chunk, would show beside the products.
GPU_CHUNK_BYTES = 3 << 30
GPU_MIN_ROWS = 1024
GPU_ROW_MULTIPLE = 16  # chunks start at aligned addresses of every per-row vector


class Head(NamedTuple):
    """An LM head and what is done to its logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    temperature: float | Tensor
    softcap: float | None
    dtype: torch.dtype  # of the arithmetic: fp32, or fp64 where an input is

    @property
    def on_cpu(self) -> bool:
        return host_sees(self.weight)

    @property
    def scaled(self) -> bool:
        return isinstance(self.temperature, Tensor) or self.temperature != 1.0

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """(start, stop) of the tiles the vocabulary is taken in; a single one off the CPU."""
        vocab = self.weight.shape[0]
        columns = TILE_COLUMNS if self.on_cpu else max(vocab, 1)
        return [(start, min(start + columns, vocab)) for start in range(0, vocab, columns)]


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises where shapes do not fit."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"need hidden [N, H] and weight [V, H], got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")


def make_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    softcap: float | None,
) -> Head:
    """The head that an operation works with; the temperature as `dispatch.temperature_pair` gives it."""
    t = temperature if temperature_tensor is None else temperature_tensor
    return Head(weight, dense(bias), t, softcap, loss_dtype(hidden, weight))


def row_mask(labels: Tensor, mask: Tensor | None, n_rows: int) -> Tensor:
    """Bool mask of the rows that count: `mask` and label not ignored."""
    shape = torch.Size([n_rows])
    if labels.shape != shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected {tuple(shape)}")
    kept = check_mask(mask, shape)
    return labels != IGNORE_INDEX if kept is None else kept & (labels != IGNORE_INDEX)


def seen_rows(kept: Tensor, labels: Tensor, vocab: int) -> Tensor | None:
    """`kept`, or None where that is all rows and the host can see it.

    On a CPU a label outside the vocabulary raises; on a GPU, where looking would stall, its row becomes NaN.
    """
    if not host_sees(labels):
        return kept
    everything = bool(kept.all())
    labels = labels if everything else labels[kept]
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= vocab):
        bad = labels[(labels < 0) | (labels >= vocab)][0]
        raise ValueError(f"label {int(bad)} is outside the vocabulary of {vocab} (ignore_index is {IGNORE_INDEX})")
    return None if everything else kept


def kept_rows(labels: Tensor, mask: Tensor | None, n_rows: int, vocab: int) -> Tensor | None:
    """`seen_rows` of the `row_mask`."""
    return seen_rows(row_mask(labels, mask, n_rows), labels, vocab)


def gpu_chunk_rows(n_rows: int, vocab: int, bytes_per_logit: int) -> int:
    """Rows that a GPU takes at once: as many as GPU_CHUNK_BYTES hold, in chunks of even size."""
    most = max(GPU_MIN_ROWS, GPU_CHUNK_BYTES // (bytes_per_logit * max(vocab, 1)))
    most = max(1, most // GPU_ROW_MULTIPLE) * GPU_ROW_MULTIPLE
    if n_rows <= most:
        return max(1, n_rows)
    size = -(-n_rows // -(-n_rows // most))
    return -(-size // GPU_ROW_MULTIPLE) * GPU_ROW_MULTIPLE


def chunk_rows(n_rows: int, head: Head, keeps: str) -> int:
    """Rows taken at once: as many as the chunks and tiles may hold, in chunks of even size."""
    vocab = max(head.weight.shape[0], 1)
    if not head.on_cpu:
        return gpu_chunk_rows(n_rows, vocab, bytes_per_logit=3 * head.dtype.itemsize)  # logits, softmax, a temporary
    most = max(MIN_ROWS, TILE_ELEMENTS // min(vocab, TILE_COLUMNS))
    if keeps != "nothing":
        most = min(most, max(MIN_ROWS, CHUNK_BYTES // (4 * vocab)))
    n_chunks = max(1, -(-n_rows // most))
    return max(1, -(-n_rows // n_chunks))


def row_chunks(
    labels: Tensor, kept: Tensor | None, head: Head, keeps: str
) -> Iterator[tuple[slice | Tensor, Tensor | None]]:
    """Yields (rows, mask of those rows). On a CPU rows that do not count are left out, elsewhere they are masked."""
    if kept is not None and host_sees(labels):
        index = kept.nonzero().squeeze(1)
        yield from ((rows, None) for rows in index.split(chunk_rows(index.numel(), head, keeps)) if rows.numel())
        return
    n_rows = labels.numel()
    size = chunk_rows(n_rows, head, keeps)
    for start in range(0, n_rows, size):
        rows = slice(start, min(start + size, n_rows))
        yield rows, None if kept is None else kept[rows]


def rows_of(x: Tensor, rows: slice | Tensor, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The chunk's rows of `x` in `dtype`; rows that do not count are 0."""
    x = x[rows].to(dtype)
    if kept is None:
        return x
    return torch.where(kept.view(-1, *[1] * (x.dim() - 1)), x, 0)


def check_weight_grad(weight_grad: Tensor, weight: Tensor) -> None:
    if weight_grad.shape != weight.shape:
        raise ValueError(f"weight_grad has shape {tuple(weight_grad.shape)}, weight {tuple(weight.shape)}")
    if weight_grad.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weight_grad must be float32, got {weight_grad.dtype}")
    if weight_grad.requires_grad:
        raise ValueError("weight_grad is a plain buffer: it must not require grad")
