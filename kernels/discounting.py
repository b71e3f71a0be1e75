"""The recurrence of GAE over packed sequences, in torch.

    y_i = x_i + decay y_{i+1} = sum_{j >= i, same sequence} decay^(j - i) x_j

It is solved in blocks: each block by one product with the triangular matrix `decay^(j - i)`, the carries between
blocks by the same method on the blocks' first elements. No power is ever divided by, so decay 1 is as stable
as any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .matmul import full_precision

BLOCK = 64


@full_precision
def decayed_sums(x: Tensor, lengths: Tensor, decay: float) -> Tensor:
    """y of the module's docstring, [N]; x [N] packed sequences of `lengths` [S] int64."""
    if x.numel() == 0:
        return x.clone()
    blocks_of = (lengths + (BLOCK - 1)) // BLOCK  # [S]
    n_blocks = int(blocks_of.sum())
    slots = _block_slots(lengths, blocks_of, x.numel())
    blocks = _scatter(x, slots, n_blocks)
    powers = decay ** torch.arange(BLOCK + 1, dtype=x.dtype, device=x.device)
    y = blocks @ _triangle(powers[:BLOCK])
    if int(blocks_of.max()) > 1:
        heads = decayed_sums(y[:, 0].contiguous(), blocks_of, decay**BLOCK)
        carry = torch.cat([heads[1:], heads.new_zeros(1)])
        last = blocks_of.cumsum(0) - 1
        carry[last[blocks_of > 0]] = 0.0
        y.addcmul_(carry[:, None], powers[1:].flip(0))
    return y.flatten() if slots is None else y.flatten()[slots]


def _block_slots(lengths: Tensor, blocks_of: Tensor, total: int) -> Tensor | None:
    """Where each element lies once every sequence is padded to whole blocks; None where that changes nothing."""
    padding = blocks_of * BLOCK - lengths
    before = padding.cumsum(0) - padding
    if int(before[-1]) == 0 and int(padding[-1]) == 0:
        return None
    return torch.arange(total, device=lengths.device) + torch.repeat_interleave(before, lengths, output_size=total)


def _scatter(x: Tensor, slots: Tensor | None, n_blocks: int) -> Tensor:
    if slots is None:
        return x.view(n_blocks, BLOCK)
    return x.new_zeros(n_blocks * BLOCK).index_copy_(0, slots, x).view(n_blocks, BLOCK)


def _triangle(powers: Tensor) -> Tensor:
    """M[j, i] = powers[j - i] for j >= i, else 0."""
    index = torch.arange(powers.numel(), device=powers.device)
    gap = index[:, None] - index[None, :]
    return torch.where(gap >= 0, powers[gap.clamp(min=0)], 0.0)


def unmasked(mask: Tensor | None, bounds: Tensor) -> tuple[Tensor | None, Tensor]:
    """(flat positions of unmasked tokens or None for all, their number per sequence [S])."""
    if mask is None:
        return None, bounds.diff()
    flat = mask.flatten()
    before = torch.cat([flat.new_zeros(1, dtype=torch.int64), flat.cumsum(0)])
    return flat.nonzero().squeeze(1), before[bounds].diff()


def discounted_advantages(
    rewards: Tensor,
    values: Tensor,
    lengths: Tensor,
    bootstrap_values: Tensor | None,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Advantages of the unmasked tokens, packed [n], with `lengths` of them per sequence."""
    if rewards.numel() == 0:
        return rewards.clone()
    next_values = torch.cat([values[1:], values.new_zeros(1)])
    some = lengths > 0
    last = (lengths.cumsum(0) - 1)[some]
    next_values[last] = 0.0 if bootstrap_values is None else bootstrap_values.to(values.dtype)[some]
    deltas = torch.add(rewards, next_values, alpha=gamma).sub_(values)
    return decayed_sums(deltas, lengths, gamma * gae_lambda)


def spread(x: Tensor, positions: Tensor | None, shape: torch.Size) -> Tensor:
    """A tensor of `shape` with `x` at flat positions (None: everywhere) and 0 elsewhere."""
    if positions is None:
        return x.view(shape)
    return x.new_zeros(shape.numel()).index_copy_(0, positions, x).view(shape)


def take(x: Tensor, positions: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values at flat positions (None: all), packed."""
    x = x.flatten()
    return (x if positions is None else x[positions]).to(dtype)
