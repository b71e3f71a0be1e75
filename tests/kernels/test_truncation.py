"""Top-k and top-p in torch: ties, and equality with a full sort."""

import pytest
import torch
from ppomax.kernels import truncation
from ppomax.kernels.truncation import cut_top_k, cut_top_p
from torch import Tensor


@pytest.mark.parametrize("short", [None, 8192, 0], ids=["candidates", "bisection", "bisection of each row"])
def test_ties_go_to_the_lower_id(short: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if short is not None:
        monkeypatch.setattr(truncation, "_CANDIDATES", ())
        monkeypatch.setattr(truncation, "_SHORT_ROW", short)
    p = torch.tensor([[0.125, 0.25, 0.125, 0.25, 0.125, 0.125]])
    for k, kept in {1: [1], 2: [1, 3], 3: [0, 1, 3], 5: [0, 1, 2, 3, 4], 6: range(6)}.items():
        assert cut_top_k(p, k).nonzero()[:, 1].tolist() == list(kept)
        assert cut_top_k(p, torch.tensor([[k]])).nonzero()[:, 1].tolist() == list(kept)
    for top_p, kept in {0.0: [1], 0.25: [1], 0.26: [1, 3], 0.5: [1, 3], 0.6: [0, 1, 3], 0.75: [0, 1, 2, 3]}.items():
        assert cut_top_p(p, top_p).nonzero()[:, 1].tolist() == list(kept), top_p
    assert torch.equal(cut_top_p(p, 1.0), p)
    assert torch.equal(cut_top_k(p, torch.tensor([[0]])), p)


def test_bisection_without_looking_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for other devices and for short rows, beside that of long ones."""
    monkeypatch.setattr(truncation, "_SHORT_ROW", 0)
    p = torch.softmax(torch.randn(5, 900) * 3, 1).bfloat16().float()
    for target in (0.2, 0.9):
        goal = torch.full((5, 1), target, dtype=torch.float64)

        def mass(p: Tensor, t: Tensor) -> Tensor:
            return torch.where(p >= t, p, 0.0).sum(1, keepdim=True, dtype=torch.float64)

        expected = truncation._threshold_of_mass(p, goal, (900,))
        assert torch.equal(truncation._largest_threshold(p, goal, mass), expected)
        assert torch.equal(truncation._threshold_of_mass(p, goal, ()), expected)


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("vocab", [40, 300, 5000])
def test_cuts_equal_a_full_sort(vocab: int, spread: float) -> None:
    """On probabilities rounded so that many are equal."""
    p = torch.softmax(torch.randn(6, vocab) * spread, 1).bfloat16().float()
    order = p.sort(dim=1, descending=True, stable=True)
    for top_p in (0.1, 0.5, 0.9, 0.999):
        mass = order.values.cumsum(1, dtype=torch.float64)
        keep = mass - order.values < top_p * mass[:, -1:]
        expected = torch.zeros_like(p).scatter(1, order.indices, torch.where(keep, order.values, 0.0))
        assert torch.equal(cut_top_p(p, top_p), expected)
        assert torch.equal(cut_top_p(p, torch.full((6, 1), top_p, dtype=torch.float64)), expected)
    for k in (1, 7, 39):
        expected = torch.zeros_like(p).scatter(1, order.indices[:, :k], order.values[:, :k])
        assert torch.equal(cut_top_k(p, k), expected)
        assert torch.equal(cut_top_k(p, torch.full((6, 1), k)), expected)
