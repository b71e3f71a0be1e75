"""What a measured operation is: its providers, its exact results, its floor.

A provider is a function of the operation's inputs that returns its results, gradients included, and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import torch
from timing import relative_error, worst
from torch import Tensor

Inputs: TypeAlias = dict[str, Any]
Results: TypeAlias = Sequence[Tensor]
Provider: TypeAlias = Callable[..., Results]
Judged: TypeAlias = Callable[[Results], float]  # the error of a provider's results
Judge: TypeAlias = Callable[..., Judged]  # of the inputs
OURS = "ppomax"


class Absent(NamedTuple):
    """Stands for a provider that cannot run here."""

    reason: str


class Op(NamedTuple):
    """`bytes` and `flops` are the least that any version moves (each input read once, each output written once) and
    computes."""

    name: str
    shape: str
    inputs: Callable[[], Inputs]
    providers: dict[str, Provider | Absent]
    judge: Judge
    tolerance: float  # of the error that the judge finds
    bytes: float = 0.0
    flops: float = 0.0
    gate_ms: float | None = None  # what ours is held to on an H200
    gate_of: tuple[str, float] | None = None  # or this factor of ours in another operation
    least: int = 5  # rounds of samples, however long they take

    @property
    def title(self) -> str:
        return f"{self.name}, {self.shape}"


def peer(module: str, name: str) -> Any:
    """A function of another package; Absent where that cannot be imported here."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, RuntimeError, AttributeError) as failure:  # packages with lazy parts raise RuntimeError
        return Absent(str(failure).strip().splitlines()[0])


def on_gpu(function: Any, device: str) -> Any:
    return Absent("runs on a GPU alone") if device == "cpu" else function


def over(function: Any, make: Callable[[Any], Any]) -> Any:
    """make(function); Absent stays what it is."""
    return function if isinstance(function, Absent) else make(function)


def present(**providers: Any) -> dict[str, Any]:
    """Those that are not None; underscores of the names become spaces."""
    return {name.replace("_", " "): function for name, function in providers.items() if function is not None}


def compiled(function: Any, device: str) -> Any:
    """torch.compile of a function, on a GPU."""
    return torch.compile(function) if device == "cuda" else Absent("compiled on a GPU alone")


def with_gradients(function: Callable[..., Tensor], *names: str) -> Provider:
    """A provider of (loss, its gradients by the named inputs) from a function that returns the loss."""

    def run(**inputs: Any) -> Results:
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        loss = function(**{**inputs, **leaves})
        return loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))

    return run


def doubled(function: Provider) -> Provider:
    """The same function of inputs in float64."""

    def run(**inputs: Any) -> Results:
        wide = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
        return function(**wide)

    return run


def against(exact: Provider) -> Judge:
    """|result - exact| / |exact|, the worst of the results."""

    def judge(**inputs: Any) -> Judged:
        right = exact(**inputs)
        return lambda results: worst(relative_error(x, y) for x, y in zip(results, right, strict=True))

    return judge


def mapped(functions: dict[str, Any], make: Callable[[Any], Provider]) -> dict[str, Provider | Absent]:
    return {name: over(function, make) for name, function in functions.items()}


def bound(provider: Provider, inputs: Inputs) -> Callable[[], Results]:
    return lambda: provider(**inputs)


def copied(inputs: Inputs) -> Inputs:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
