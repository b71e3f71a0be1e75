"""What the tests of the kernels share: error against error, poisoned memory, an LM head's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test on the torch path, and on the Triton path: on the GPU where there is one (new tensors are on it
    then), else in Triton's interpreter."""
    if request.param == "torch":
        yield "torch"
    elif torch.cuda.is_available():
        torch.set_default_device("cuda")
        yield "triton"
        torch.set_default_device(None)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        yield "triton"


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """no_worse(ours, plain, exact): our errors against float64 are at most twice those of plain torch, plus four ulps.

    An ulp is that of the result's dtype at the size of the exact result.
    """

    def check(ours: Tensors, plain: Tensors, exact: Tensors, k: float = 2.0) -> None:
        assert len(ours) == len(plain) == len(exact)
        for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
            assert a is not None
            assert b is not None
            assert c is not None
            assert a.shape == c.shape
            if not c.numel():
                continue
            ulp = torch.finfo(a.dtype).eps * float(c.detach().abs().max())
            allowed = k * _error(b, c) + 4 * ulp + 1e-12
            assert _error(a, c) <= allowed, f"result {i}: error {_error(a, c):.3g}, allowed {allowed:.3g}"

    return check


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x.detach().double() - exact.detach().double()).abs().max())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin return NaN (the largest integer where they hold integers)."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 rows and tiles of 48 columns, so that small inputs take several of each."""
    from ppomax.kernels import lm_head

    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 0)
    monkeypatch.setattr(lm_head, "MIN_ROWS", 32)
    monkeypatch.setattr(lm_head, "TILE_COLUMNS", 48)
    monkeypatch.setattr(lm_head, "TILE_ELEMENTS", 32 * 48)


@pytest.fixture
def unseeing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of a device whose values the host cannot look at, run on a CPU."""
    from ppomax.kernels import head_gradient, kv_write, lm_head, logprobs, sampling

    for module in (head_gradient, kv_write, lm_head, logprobs, sampling):
        monkeypatch.setattr(module, "host_sees", lambda x: False)
    monkeypatch.setattr(lm_head, "CUDA_CHUNK_BYTES", 0)
    monkeypatch.setattr(lm_head, "CUDA_MIN_ROWS", 32)


@pytest.fixture
def head_inputs() -> Callable[..., Any]:
    """head_inputs(n, h, v, dtype, scale): hidden, weight, bias that require grad, and labels."""

    def build(
        n: int, h: int, v: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden = torch.randn(n, h).to(dtype).requires_grad_()
        weight = (torch.randn(v, h) * scale / h**0.5).to(dtype).requires_grad_()
        bias = torch.randn(v).to(dtype).requires_grad_()
        return hidden, weight, bias, torch.randint(0, v, (n,))

    return build
