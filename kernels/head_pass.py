"""Passes of one chunk of rows after another over the vocabulary, in torch; the maths is in `lm_head.py`.

Each tile of the vocabulary gives its own softmax, and per row its logsumexp, its mean logit and the label's logit;
rows combine these at the end. The gradient passes over the tiles again, from what was kept of them or from recomputed
logits.

On a CPU a row's results have the same bits whatever the other rows, in every operation: products as in `matmul.py`,
all else row by row. On a GPU, where these passes serve fp64, the vocabulary is one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .lm_head import LOWEST, Head
from .matmul import matmul_t, pad_rows


class RowStatistics(NamedTuple):
    """Of the rows of a chunk: [r], the last [tiles, r]."""

    logprobs: Tensor
    entropy: Tensor
    top: Tensor  # largest logit
    log_sum: Tensor  # log sum exp(z - top): kept apart, their sum would lose digits of the smaller
    shares: Tensor  # of each tile in the row's probability

    def rows(self, rows: slice | Tensor) -> RowStatistics:
        return RowStatistics(*(s[..., rows] for s in self))


class RowGradients(NamedTuple):
    """dL/dlogprob [r] and dL/dentropy [r] (None where that is 0)."""

    logprobs: Tensor
    entropy: Tensor | None


class HeadPass:
    """Passes of one chunk of rows after another over the vocabulary.

    `keeps` says what stays in memory between a chunk's forward and its gradient: "nothing" (logits are
    recomputed), "softmax" of each tile (enough for dL/dlogprob without a softcap), or "logits".
    """

    def __init__(self, head: Head, keeps: str = "nothing") -> None:
        self.head, self.keeps = head, keeps
        self.kept: list[Tensor] = []  # [r, columns] for each tile
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, z: Tensor) -> Tensor:
        """Memory in the shape of `z`, the same for each use of a name."""
        memory = self.buffers.get(name)
        if memory is None or memory.numel() < z.numel():
            memory = self.buffers[name] = torch.empty_like(z).flatten()
        return memory[: z.numel()].view(z.shape)

    def statistics(self, x: Tensor, labels: Tensor) -> RowStatistics:
        """Log-prob of each label, entropy and logsumexp of the rows `x` [r, H]."""
        n_rows, x, labels = x.shape[0], pad_rows(x), pad_rows(labels)
        tiles = _TileStatistics(x)
        self.kept = []
        for tile in self.head.tiles:
            z = tile_logits(x, self.head, tile)
            p = torch.softmax(z, 1, out=self.buffer(f"p{tile}" if self.keeps == "softmax" else "p", z))
            if self.keeps == "logits":
                self.kept.append(self.buffer(f"z{tile}", z).copy_(z)[:n_rows])
            elif self.keeps == "softmax":
                self.kept.append(p[:n_rows])
            tiles.add(z, p, labels, tile, floor=self.head.bias is not None)
        return tiles.combine().rows(slice(n_rows))

    def backward(
        self, x: Tensor, labels: Tensor, stats: RowStatistics, upstream: RowGradients, grads: HeadGrads
    ) -> Tensor | None:
        """Adds the chunk to the head's gradients; returns dL/dx [r, H] where `grads.hidden` is set."""
        dx = torch.zeros_like(x) if grads.hidden else None
        for i, tile in enumerate(self.head.tiles):
            z = self.kept[i] if self.keeps != "nothing" else tile_logits(x, self.head, tile)
            g = self.logits_gradient(z, labels, stats, stats.shares[i], upstream, tile)
            grads.add(g, x, self.head, tile, dx)
        grads.started = True
        return dx

    def logits_gradient(
        self,
        z: Tensor,
        labels: Tensor,
        stats: RowStatistics,
        share: Tensor,
        upstream: RowGradients,
        tile: tuple[int, int],
    ) -> Tensor:
        """dL/d(x W^T + b) of one tile, over the memory of `z`: its logits, or its softmax where that was kept."""
        c, h = upstream
        if h is None and self.head.softcap is None:
            p = z if self.keeps == "softmax" else torch.softmax(z, 1, out=z)
            g = add_to_labels(p.mul_(-(c * share)[:, None]), c, labels, tile)
        else:
            p = torch.softmax(z, 1, out=self.buffer("p", z)).mul_(share[:, None])
            slope = softcap_slope(z, self.head, self.buffer("slope", z))
            if h is None:
                g = p.mul_(-c[:, None])
            else:
                logp = z.sub_(stats.top[:, None]).sub_(stats.log_sum[:, None])
                g = p.mul_(logp.add_(stats.entropy[:, None]).mul_(h[:, None]).add_(c[:, None])).neg_()
            g = add_to_labels(g, c, labels, tile)
            g = g if slope is None else g.mul_(slope)
        return g.div_(self.head.temperature) if self.head.scaled else g


class HeadGrads:
    """Where the gradients of weight and bias are summed, in the dtype of the arithmetic."""

    def __init__(self, head: Head, wants: Sequence[bool], weight_grad: Tensor | None = None) -> None:
        self.hidden, weight, bias = wants
        self.in_buffer = weight_grad is not None
        self.weight = torch.empty_like(head.weight, dtype=head.dtype) if weight else weight_grad
        self.bias = torch.zeros_like(head.bias, dtype=head.dtype) if bias and head.bias is not None else None
        self.started = self.in_buffer  # the first chunk overwrites, later ones add

    @property
    def wanted(self) -> bool:
        return self.hidden or self.weight is not None or self.bias is not None

    def add(self, g: Tensor, x: Tensor, head: Head, tile: tuple[int, int], dx: Tensor | None) -> None:
        """dx += g W, dW += g^T x, db += sum g for one tile of the vocabulary."""
        start, stop = tile
        if dx is not None:
            dx.add_(matmul_t(g, head.weight[start:stop].to(head.dtype).t()))
        if self.weight is not None:
            part, rows = matmul_t(g.t(), x.t()), self.weight[start:stop]
            rows.add_(part) if self.started else rows.copy_(part)
        if self.bias is not None:
            self.bias[start:stop] += g.sum(0)

    def finish(self) -> Tensor | None:
        """The weight's gradient, zeros where no row was seen; None where a buffer has it."""
        if self.weight is not None and not self.started:
            self.weight.zero_()
        return None if self.in_buffer else self.weight


class _TileStatistics:
    """Per row of each tile: maximum, log-sum of exp(z - maximum), mean of z - maximum under the tile's
    softmax; and the label's logit."""

    def __init__(self, x: Tensor) -> None:
        self.tops: list[Tensor] = []
        self.logs: list[Tensor] = []
        self.means: list[Tensor] = []
        self.target = x.new_full(x.shape[:1], torch.nan)

    def add(self, z: Tensor, p: Tensor, labels: Tensor, tile: tuple[int, int], *, floor: bool) -> None:
        """Overwrites z. `floor` says that -inf may have been raised to LOWEST."""
        column, inside = columns_of(labels, tile)
        value = z.gather(1, column[:, None]).squeeze(1)
        if floor:
            value = torch.where(value > LOWEST, value, -torch.inf)
        self.target = torch.where(inside, value, self.target)
        top = z.amax(1)
        self.tops.append(top)
        self.logs.append(-p.amax(1).log_())  # the largest p is 1 / sum of exp(z - top)
        self.means.append(torch.linalg.vecdot(z.sub_(top[:, None]), p))

    def combine(self) -> RowStatistics:
        tops, logs, means = (torch.stack(s) for s in (self.tops, self.logs, self.means))  # [tiles, r]
        top = tops.amax(0)
        relative = (tops - top).add_(logs)
        log_sum = relative[0] if len(relative) == 1 else relative.exp().sum(0).log()
        shares = (relative - log_sum).exp()
        entropy = (shares * ((top - tops) + (log_sum - means))).sum(0)  # sum_v p (lse - z)
        return RowStatistics((self.target - top) - log_sum, entropy, top, log_sum, shares)


def columns_of(labels: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(column of each label in a tile, clamped into it; whether it lies there)."""
    start, stop = tile
    column = labels - start
    return column.clamp(0, stop - start - 1), (column >= 0) & (column < stop - start)


def tile_logits(x: Tensor, head: Head, tile: tuple[int, int]) -> Tensor:
    """z of the module's docstring for one tile of the vocabulary, a new tensor [r, columns]."""
    start, stop = tile
    z = matmul_t(x, head.weight[start:stop].to(head.dtype))
    if head.bias is not None:
        z.add_(head.bias[start:stop])
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    if head.scaled:
        z.div_(head.temperature)
    # a tile of nothing but -inf must not make exp(-inf - -inf)
    return z if head.bias is None else z.clamp_(min=LOWEST)


def add_to_labels(g: Tensor, c: Tensor, labels: Tensor, tile: tuple[int, int]) -> Tensor:
    """Adds c to the label's column of each row whose label lies in the tile, in place."""
    column, inside = columns_of(labels, tile)
    return g.scatter_add_(1, column[:, None], torch.where(inside, c, 0.0)[:, None])


def softcap_slope(z: Tensor, head: Head, out: Tensor) -> Tensor | None:
    """d(softcap * tanh(a / softcap)) / da = 1 - tanh^2 from z, into `out`; None without a softcap."""
    if head.softcap is None:
        return None
    return torch.mul(z, head.temperature / head.softcap, out=out).square_().neg_().add_(1.0)
