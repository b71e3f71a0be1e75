"""The product under the LM head: right, the same bits for a row among any others, untouched by autocast."""

from typing import Any

import pytest
import torch
from ppomax.kernels import matmul
from ppomax.kernels.matmul import full_precision, matmul_t, pad_rows


@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 4, 3), (5, 3, 0), (17, 33, 9), (64, 128, 200)], ids=str)
@pytest.mark.parametrize("transposed", ["neither", "left", "right", "both"])
def test_matches_float64(shape: tuple[int, int, int], transposed: str, no_worse: Any) -> None:
    m, k, n = shape
    x = torch.randn(k, m).t() if transposed in ("left", "both") else torch.randn(m, k)
    w = torch.randn(k, n).t() if transposed in ("right", "both") else torch.randn(n, k)
    no_worse([matmul_t(x, w)], [x @ w.t()], [x.double() @ w.double().t()])


@pytest.mark.parametrize("inner_product", [True, False], ids=["onednn", "default"])
def test_rows_do_not_depend_on_their_number(inner_product: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not inner_product:
        monkeypatch.setattr(matmul, "_INNER_PRODUCT", None)
    x, w = torch.randn(300, 96), torch.randn(513, 96)
    whole = matmul_t(x, w)
    for rows in (1, 2, 3, 7, 15, 16, 17, 100, 299):
        assert torch.equal(matmul_t(pad_rows(x[:rows]), w)[:rows], whole[:rows]), rows


def test_float64_stays_float64() -> None:
    x, w = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(matmul_t(x, w), x @ w.t())


def test_full_precision_switches_autocast_off() -> None:
    product = full_precision(lambda x: x @ x.t())
    x = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.t()).dtype == torch.bfloat16
        assert product(x).dtype == torch.float32
