"""The LM head in chunks of rows and tiles of the vocabulary: what all `linear_*` operations share.

With `z = softcap * tanh((x W^T + b) / softcap) / T` (no tanh without a softcap) and `p = softmax(z)`:

    logprob_i = z_iy - lse_i          entropy_i = lse_i - sum_v p_iv z_iv          lse_i = log sum_v exp(z_iv)
    dL/dz_iv = c_i [v = y_i] - p_iv (c_i + h_i (log p_iv + entropy_i))     c = dL/dlogprob, h = dL/dentropy

A chunk of rows passes over the vocabulary once, tile by tile, keeping per row a running maximum m, `s = sum exp(z - m)`,
`sum (z - m) exp(z - m)` and the label's logit. The gradient passes over the same tiles again. Logits exist for one chunk
of rows only: `CHUNK_BYTES` of them, or `MIN_ROWS` rows where a vocabulary is so large that fewer would fit.

Chunks start at multiples of the chunk's size among the rows that are kept, and every operation runs the forward through
`HeadChunk.statistics`: the same hidden states, weight and labels give the same bits in each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .reductions import check_mask, loss_dtype

IGNORE_INDEX = -100
CHUNK_BYTES = 24 << 20  # of fp32 logits on a CPU
MIN_ROWS = 128
TILE_COLUMNS = 2048
CUDA_CHUNK_BYTES = 2 << 30
CUDA_MIN_ROWS = 1024


class Head(NamedTuple):
    """An LM head and what is done to its logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    temperature: float | Tensor
    softcap: float | None
    dtype: torch.dtype  # of the arithmetic: fp32, or fp64 where an input is


class RowStatistics(NamedTuple):
    """Per row of a chunk, all [r]."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


def make_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float | Tensor, softcap: float | None
) -> Head:
    """Checks shapes and settles the dtype of the arithmetic."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"need hidden [N, H] and weight [V, H], got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")
    temperature = temperature.detach() if isinstance(temperature, Tensor) else temperature
    return Head(weight, bias, temperature, softcap, loss_dtype(hidden, weight))


def kept_rows(labels: Tensor, mask: Tensor | None, n_rows: int, vocab: int) -> Tensor | None:
    """Bool mask of the rows that count (`mask` and label not ignored), None where that is all of them.

    On a CPU a label outside the vocabulary raises; on a GPU, where looking would stall, its row becomes NaN.
    """
    if labels.shape != (n_rows,):
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected {(n_rows,)}")
    kept = check_mask(mask, labels.shape)
    kept = labels != IGNORE_INDEX if kept is None else kept & (labels != IGNORE_INDEX)
    if labels.device.type != "cpu":
        return kept
    if n_rows and not bool(kept.all()):
        labels = labels[kept]
    else:
        kept = None
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= vocab):
        bad = labels[(labels < 0) | (labels >= vocab)][0]
        raise ValueError(f"label {int(bad)} is outside the vocabulary of {vocab} (ignore_index is {IGNORE_INDEX})")
    return kept


def chunk_rows(n_rows: int, vocab: int, device: torch.device) -> int:
    """Rows whose logits are held at once."""
    cuda = device.type != "cpu"
    budget, least = (CUDA_CHUNK_BYTES, CUDA_MIN_ROWS) if cuda else (CHUNK_BYTES, MIN_ROWS)
    return max(1, min(n_rows, max(least, budget // (4 * vocab))))


def row_chunks(labels: Tensor, kept: Tensor | None, vocab: int) -> Iterator[tuple[slice | Tensor, Tensor | None]]:
    """Yields (rows, mask of those rows). On a CPU rows that do not count are left out, elsewhere they are masked."""
    if kept is not None and labels.device.type == "cpu":
        index = kept.nonzero().squeeze(1)
        for rows in index.split(chunk_rows(index.numel(), vocab, labels.device)):
            if rows.numel():
                yield rows, None
        return
    n_rows = labels.numel()
    size = chunk_rows(n_rows, vocab, labels.device)
    for start in range(0, n_rows, size):
        rows = slice(start, min(start + size, n_rows))
        yield rows, None if kept is None else kept[rows]


def rows_of(x: Tensor, rows: slice | Tensor, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The chunk's rows of `x` in `dtype`; rows that do not count are 0."""
    x = x[rows].to(dtype)
    if kept is None:
        return x
    return torch.where(kept.view(-1, *[1] * (x.dim() - 1)), x, 0)


class HeadChunk:
    """Buffers for chunks of up to `max_rows` rows, and the passes over the vocabulary.

    `keeps` says what stays in memory between the two passes: nothing, exp(z - m) (enough for dL/dlogprob without a
    softcap), or z - m.
    """

    def __init__(self, head: Head, max_rows: int, keeps: str = "nothing", columns: int | None = None) -> None:
        vocab = head.weight.shape[0]
        if columns is None:
            columns = TILE_COLUMNS if head.weight.device.type == "cpu" else vocab
        self.head, self.max_rows, self.keeps = head, max_rows, keeps
        self.tiles = [(start, min(start + columns, vocab)) for start in range(0, vocab, columns)]
        self.width = min(columns, vocab)
        options = {"dtype": head.dtype, "device": head.weight.device}
        self.buffer = torch.empty(max_rows * (vocab if keeps != "nothing" else self.width), **options)
        self.scratch = torch.empty(max_rows * self.width, **options)
        self.maxima: list[Tensor] = []

    def tile(self, n_rows: int, start: int, stop: int) -> Tensor:
        """The part of the buffer for one tile, [r, stop - start], contiguous."""
        offset = self.max_rows * start if self.keeps != "nothing" else 0
        return self.buffer[offset : offset + n_rows * (stop - start)].view(n_rows, stop - start)

    def scratch_like(self, z: Tensor) -> Tensor:
        return self.scratch[: z.numel()].view(z.shape)

    def statistics(self, x: Tensor, labels: Tensor) -> RowStatistics:
        """Log-prob of each label, entropy and logsumexp of the rows `x` [r, H]."""
        stats = _OnlineStatistics(x)
        self.maxima = []
        for start, stop in self.tiles:
            z = tile_logits(x, self.head, start, stop, self.tile(x.shape[0], start, stop))
            stats.take_labels(z, labels, start, stop)
            stats.add(z, self.scratch_like(z), exp_in_place=self.keeps != "logits", clamp=self.head.bias is not None)
            self.maxima.append(stats.m)
        return stats.finish()

    def backward(
        self, x: Tensor, labels: Tensor, stats: RowStatistics, c: Tensor, h: Tensor | None, grads: HeadGrads
    ) -> Tensor | None:
        """Adds the chunk to the head's gradients; returns dL/dx [r, H] where `grads.hidden` is set."""
        dx = torch.zeros_like(x) if grads.hidden else None
        for (start, stop), m in zip(self.tiles, self.maxima, strict=True):
            z = self.tile(x.shape[0], start, stop)
            if self.keeps == "exp":
                g = z.mul_(-(c * torch.exp(m - stats.lse))[:, None])
            else:
                logp = z.add_((m - stats.lse)[:, None])
                g = logits_gradient(logp, stats, c, h, self.scratch_like(z))
            finish_gradient(g, z, labels, stats, c, self.head, (start, stop))
            grads.add(g, x, self.head, (start, stop), dx)
        grads.started = True
        return dx


class HeadGrads:
    """Where the gradients of weight and bias are summed, in the dtype of the arithmetic."""

    def __init__(
        self, head: Head, *, hidden: bool, weight: bool, bias: bool, weight_grad: Tensor | None = None
    ) -> None:
        if weight_grad is not None:
            check_weight_grad(weight_grad, head)
        empty = weight_grad is None and weight
        self.hidden = hidden
        self.weight = torch.empty_like(head.weight, dtype=head.dtype) if empty else weight_grad
        self.bias = torch.zeros_like(head.bias, dtype=head.dtype) if bias and head.bias is not None else None
        self.started = weight_grad is not None  # the first chunk overwrites, later ones add

    @property
    def wanted(self) -> bool:
        return self.hidden or self.weight is not None or self.bias is not None

    def add(self, g: Tensor, x: Tensor, head: Head, tile: tuple[int, int], dx: Tensor | None) -> None:
        """dx += g W, dW += g^T x, db += sum g for one tile of the vocabulary."""
        start, stop = tile
        if dx is not None:
            dx.addmm_(g, head.weight[start:stop].to(head.dtype))
        if self.weight is not None:
            part = self.weight[start:stop]
            if part.dtype == g.dtype:
                torch.addmm(part, g.t(), x, beta=1.0 if self.started else 0.0, out=part)
            else:
                part.add_(g.t() @ x)
        if self.bias is not None:
            self.bias[start:stop] += g.sum(0)

    def finish(self) -> Tensor | None:
        """The weight's gradient, zeros where no row was seen."""
        if self.weight is not None and not self.started:
            self.weight.zero_()
        return self.weight


class _OnlineStatistics:
    """Running maximum m, sum of exp(z - m), sum of (z - m) exp(z - m), and the label's logit."""

    def __init__(self, x: Tensor) -> None:
        # not -inf: a tile of nothing but -inf must not make exp(-inf - -inf)
        self.m = x.new_full(x.shape[:1], torch.finfo(x.dtype).min / 4)
        self.s = x.new_zeros(x.shape[:1])
        self.ze = x.new_zeros(x.shape[:1])
        self.target = x.new_full(x.shape[:1], torch.nan)

    def take_labels(self, z: Tensor, labels: Tensor, start: int, stop: int) -> None:
        column = labels - start
        inside = (column >= 0) & (column < stop - start)
        value = z.gather(1, column.clamp(0, stop - start - 1)[:, None]).squeeze(1)
        self.target = torch.where(inside, value, self.target)

    def add(self, z: Tensor, scratch: Tensor, *, exp_in_place: bool, clamp: bool) -> None:
        """Leaves exp(z - m) in z (`exp_in_place`) or z - m in z, with m the maximum so far."""
        m = torch.maximum(self.m, z.amax(1))
        d, e = (scratch, z) if exp_in_place else (z, scratch)
        torch.sub(z, m[:, None], out=d)
        if clamp:  # -inf * exp(-inf) is 0 here
            d.clamp_(min=-1e5)
        torch.exp(d, out=e)
        shift = self.m - m
        decay = torch.exp(shift)
        self.ze = (self.ze + shift * self.s) * decay + torch.linalg.vecdot(d, e)
        self.s = self.s * decay + e.sum(1)
        self.m = m

    def finish(self) -> RowStatistics:
        log_s = self.s.log()
        lse = self.m + log_s
        return RowStatistics((self.target - self.m) - log_s, log_s - self.ze / self.s, lse)


def tile_logits(x: Tensor, head: Head, start: int, stop: int, out: Tensor) -> Tensor:
    """z of the module's docstring for one tile of the vocabulary, into `out`."""
    torch.mm(x, head.weight[start:stop].to(head.dtype).t(), out=out)
    if head.bias is not None:
        out.add_(head.bias[start:stop])
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    if isinstance(head.temperature, Tensor) or head.temperature != 1.0:
        out.div_(head.temperature)
    return out


def logits_gradient(logp: Tensor, stats: RowStatistics, c: Tensor, h: Tensor | None, out: Tensor) -> Tensor:
    """-p (c + h (log p + entropy)) into `out`, which may not be `logp`."""
    if h is None:
        return torch.exp(logp, out=out).mul_(-c[:, None])
    factor = logp.add(stats.entropy[:, None]).mul_(h[:, None]).add_(c[:, None])
    return torch.exp(logp, out=out).mul_(factor).neg_()


def finish_gradient(
    g: Tensor, logp: Tensor, labels: Tensor, stats: RowStatistics, c: Tensor, head: Head, tile: tuple[int, int]
) -> None:
    """In place: the label's column, then the derivatives of temperature and softcap."""
    start, stop = tile
    column = labels - start
    inside = (column >= 0) & (column < stop - start)
    g.scatter_add_(1, column.clamp(0, stop - start - 1)[:, None], torch.where(inside, c, 0.0)[:, None])
    if head.softcap is not None:
        capped = logp.add_(stats.lse[:, None]).mul_(head.temperature / head.softcap)
        g.mul_(capped.square_().neg_().add_(1.0))
    if isinstance(head.temperature, Tensor) or head.temperature != 1.0:
        g.div_(head.temperature)


def check_weight_grad(weight_grad: Tensor, head: Head) -> None:
    if weight_grad.shape != head.weight.shape:
        raise ValueError(f"weight_grad has shape {tuple(weight_grad.shape)}, weight {tuple(head.weight.shape)}")
    if weight_grad.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weight_grad must be float32, got {weight_grad.dtype}")
    if weight_grad.requires_grad:
        raise ValueError("weight_grad is a plain buffer: it must not require grad")
