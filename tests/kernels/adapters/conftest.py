"""What the tests of the adapters share: ragged batches, the losses as loops over Python floats, peers' own modules."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

Rows = list[list[float]]


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Of a test's fields; where there is a GPU, new tensors are on it (and float32 takes the Triton path)."""
    torch.set_default_device("cuda" if torch.cuda.is_available() else None)
    yield request.param
    torch.set_default_device(None)


class Fields:
    """Per-token fields [B, T] in rows of several lengths, with gaps; `garbage` where masked, 0 without any."""

    def __init__(self, dtype: torch.dtype, b: int, t: int, garbage: float | None, gaps: bool, empty: bool) -> None:
        lengths = torch.randint(2, t + 1, (b, 1))
        self.mask = torch.arange(t) < lengths
        if gaps:
            self.mask &= torch.rand(b, t) > 0.25
        self.mask[:, 0] = True
        if empty:
            self.mask[-1] = False
        self.dtype, self.garbage = dtype, garbage
        logprobs = -0.01 - 3.0 * torch.rand(b, t)
        self.logprobs = self._made(logprobs)
        for name, spread in (("old_logprobs", 0.4), ("ref_logprobs", 0.4), ("rollout_logprobs", 0.3)):
            setattr(self, name, self._made((logprobs + spread * torch.randn(b, t)).clamp(max=-0.01)))
        values = torch.randn(b, t)
        self.values, self.returns = self._made(values), self._made(values + torch.randn(b, t))
        self.old_values = self._made(values + 0.3 * torch.randn(b, t))
        self.advantages, self.rewards, self.entropy = (self._made(torch.randn(b, t)) for _ in range(3))

    old_logprobs: Tensor
    ref_logprobs: Tensor
    rollout_logprobs: Tensor

    def _made(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x.to(self.dtype), 0.0 if self.garbage is None else self.garbage)

    def leaf(self, name: str) -> Tensor:
        """A field that takes gradients."""
        x: Tensor = getattr(self, name).clone().requires_grad_()
        return x

    def rows(self, name: str) -> Rows:
        """A field as Python floats."""
        rows: Rows = getattr(self, name).double().tolist()
        return rows

    @property
    def keep(self) -> list[list[bool]]:
        keep: list[list[bool]] = self.mask.tolist()
        return keep


@pytest.fixture
def fields(dtype: torch.dtype) -> Callable[..., Fields]:
    """fields(b=5, t=9, garbage=nan, gaps=True, empty=False)."""

    def build(
        b: int = 5, t: int = 9, garbage: float | None = math.nan, gaps: bool = True, empty: bool = False
    ) -> Fields:
        return Fields(dtype, b, t, garbage, gaps, empty)

    return build


@pytest.fixture
def same() -> Callable[..., None]:
    """same(x, exact): within `ulps` of x's dtype at the size of the exact result (statistics are float32).

    `peer` allows two ulps of float32: peers add 1e-8 to what they divide by, or divide counts in float32.
    """

    def check(x: Tensor | float, exact: Any, ulps: float = 32.0, peer: bool = False) -> None:
        got = torch.as_tensor(x).detach().cpu()
        want = torch.as_tensor(exact, dtype=torch.float64).detach().cpu()
        assert got.shape == want.shape
        eps = torch.finfo(got.dtype if got.is_floating_point() else torch.float32).eps
        if isinstance(x, float):
            eps = torch.finfo(torch.float32).eps
        size = float(want.abs().max()) if want.numel() else 0.0
        error = float((got.double() - want).abs().max()) if want.numel() else 0.0
        allowed = (ulps * eps + (2.4e-7 if peer else 0.0)) * size + 1e-30
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, at size {size:.3g}"

    return check


def clipped(
    new: float,
    old: float,
    advantage: float,
    low: float,
    high: float,
    dual: float | None = None,
    clamp: float | None = None,
    weight: float = 1.0,
) -> SimpleNamespace:
    """One token's clipped loss: term, its derivative by `new`, whether the range or the dual clip holds it."""
    log_ratio = new - old if clamp is None else max(-clamp, min(clamp, new - old))
    ratio = math.exp(log_ratio)
    held = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
    by_dual = dual is not None and advantage < 0 and ratio > dual
    used = ratio
    if held:
        used = 1 + high if advantage > 0 else 1 - low
    elif by_dual and dual is not None:
        used = dual
    flat = held or by_dual or log_ratio != new - old
    return SimpleNamespace(
        term=-advantage * used * weight,
        slope=0.0 if flat else -advantage * ratio * weight,
        held=float(held),
        dual=float(by_dual),
        ratio=ratio,
    )


def critic(value: float, old: float, target: float, clip: float | None, coef: float) -> SimpleNamespace:
    """One token's value loss: term, derivative by `value`, whether the clipped error is the larger."""
    error, slope, held = (value - target) ** 2, 2 * (value - target), 0.0
    if clip is not None:
        moved = old + max(-clip, min(clip, value - old))
        if (moved - target) ** 2 > error:
            error, held = (moved - target) ** 2, 1.0
            slope = 2 * (moved - target) if moved == value else 0.0
    return SimpleNamespace(term=coef * error, slope=coef * slope, held=held)


def discounted(
    rewards: Sequence[float], values: Sequence[float], keep: Sequence[bool] | None, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """One row's advantages and returns; kept tokens alone take part, or all without `keep`."""
    advantages, returns = [0.0] * len(values), [0.0] * len(values)
    following, carried = 0.0, 0.0
    for t in range(len(values) - 1, -1, -1):
        if keep is None or keep[t]:
            carried = rewards[t] + gamma * following - values[t] + gamma * lam * carried
            following = values[t]
            advantages[t], returns[t] = carried, carried + values[t]
    return advantages, returns


def whitened(x: Rows, keep: list[list[bool]], centred: bool = True) -> Rows:
    """Kept values less their mean over their standard deviation (n - 1), 0 elsewhere; with the mean unless centred."""
    kept = [v for row, flags in zip(x, keep, strict=True) for v, flag in zip(row, flags, strict=True) if flag]
    mean = sum(kept) / len(kept)
    var = sum((v - mean) ** 2 for v in kept) / (len(kept) - 1)
    scale, shift = 1 / math.sqrt(var + 1e-8), 0.0 if centred else mean
    return [
        [(v - mean) * scale + shift if flag else 0.0 for v, flag in zip(row, flags, strict=True)]
        for row, flags in zip(x, keep, strict=True)
    ]


def weights(keep: list[list[bool]], mode: str, total: float | None = None) -> Rows:
    """Each token's weight in a loss; `total` is the number of tokens or sequences to divide by, else that in `keep`."""
    counts = [sum(flags) for flags in keep]
    if total is None:
        total = {"token-mean": sum(counts), "token-sum": 1}.get(mode, sum(count > 0 for count in counts))
    own = mode == "seq-mean-token-mean"
    return [
        [float(flag) / (total * (count if own and count else 1)) for flag in flags]
        for flags, count in zip(keep, counts, strict=True)
    ]


def row_mean(row: Sequence[float], flags: Sequence[bool]) -> float:
    kept = [x for x, flag in zip(row, flags, strict=True) if flag]
    return sum(kept) / len(kept) if kept else 0.0


def mean(x: Rows, keep: list[list[bool]]) -> float:
    return row_mean([v for row in x for v in row], [flag for flags in keep for flag in flags])


def softmax_row(logits: Sequence[float], label: int, temperature: float = 1.0) -> SimpleNamespace:
    """One row's log-prob of a label, entropy, and their derivatives by the logits."""
    z = [x / temperature for x in logits]
    top = max(z)
    total = math.fsum(math.exp(x - top) for x in z)
    logp = [x - top - math.log(total) for x in z]
    p = [math.exp(x) for x in logp]
    entropy = -math.fsum(a * b for a, b in zip(p, logp, strict=True) if a > 0)
    return SimpleNamespace(
        logprob=logp[label],
        entropy=entropy,
        d_logprob=[(float(v == label) - p[v]) / temperature for v in range(len(z))],
        d_entropy=[-(p[v] * (logp[v] + entropy) if p[v] > 0 else 0.0) / temperature for v in range(len(z))],
    )


Tokens = list[list[SimpleNamespace | None]]


def tokens(f: Fields, function: Callable[..., SimpleNamespace], *names: str) -> Tokens:
    """`function` of each kept token's fields; None where masked."""
    rows = zip(*(f.rows(name) for name in names), f.keep, strict=True)
    return [[function(*x) if flag else None for *x, flag in zip(*row, strict=True)] for row in rows]


def total(by: Rows, of: Tokens) -> float:
    """The weighted sum of the tokens' terms."""
    return sum(w * t.term for row in zip(by, of, strict=True) for w, t in zip(*row, strict=True) if t)


def slopes(by: Rows, of: Tokens) -> Rows:
    """Its derivatives, 0 where masked."""
    return [[w * t.slope if t else 0.0 for w, t in zip(*row, strict=True)] for row in zip(by, of, strict=True)]


def share(of: Tokens, key: str) -> float:
    """Mean of a statistic over the kept tokens."""
    kept: list[float] = [getattr(t, key) for row in of for t in row if t]
    return sum(kept) / len(kept)


@pytest.fixture
def loops() -> SimpleNamespace:
    """The definitions above, derived from the papers and the peers' documentation."""
    functions = (clipped, critic, discounted, whitened, weights, row_mean, mean, softmax_row)
    functions += (tokens, total, slopes, share)
    return SimpleNamespace(**{function.__name__: function for function in functions})


@pytest.fixture
def fake_package(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """fake_package("a.b.c", name=value): a module of that name with those names, and its parents, for one test."""

    def build(name: str, **contents: Any) -> ModuleType:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            part = ".".join(parts[:i])
            if part not in sys.modules:
                module = ModuleType(part)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, part, module)
        vars(sys.modules[name]).update(contents)
        return sys.modules[name]

    return build


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """without_packages(name, **stubs): module `name` as its distribution ships it, its parent packages not run.

    For peers whose packages import what only a GPU machine has. The parents become empty shells; `stubs` are whole
    modules in the place of those that define nothing but types used in annotations.
    """
    before = set(sys.modules)

    def load(name: str, stubs: dict[str, dict[str, Any]] | None = None) -> ModuleType:
        top = name.partition(".")[0]
        spec = importlib.util.find_spec(top)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"{top} is not installed")
        root = next(iter(spec.submodule_search_locations))
        for module in [name, *(stubs or {})]:
            _shells(module, root)
        for module, contents in (stubs or {}).items():
            sys.modules[module] = ModuleType(module)
            vars(sys.modules[module]).update(contents)
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} is not importable: {error}")

    yield load
    for module in set(sys.modules) - before:
        if module.partition(".")[0] in ("openrlhf", "skyrl"):
            del sys.modules[module]


def _shells(name: str, root: str) -> None:
    """Empty packages in the place of the parents of module `name`."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        part = ".".join(parts[:i])
        if part not in sys.modules:
            spec = ModuleSpec(part, None, is_package=True)
            spec.submodule_search_locations = ["/".join([root, *parts[1:i]])]
            sys.modules[part] = importlib.util.module_from_spec(spec)


@pytest.fixture
def same_signature() -> Callable[..., None]:
    """same_signature(ours, theirs): the same parameters in the same order with the same defaults."""
    from inspect import Parameter, signature

    def parameters(function: Any) -> list[tuple[str, Any]]:
        return [
            (p.name, tuple(p.default) if isinstance(p.default, list) else p.default)
            for p in signature(function).parameters.values()
            if p.kind is not Parameter.VAR_KEYWORD
        ]

    def check(ours: Any, theirs: Any) -> None:
        assert parameters(ours) == parameters(theirs)

    return check
