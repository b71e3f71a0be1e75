"""The torch recurrence under GAE: carries over several levels of blocks."""

import pytest
import torch
from ppomax.kernels.discounting import BLOCK, decayed_sums


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_decayed_sums_take_carries_through_several_levels(decay: float) -> None:
    lengths = torch.tensor([BLOCK * BLOCK + 7, 0, 3, BLOCK * BLOCK * 2])
    x = torch.randn(int(lengths.sum()), dtype=torch.float64)
    y = decayed_sums(x, lengths, decay)
    for part, whole in zip(x.split(lengths.tolist()), y.split(lengths.tolist()), strict=True):
        carry = torch.zeros((), dtype=torch.float64)
        for t in reversed(range(part.numel())):
            carry = part[t] + decay * carry
            assert float(whole[t]) == pytest.approx(float(carry), rel=1e-10, abs=1e-10)
