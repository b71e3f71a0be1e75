"""What the tests of the kernels share: error against error, poisoned memory, an LM head's inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def drawn_on_cpu(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.randn` and its kin for the default device: a test finds the same on any, but for what the device does."""

    def drawn(*args: Any, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        return draw(*args, **kwargs, device="cpu").to(torch.get_default_device()).requires_grad_(requires_grad)

    return drawn


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test on the torch path, and on the Triton path: on the GPU where there is one (new tensors are on it
    then, with the numbers that a CPU draws), else in Triton's interpreter."""
    if request.param == "torch":
        yield "torch"
    elif torch.cuda.is_available():
        torch.set_default_device("cuda")
        for name in ("rand", "randn", "randint", "randperm"):
            monkeypatch.setattr(torch, name, drawn_on_cpu(getattr(torch, name)))
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
    """torch.empty and its kin return NaN (the largest integer where they hold integers, True where bools)."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            if x.is_floating_point():
                return x.fill_(torch.nan)
            return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 32 rows and tiles of 48 columns (64 in Triton), so that small inputs take several of each."""
    from ppomax.kernels import lm_head
    from ppomax.kernels.gpu.launch import overriding

    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 0)
    monkeypatch.setattr(lm_head, "MIN_ROWS", 32)
    monkeypatch.setattr(lm_head, "TILE_COLUMNS", 48)
    monkeypatch.setattr(lm_head, "TILE_ELEMENTS", 32 * 48)
    monkeypatch.setattr(lm_head, "GPU_CHUNK_BYTES", 0)
    monkeypatch.setattr(lm_head, "GPU_MIN_ROWS", 32)
    with overriding("linear_rows", {"BLOCK_V": 64, "num_warps": 1, "num_stages": 1}):
        yield


@pytest.fixture
def unseeing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of a device whose values the host cannot look at, run on a CPU."""
    from ppomax.kernels import head_gradient, kv_write, lm_head, logprobs, sampling, truncation

    for module in (head_gradient, kv_write, lm_head, logprobs, sampling, truncation):
        monkeypatch.setattr(module, "host_sees", lambda x: False)
    monkeypatch.setattr(lm_head, "GPU_CHUNK_BYTES", 0)
    monkeypatch.setattr(lm_head, "GPU_MIN_ROWS", 32)


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


class Tokens(dict[str, Tensor]):
    """Per-token fields of the PPO losses, [B, T], and a mask that leaves out a fifth of the tokens and the padding."""

    def __init__(self, lengths: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        b, t = len(lengths), max(lengths)
        self.present = torch.arange(t) < torch.tensor(lengths)[:, None]
        self.bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        self.mask = self.present & (torch.rand(b, t) > 0.2)
        noise = iter(0.4 * torch.randn(8, b, t, dtype=dtype))
        self["logprobs"] = -torch.rand(b, t, dtype=dtype) * 3
        self["old_logprobs"] = self["logprobs"] + next(noise)
        self["ref_logprobs"] = self["logprobs"] + next(noise)
        self["advantages"] = 0.7 + 2.5 * next(noise)
        self["importance_weights"] = torch.rand(b, t, dtype=dtype) * 2
        self["entropy"] = torch.rand(b, t, dtype=dtype) * 2
        self["values"] = 2.5 * next(noise)
        self["old_values"] = self["values"] + next(noise)
        self["returns"] = self["values"] + 2.5 * next(noise)

    def policy(self) -> list[Tensor]:
        return [self[name] for name in ("logprobs", "old_logprobs", "advantages")]

    def critic(self) -> list[Tensor]:
        return [self[name] for name in ("values", "old_values", "returns")]

    def options(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """`chosen` with the tensors that it asks for: importance_weights=True, an entropy or a KL coefficient."""
        used = {"importance_weights": "importance_weights", "entropy_coef": "entropy", "kl_coef": "ref_logprobs"}
        return {**chosen, **{name: self[name] for option, name in used.items() if chosen.get(option)}}

    def packed(self) -> Tokens:
        """The same tokens as [N]."""
        flat = self.but(**{name: x[self.present] for name, x in self.items()})
        flat.mask = self.mask[self.present]
        return flat

    def leaves(self, *names: str) -> Tokens:
        """A copy whose named fields require grad."""
        return self.but(**{name: self[name].detach().clone().requires_grad_() for name in names})

    def but(self, **fields: Tensor) -> Tokens:
        """A copy with other fields."""
        other = copy.copy(self)
        other.update(fields)
        return other


@pytest.fixture
def tokens() -> Callable[..., Tokens]:
    """tokens(lengths, dtype=torch.float32): a dict of per-token fields with `.mask`, `.bounds` and `.packed()`."""
    return lambda lengths, dtype=torch.float32: Tokens(lengths, dtype)
