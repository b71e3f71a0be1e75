"""Arithmetic in which a token's numbers do not depend on what is computed beside it: a slow mode of the CPU.

Products of matrices round differently with the number of rows, and vectorised functions with a row's place. Here
tokens come in whole tiles of `TILE` rows, every linear layer takes one tile after another, and attention one query
after another. Decoding a sequence token by token, alone or in a crowd, then has the bits of one forward pass over it.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 32


def pad_to_tiles(x: Tensor) -> Tensor:
    """`x` [T, ...] with zeros appended up to a multiple of TILE."""
    return torch.cat([x, x.new_zeros(-x.shape[0] % TILE, *x.shape[1:])])


def attend_by_row(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of one sequence's last queries, one at a time: q `[L, Hq, D]`, k and v `[t, Hkv, D]`."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))  # [Hq, t, D]
    rows = []
    for j, query in enumerate(q):
        stop = k.shape[1] - q.shape[0] + j + 1
        start = 0 if window is None else max(0, stop - window)
        scores = torch.matmul(k[:, start:stop].contiguous(), query[:, :, None] * scale).transpose(1, 2)  # [Hq, 1, t]
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        rows.append(torch.matmul(scores.softmax(-1), v[:, start:stop].contiguous()).squeeze(1))
    return torch.stack(rows)
