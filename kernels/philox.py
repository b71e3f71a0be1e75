"""The random stream of sampling: one number per (seed, position), whatever else is drawn.

Philox4x32-10 (Salmon et al., SC 2011) with the seed as key and the position as counter; its first word, as a
float in [0, 1), is `tl.rand(seed, position)` of Triton with a 64-bit position.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_WORD = 0xFFFFFFFF
_PHILOX_ROUNDS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEYS = (0x9E3779B9, 0xBB67AE85)
_UNIFORM_SCALE = 4.6566127342e-10  # (2^23 - 1) / 2^23 / 2^31, so that the largest word stays below 1 in fp32


def philox(seeds: Tensor, positions: Tensor) -> Tensor:
    """[4, R] int64: the words of Philox4x32-10 with key `seeds` and counter `positions`, both int64 of 64 bits."""
    counter = torch.stack([positions, positions >> 32]) & _LOW_WORD
    return philox_words(torch.cat([counter, torch.zeros_like(counter)]), torch.stack([seeds, seeds >> 32]) & _LOW_WORD)


def philox_words(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds over counter words [4, R] and key words [2, R], 32-bit words held in int64."""
    steps = torch.arange(10, device=key.device)[:, None, None]
    keys = (key + steps * torch.tensor(_PHILOX_KEYS, device=key.device)[:, None]) & _LOW_WORD
    multipliers = torch.tensor(_PHILOX_ROUNDS, device=key.device)[:, None]
    even, odd = counter[0::2], counter[1::2]
    for round_key in keys:
        product = (even * multipliers).flip(0)  # wraps in int64: the words are those of the unsigned product
        even, odd = ((product >> 32) & _LOW_WORD) ^ odd ^ round_key, product & _LOW_WORD
    return torch.stack([even[0], odd[0], even[1], odd[1]])


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """fp32 in [0, 1), equal to `tl.rand(seed, position)` with a 64-bit position."""
    word = philox(seeds, positions)[0]
    signed = torch.where(word >= 1 << 31, word - (1 << 32), word)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * _UNIFORM_SCALE
