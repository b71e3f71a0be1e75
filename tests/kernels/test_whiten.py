"""Masked moments and whitening: against float64, per segment, over processes, garbage in masked places, gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ppomax.kernels import moments as moments_module
from ppomax.kernels import whiten as module
from ppomax.kernels.gae import shaped_gae
from ppomax.kernels.moments import Moments, moments
from ppomax.kernels.whiten import masked_mean, masked_var, masked_whiten, masked_whiten_ref, whitening
from torch import Tensor

pytestmark = pytest.mark.usefixtures("path")

FUNCTIONS = {
    "mean": masked_mean,
    "var": masked_var,
    "biased-var": lambda x, mask, **of: masked_var(x, mask, unbiased=False, **of),
    "whiten": masked_whiten,
    "whiten-scale": lambda x, mask, **of: masked_whiten(x, mask, shift_mean=False, **of),
    "m2": lambda x, mask, **of: moments(x, mask, **of).m2,
}


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("shape", [(7, 31), (3, 1500)], ids=str)
def test_whitening_against_float64(shape: Any, shift_mean: bool, unbiased: bool, no_worse: Any) -> None:
    x, mask = torch.randn(shape) * 3 + 5, torch.rand(shape) > 0.3
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
    x = 1e4 + torch.randn(9000)
    assert float(masked_var(x)) == pytest.approx(float(x.double().var()), rel=1e-4)
    ids = torch.randint(0, 3, (9000,))
    exact = torch.stack([x[ids == s].double().var() for s in range(3)])
    torch.testing.assert_close(masked_var(x, segments=ids, num_segments=3).double(), exact, rtol=1e-4, atol=0)


def test_long_segments_lose_no_terms() -> None:
    """Added up one by one in fp32, terms of 1e3 drown in a sum of 5e7."""
    x, ids = 1e3 + torch.rand(100_000), torch.arange(100_000) % 2
    exact = torch.stack([x[ids == s].double().mean() for s in range(2)])
    torch.testing.assert_close(masked_mean(x, segments=ids, num_segments=2).double(), exact, rtol=3e-7, atol=0)


def test_segments() -> None:
    x, mask = torch.randn(4, 9, dtype=torch.float64), torch.rand(4, 9) > 0.3
    mask[2] = False
    rows = torch.arange(4)[:, None]
    whitened = masked_whiten(x, mask, segments=rows, num_segments=4)
    for b in range(4):
        torch.testing.assert_close(whitened[b], masked_whiten_ref(x[b], mask[b]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(masked_whiten(x, mask, segments=rows), whitened, rtol=1e-12, atol=1e-12)
    assert masked_mean(x, mask, segments=rows).shape == (4,)


def with_gradient(function: Any, x: Tensor, mask: Tensor, upstream: Tensor, **of: Any) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf, mask, **of)
    return [y, torch.autograd.grad(y, leaf, upstream[: y.numel()].view(y.shape).to(y.dtype))[0]]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("segments", [0, 1, 5], ids=lambda n: f"segments={n}")
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_results_and_gradients(function: Any, segments: int, no_worse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments in no order, one of them empty, one masked."""
    x, mask, upstream = torch.randn(1500) + 0.5, torch.rand(1500) > 0.3, torch.randn(1500)
    of = {}
    if segments:
        ids = torch.randint(0, segments, (1500,))
        mask &= (ids != 1) | (segments == 1)
        of = {"segments": ids, "num_segments": segments + 1}
    ours = with_gradient(function, x, mask, upstream, **of)
    exact = with_gradient(function, x.double(), mask, upstream, **of)
    for each in (module, moments_module):
        monkeypatch.setattr(each, "uses_triton", lambda *tensors: False)
    no_worse(ours, with_gradient(function, x, mask, upstream, **of), exact)


def test_gradients_in_float64() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 5) > 0.3
    for function in FUNCTIONS.values():
        torch.autograd.gradcheck(lambda t, f=function: f(t, mask), (x,))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("segmented", [False, True], ids=["all", "segments"])
def test_masked_elements_may_hold_anything(segmented: bool, garbage: float) -> None:
    x, mask, upstream = torch.randn(60), torch.rand(60) > 0.3, torch.randn(60)
    of = {"segments": torch.arange(60) % 4, "num_segments": 4} if segmented else {}
    dirty = torch.where(mask, x, garbage)
    for function in FUNCTIONS.values():
        clean, ours = (with_gradient(function, each, mask, upstream, **of) for each in (x, dirty))
        for a, b in zip(clean, ours, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(ours[1][~mask], torch.zeros_like(ours[1][~mask]))


def test_degenerate_counts() -> None:
    one = torch.tensor([3.0, torch.nan])
    assert float(masked_var(one, torch.tensor([True, False]))) == 0.0
    assert masked_whiten(one, torch.tensor([True, False])).tolist() == [0.0, 0.0]
    none = torch.zeros(2, dtype=torch.bool)
    assert float(masked_mean(one, none)) == float(masked_var(one, none)) == 0.0
    assert masked_whiten(one, none).tolist() == [0.0, 0.0]
    empty = torch.zeros(0, requires_grad=True)
    assert masked_whiten(empty).shape == (0,)
    assert torch.autograd.grad(masked_mean(empty), empty)[0].shape == (0,)
    assert masked_mean(torch.zeros(0), segments=torch.zeros(0, dtype=torch.int64), num_segments=3).tolist() == [0] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    x, mask, upstream = (torch.randn(300) * 2 + 1).to(dtype), torch.rand(300) > 0.3, torch.randn(300)
    ours = with_gradient(masked_whiten, x, mask, upstream)
    exact = with_gradient(masked_whiten, x.double(), mask, upstream)
    assert [t.dtype for t in ours] == [torch.float32, dtype]
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_strided_inputs() -> None:
    x, mask = torch.randn(12, 8).T[::2], (torch.rand(12, 8) > 0.3).T[::2]
    ids = torch.randint(0, 3, (12,))
    ours = masked_whiten(x, mask, segments=ids, num_segments=3)
    dense = masked_whiten(x.contiguous(), mask.contiguous(), segments=ids.expand(x.shape), num_segments=3)
    assert torch.equal(ours, dense)


def test_same_bits_twice() -> None:
    x, ids, mask = torch.randn(5000), torch.randint(0, 7, (5000,)), torch.rand(5000) > 0.3
    for of in ({}, {"segments": ids, "num_segments": 7}):
        a, b = (with_gradient(masked_whiten, x, mask, x.sin(), **of) for _ in range(2))
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_a_segment_that_does_not_exist(path: str) -> None:
    x, ids = torch.randn(4), torch.tensor([0, 5, 1, -1])
    if path == "torch":
        with pytest.raises((RuntimeError, IndexError)):
            masked_whiten(x, segments=ids, num_segments=2)
    else:
        x.requires_grad_()
        whitened = masked_whiten(x, segments=ids, num_segments=2)
        assert whitened.isnan().tolist() == [False, True, False, True]
        assert torch.autograd.grad(whitened.sum(), x)[0].isnan().tolist() == [False, True, False, True]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_moments_of_shaped_gae_whiten_its_advantages(shift_mean: bool) -> None:
    bounds = torch.tensor([0, 5, 11], dtype=torch.int32)
    fields = torch.randn(3, 11, dtype=torch.float64)
    shaped = shaped_gae(torch.randn(2, dtype=torch.float64), *fields, bounds, kl_coef=0.1)
    mean, rstd = whitening(Moments(shaped.count, shaped.mean, shaped.m2), shift_mean=shift_mean)
    expected = masked_whiten(shaped.advantages, shift_mean=shift_mean)
    torch.testing.assert_close((shaped.advantages - mean) * rstd, expected, rtol=1e-9, atol=1e-12)


def test_compiles_in_one_graph() -> None:
    torch.compiler.reset()  # the other path's graph
    x, mask, ids = torch.randn(40), torch.rand(40) > 0.3, torch.randint(0, 4, (40,))

    def loss(x: Tensor) -> Tensor:
        x = x * 1.0
        per_segment = masked_whiten(x, mask, segments=ids, num_segments=4)
        return (masked_whiten(x, mask).sin() * per_segment).sum() + masked_var(x, mask)

    x.requires_grad_()
    expected = torch.autograd.grad(loss(x), x)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected, rtol=1e-6, atol=1e-6)


def test_custom_ops_are_sound(path: str) -> None:
    if path == "torch":
        pytest.skip("the torch path has no operator")
    x, mask, g = torch.randn(20), torch.rand(20) > 0.3, torch.randn(20)
    ids = torch.arange(20) % 2
    of, ops = moments_module.segments_of(x, ids, 2), torch.ops.ppomax
    for segments, order, bounds, size in ((None, None, None, 1), (ids, of.order, of.bounds, 2)):
        torch.library.opcheck(ops.whiten_moments.default, (x, mask, order, bounds, size))
        mean, rstd = torch.randn(size), torch.rand(size)
        torch.library.opcheck(ops.whiten_elements.default, (x, mask, segments, mean, rstd, mean.clone()))
        torch.library.opcheck(ops.whiten_backward.default, (x, g, mask, order, bounds, mean, rstd, True))


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole, mask = torch.randn(40, dtype=torch.float64), torch.rand(40) > 0.3
    rows = slice(0, 15) if rank == 0 else slice(15, 40)
    group = dist.group.WORLD
    for x, rtol in ((whole, 1e-10), (whole.float(), 1e-5)):
        local = masked_whiten(x[rows], mask[rows], group=group)
        torch.testing.assert_close(local, masked_whiten(x, mask)[rows], rtol=rtol, atol=rtol / 10)
        merged = whitening(moments(x[rows], mask[rows]), group=group)
        torch.testing.assert_close(merged, whitening(moments(x, mask)), rtol=rtol, atol=0)
    dist.destroy_process_group()


def test_over_two_processes(path: str, tmp_path: Path) -> None:
    if path == "torch":
        pytest.skip("the other run takes both paths: float64 always is torch's")
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match="mask has shape"):
        masked_whiten(torch.zeros(3), torch.ones(4))
