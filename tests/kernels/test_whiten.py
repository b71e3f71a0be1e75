"""Masked moments and whitening: against float64, per segment, over processes, garbage in masked places."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ppomax.kernels.gae import shaped_gae
from ppomax.kernels.whiten import (
    Moments,
    masked_mean,
    masked_var,
    masked_whiten,
    masked_whiten_ref,
    moments,
    whitening,
)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_against_float64(shift_mean: bool, unbiased: bool, no_worse: Any) -> None:
    x, mask = torch.randn(7, 31) * 3 + 5, torch.rand(7, 31) > 0.3
    kept = x[mask]
    plain = torch.zeros_like(x)
    plain[mask] = (kept - kept.mean()) * torch.rsqrt(kept.var(unbiased=unbiased) + 1e-8)
    plain[mask] += 0.0 if shift_mean else kept.mean()
    options = {"shift_mean": shift_mean, "unbiased": unbiased}
    no_worse([masked_whiten(x, mask, **options)], [plain], [masked_whiten_ref(x, mask, **options)])


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_mean_and_variance(garbage: float) -> None:
    x, mask = torch.randn(50, dtype=torch.float64), torch.rand(50) > 0.5
    dirty = torch.where(mask, x, garbage)
    torch.testing.assert_close(masked_mean(dirty, mask), x[mask].mean())
    torch.testing.assert_close(masked_var(dirty, mask), x[mask].var())
    torch.testing.assert_close(masked_var(dirty, mask, unbiased=False), x[mask].var(unbiased=False))
    torch.testing.assert_close(masked_whiten(dirty, mask), masked_whiten_ref(x, mask), rtol=1e-9, atol=1e-12)


def test_far_from_zero_keeps_its_variance() -> None:
    """A sum of squares would lose it: 1e4^2 has an ulp of 8 in fp32."""
    x = 1e4 + torch.randn(4096)
    assert float(masked_var(x)) == pytest.approx(float(x.double().var()), rel=1e-4)


def test_segments() -> None:
    x, mask = torch.randn(4, 9, dtype=torch.float64), torch.rand(4, 9) > 0.3
    mask[2] = False
    rows = torch.arange(4)[:, None]
    whitened = masked_whiten(x, mask, segments=rows, num_segments=4)
    for b in range(4):
        torch.testing.assert_close(whitened[b], masked_whiten_ref(x[b], mask[b]), rtol=1e-9, atol=1e-12)
    assert torch.equal(whitened, masked_whiten(x, mask, segments=rows))
    assert masked_mean(x, mask, segments=rows).shape == (4,)


def test_degenerate_counts() -> None:
    one = torch.tensor([3.0, torch.nan])
    assert float(masked_var(one, torch.tensor([True, False]))) == 0.0
    assert masked_whiten(one, torch.tensor([True, False])).tolist() == [0.0, 0.0]
    none = torch.zeros(2, dtype=torch.bool)
    assert float(masked_mean(one, none)) == float(masked_var(one, none)) == 0.0
    assert masked_whiten(torch.zeros(0)).shape == (0,)


def test_gradients() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 5) > 0.3
    for function in (masked_mean, masked_var, masked_whiten):
        torch.autograd.gradcheck(lambda t, f=function: f(t, mask), (x,))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_moments_of_shaped_gae_whiten_its_advantages(shift_mean: bool) -> None:
    bounds = torch.tensor([0, 5, 11], dtype=torch.int32)
    fields = torch.randn(3, 11, dtype=torch.float64)
    shaped = shaped_gae(torch.randn(2, dtype=torch.float64), *fields, bounds, kl_coef=0.1)
    mean, rstd = whitening(Moments(shaped.count, shaped.mean, shaped.m2), shift_mean=shift_mean)
    expected = masked_whiten(shaped.advantages, shift_mean=shift_mean)
    torch.testing.assert_close((shaped.advantages - mean) * rstd, expected, rtol=1e-9, atol=1e-12)


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole, mask = torch.randn(40, dtype=torch.float64), torch.rand(40) > 0.3
    rows = slice(0, 15) if rank == 0 else slice(15, 40)
    group = dist.group.WORLD
    local = masked_whiten(whole[rows], mask[rows], group=group)
    torch.testing.assert_close(local, masked_whiten(whole, mask)[rows], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(
        whitening(moments(whole[rows], mask[rows]), group=group), whitening(moments(whole, mask)), rtol=1e-12, atol=0
    )
    dist.destroy_process_group()


def test_over_two_processes(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
