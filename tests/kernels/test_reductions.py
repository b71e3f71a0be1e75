"""The weights of a loss, by hand."""

from typing import Any

import pytest
import torch
from ppomax.kernels.reductions import averages, keep, keep_constant, sequence_ids, token_weights

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()


@pytest.mark.parametrize(
    ("reduction", "first", "third"),
    [
        ("token-sum", 1.0, 1.0),
        ("token-mean", 1 / 6, 1 / 6),
        ("seq-mean-token-sum", 1 / 2, 1 / 2),
        ("seq-mean-token-mean", 1 / 4, 1 / 8),
    ],
)
def test_by_hand(reduction: Any, first: float, third: float) -> None:
    expected = torch.tensor([[first, first, 0, 0], [0, 0, 0, 0], [third] * 4])
    weights = token_weights(MASK, torch.zeros(3, 4), reduction=reduction)
    torch.testing.assert_close(weights, expected)
    packed = token_weights(MASK.flatten(), torch.zeros(12), reduction=reduction, cu_seqlens=torch.tensor([0, 4, 8, 12]))
    torch.testing.assert_close(packed, expected.flatten())
    halved = token_weights(MASK, torch.zeros(3, 4), reduction=reduction, normalizer=torch.tensor(10.0))
    default = {"token-sum": 1.0, "token-mean": 6.0}.get(reduction, 2.0)
    torch.testing.assert_close(halved, expected * default / 10)


def test_no_mask_and_nothing() -> None:
    assert token_weights(None, torch.zeros(4), reduction="token-mean").tolist() == [0.25] * 4
    assert token_weights(None, torch.zeros(2, 2), reduction="seq-mean-token-mean").tolist() == [[0.25] * 2] * 2
    assert token_weights(None, torch.zeros(0), reduction="token-mean").shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_constants_are_kept_as_other_tensors_are(dtype: torch.dtype) -> None:
    x = torch.tensor([1.5, -0.0, torch.nan, -torch.inf, -2.0, torch.nan, torch.inf, 3e-39, -3.0], dtype=dtype)
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0, 1, 0]).bool()
    for given, strided_mask in ((x, mask), (x.repeat_interleave(2)[::2], mask.repeat_interleave(2)[::2])):
        for result in (torch.float32, torch.float64):
            kept = keep_constant(given.requires_grad_(given.is_leaf), strided_mask, result)
            assert not kept.requires_grad
            assert torch.equal(kept.nan_to_num(nan=7.0), keep(x, mask, result).nan_to_num(nan=7.0))
            assert not bool((kept[~mask].signbit()).any())
    assert keep_constant(x, None, torch.float64).tolist()[4:5] == [-2.0]


def test_averages_of_terms_and_of_sums() -> None:
    terms = (torch.tensor([1.0, 2.0, 0.0]), torch.tensor(3), torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64))
    means = averages(torch.tensor(2.0), *terms)
    assert [float(m) for m in means] == [1.5, 1.5, 0.25]
    assert {m.dtype for m in means} == {torch.float32}
    assert [float(m) for m in averages(torch.tensor(0.0), torch.zeros(0), torch.tensor(0))] == [0.0, 0.0]


def test_keep_drops_garbage_and_its_gradient() -> None:
    x = torch.tensor([1.0, torch.nan, torch.inf], requires_grad=True)
    kept = keep(x, torch.tensor([True, False, False]), torch.float64)
    assert kept.tolist() == [1.0, 0.0, 0.0]
    kept.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0, 0.0]


def test_sequence_ids_skip_empty_sequences() -> None:
    assert sequence_ids(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 5).tolist() == [0, 0, 2, 2, 2]
