"""Where the time of a program goes: spans of named parts, each without those inside it, and the operators in them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PREFIX = "span: "
OWN = {  # of this package's operations, by the start of the name
    "linear_": "LM head and its loss",
    "sampl": "sampling",
    "paged_attention": "attention",
    "write_kv": "attention",
    "attention": "attention",
    "adamw": "optimizer",
}
KINDS = {  # of torch's, by a part of the name
    "attention": ("scaled_dot_product", "varlen_attn", "flash_attn"),
    "optimizer": ("adamw", "Optimizer.step", "_foreach_"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "_linear_pointwise"),
    "autograd": ("autograd::engine", "Backward", "AccumulateGrad"),
    "CUDA graphs": ("cudaGraphLaunch",),
}
HOST, ELSE = "Python and waiting", "elementwise and others"


class Spans:
    """Seconds by name. A span's time is that outside of the spans inside it, so that all of them add up.

    On a GPU each span begins and ends with a synchronisation: what the host does beside the device in an undisturbed
    run is not beside it here.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.annotate = False
        """Also tell torch.profiler"""
        self._device = device
        self._inner: list[float] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronize(self._device)
        self._inner.append(0.0)
        started = time.perf_counter()
        if self.annotate:
            with torch.profiler.record_function(PREFIX + name):
                yield
                synchronize(self._device)
        else:
            yield
            synchronize(self._device)
        elapsed = time.perf_counter() - started
        self.seconds[name] += elapsed - self._inner.pop()
        if self._inner:
            self._inner[-1] += elapsed

    def around(self, owner: Any, method: str, name: str | Callable[..., str]) -> None:
        """Put a span around a method of one object; `name` may be told from its arguments."""
        function = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            with self(name if isinstance(name, str) else name(*args)):
                return function(*args, **options)

        object.__setattr__(owner, method, timed)


class Through:
    """Another object's attributes, where that object takes none of its own."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profiled(function: Callable[[], Any], spans: Spans) -> dict[str, dict[str, float]]:
    """Seconds of each kind of operator in each span of a call, on a GPU as the device counts them.

    A span's kinds add up to its time: `HOST` is what no operator accounts for.
    """
    on_gpu = spans._device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    spans.annotate = True
    try:
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            function()
    finally:
        spans.annotate = False
    return by_span(list(profile.events()), on_gpu=on_gpu)


def by_span(events: list[Any], *, on_gpu: bool) -> dict[str, dict[str, float]]:
    """Of a profile's events."""
    events = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    out: dict[str, defaultdict[str, float]] = {}
    open_spans: list[tuple[float, str]] = []  # (end, name)
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        while open_spans and event.time_range.start >= open_spans[-1][0]:
            open_spans.pop()
        if event.name.startswith(PREFIX):
            name = event.name.removeprefix(PREFIX)
            own = event.time_range.elapsed_us() * 1e-6
            if open_spans:
                out[open_spans[-1][1]][HOST] -= own
            out.setdefault(name, defaultdict(float))[HOST] += own
            open_spans.append((event.time_range.end, name))
        elif open_spans:
            used = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) * 1e-6
            out[open_spans[-1][1]][kind(event)] += used
            out[open_spans[-1][1]][HOST] -= used
    largest_first = {name: sorted(kinds.items(), key=lambda item: -item[1]) for name, kinds in out.items()}
    return {name: {kind: used for kind, used in kinds if used > 0} for name, kinds in largest_first.items()}


def kind(event: Any) -> str:
    """What an operator is part of: the operation of this package around it, else by its own name."""
    outer = event
    while outer is not None:
        if outer.name.startswith("ppomax::"):
            own = outer.name.removeprefix("ppomax::")
            return next((k for start, k in OWN.items() if own.startswith(start)), "other kernels of ours")
        outer = outer.cpu_parent
    return next((k for k, parts in KINDS.items() if any(part in event.name for part in parts)), ELSE)
