"""Follows every byte that operations allocate and free, on tensors without contents as on real ones.

On fake tensors the operations of `ppomax.kernels` are opened: their bodies run, on fake tensors too, so that the
workspaces inside them are seen. Where the host asks for a value, which is not there, it gets 1: an upstream gradient
of 1, rows that all count, a gradient norm that is finite. Asked which elements are not 0, it is told of none.

What torch's kernels for packed sequences allocate beside their results cannot be opened; it is counted by the sizes in
their source (`_attention_workspace`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..kernels.lm_head import TILE_COLUMNS, TILE_ELEMENTS

_aten = torch.ops.aten
_ASKS_FOR_A_VALUE = {_aten.item.default, _aten._local_scalar_dense.default, _aten.is_nonzero.default}
_LEAVES_AS_IT_IS = {_aten.resolve_conj.default, _aten.resolve_neg.default}  # a real tensor, which else turns fake
_HEADS = {"ppomax::linear_logprobs_forward", "ppomax::linear_ppo", "ppomax::linear_cross_entropy"}
_ROWS = TILE_ELEMENTS // TILE_COLUMNS  # of a chunk at most, in vocabularies of several tiles
_DEVICE = torch.ops.prim.device.default
_EMPTY = {_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default, _aten.empty_strided.default}
_ROW_BLOCK = 128  # rows of queries that the backward pass of attention keeps free behind each sequence
_PROCESSORS = 148  # of a B200; other GPUs have fewer
_LEFT_OPERAND = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_linear_pointwise": 0}  # of the matrix products


@dataclass
class Usage:
    """What a stretch of a program did."""

    parts: dict[str, int] = field(default_factory=dict)
    """Live bytes by tag when there were most of them"""
    apart: dict[str, int] = field(default_factory=dict)
    """The same when there were most of them beside gradients"""
    operations: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How many operations there were of each (FLOPs, bytes read and written)"""

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def flops(self) -> int:
        return sum(flops * count for (flops, _), count in self.operations.items())

    @property
    def traffic(self) -> int:
        return sum(traffic * count for (_, traffic), count in self.operations.items())


class LiveBytes(TorchDispatchMode):
    """Live bytes of storages that operations made inside this mode, each under the tag that was set then."""

    def __init__(self, launches: list[Any] | None = None, deterministic: bool = False) -> None:
        """`launches`: a recording (`kernels/gpu/launch.py`) of what custom operations would launch; `deterministic`:
        the run asks for such algorithms."""
        super().__init__()
        self.launches, self.deterministic = [] if launches is None else launches, deterministic
        self.closed = False
        """Custom operations stay closed: what they allocate inside is not seen"""
        self._pairs = self._cached = 0
        self.live = 0
        self.tag = "activations"
        self._usage = Usage()
        self._most = -1
        self._totals: Counter[str] = Counter()
        self._held: dict[int, tuple[str, int]] = {}
        """Of each storage that is there: tag and bytes"""
        self._events: list[tuple[int, int, str]] = []
        """(number of the storage, bytes: negative when freed, tag when made)"""
        self._numbers: dict[int, int] = {}
        self._retagged: dict[int, str] = {}
        self._made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # asked for all the time
            return args[0].fake_device
        if func in _LEAVES_AS_IT_IS and not isinstance(args[0], FakeTensor):
            return args[0]
        if func.is_view:
            return func(*args, **kwargs)
        fake = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        if fake and func in _ASKS_FOR_A_VALUE:
            return 1
        if fake and func is _aten.nonzero.default:
            return args[0].new_empty(0, args[0].dim(), dtype=torch.int64)
        own, before = fake and func.namespace == "ppomax" and not self.closed, len(self.launches)
        if fake and func is _aten.addmm.dtype_out:
            out = kwargs["out"]  # torch 2.11 takes the dtype for a factor where there is nothing to compute
        else:
            out = self._open(func, args, kwargs) if own else func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in results:
            self._note(x)
        if func._schema.name.endswith("varlen_attn_backward"):
            self._for_a_moment(_attention_workspace(args, self.deterministic))
        self._count(func, args, kwargs, results, self.launches[before:])
        del self.launches[before:]  # they hold their tensors
        return out

    def _open(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the body of a custom operation inside the mode; what it does not return was a workspace."""
        outer, self.tag = self.tag, "workspaces"
        try:
            with self:
                if _many_chunks(func, args):
                    return self._open_first_rows(func, args, outer)
                out = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        finally:
            self.tag = outer
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.retag(x, outer)
        return out

    def _open_first_rows(self, func: Any, args: Any, tag: str) -> Any:
        """As `_open`, of an LM head's operation: the body on its first rows, whose chunks are like all others, while
        what it returns for the other rows is there."""
        hidden, *head = args[:3]
        wants_hidden = any(isinstance(x, (list, tuple)) and x and x[0] is True for x in args)
        rest = torch.empty_like(hidden[_ROWS:]) if wants_hidden else None
        few = tree_map(lambda x: _first_rows(x, hidden.shape[0]), (hidden, *args[3:]))
        OPDEFS[func._schema.name]._init_fn(few[0], *head, *few[1:])
        del rest
        self.tag, self.closed = tag, True
        try:
            return func(*args)
        finally:
            self.closed = False

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._numbers:
            return
        self._made += 1
        self._numbers[key] = self._made
        self._event(self._made, storage.nbytes(), self.tag)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _for_a_moment(self, size: int) -> None:
        """A workspace that was there while an operation ran."""
        self._made += 1
        self._event(self._made, size, "workspaces")
        self._event(self._made, -size, "")

    def _freed(self, key: int, size: int) -> None:
        self._event(self._numbers.pop(key), -size, "")

    def _event(self, number: int, size: int, tag: str) -> None:
        self.live += size
        self._events.append((number, size, tag))

    def retag(self, x: Tensor, tag: str) -> None:
        """Count the storage of `x` under `tag`, from when it was made."""
        number = self._numbers.get(x.untyped_storage()._cdata)
        if number is not None:
            self._retagged[number] = tag

    def watch_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Count what becomes a gradient of the parameters under `gradients`."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._is_gradient)

    def _is_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.retag(parameter.grad, "gradients")

    def attended(self, pairs: int, cached: int) -> None:
        """Say what attention computes from now on: pairs of a query and a key that it sees, tokens in the cache."""
        self._pairs, self._cached = pairs, cached

    def _count(self, func: Any, args: Any, kwargs: Any, results: list[Tensor], launched: Sequence[Any]) -> None:
        if func in _EMPTY:
            return
        name = func._schema.name.split("::")[1]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        flops, read, written = 0, sum(map(_size, inputs)), sum(map(_size, results))
        if name in _LEFT_OPERAND and results:
            flops = 2 * results[0].numel() * args[_LEFT_OPERAND[name]].shape[-1]
        elif "varlen_attn" in name:
            q = args[1] if name.endswith("backward") else args[0]
            flops = (10 if name.endswith("backward") else 4) * self._pairs * q.shape[-2] * q.shape[-1]
        elif name == "paged_attention":
            q, pool = args[0], args[1]
            flops = 4 * self._pairs * q.shape[1] * q.shape[2]
            read = _size(q) + 2 * self._cached * pool.shape[2] * pool.shape[3] * pool.element_size()
        elif name == "write_kv":
            read = written = _size(args[0]) + _size(args[1])
        elif func.namespace == "ppomax" and launched:
            tensors = [x for launch in launched for x in launch.arguments.values() if isinstance(x, Tensor)]
            read = sum(map(_size, tensors))
            written = 0 if results else read
        self._usage.operations[flops, read + written] += 1

    @contextmanager
    def measured(self) -> Iterator[Usage]:
        """What happens inside, complete at the end of the block."""
        outer, self._usage, first = self._usage, Usage(), len(self._events)
        try:
            yield self._usage
        finally:
            self._usage.parts, self._usage.apart = self._parts_at_peaks(first)
            self._usage = outer

    def _parts_at_peaks(self, first: int) -> tuple[dict[str, int], dict[str, int]]:
        """Live bytes by tag at the peak since event `first`, and at that of all but gradients."""
        live: Counter[str] = Counter()
        tags: dict[int, str] = {}
        total, most, parts, most_apart, apart = 0, -1, {}, -1, {}
        for index, (number, size, tag) in enumerate(self._events):
            if tag:
                tags[number] = self._retagged.get(number, tag)
            live[tags[number]] += size
            total += size
            if index < first - 1:
                continue
            if total > most:
                most, parts = total, dict(live)
            if total - live["gradients"] > most_apart:
                most_apart, apart = total - live["gradients"], dict(live)
        return +Counter(parts), +Counter(apart)


def _many_chunks(func: Any, args: Any) -> bool:
    """Whether it is an LM head's operation that takes a CPU's large vocabulary tile by tile for many rows."""
    if func._schema.name not in _HEADS or args[0].device.type != "cpu":
        return False
    return args[0].shape[0] > _ROWS and args[1].shape[0] > TILE_COLUMNS


def _attention_workspace(args: Any, deterministic: bool) -> int:
    """Bytes that the backward pass of attention over packed sequences allocates beside its results: gradients of the
    queries added up in float32 (where the order is fixed, several copies of them), sums of a row in float32, and
    gradients of keys and values for each head of the queries where several share those.

    Source: `mha_varlen_bwd` in aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp of torch; that in
    csrc/flash_attn/flash_api.cpp of flash-attn 2 allocates the same for heads of up to 128.
    """
    _, q, k, _, _, _, bounds = args[:7]
    tokens, heads, size = q.shape
    sequences = bounds.numel() - 1
    rounded = _round(size, 32 if size <= 128 else 64)
    copies = -(-_PROCESSORS // (sequences * heads)) if deterministic else 1
    rows = tokens + _ROW_BLOCK * sequences
    expanded = 2 * k.shape[0] * heads * size * k.element_size() if k.shape[1] != heads else 0
    return 4 * rows * heads * (copies * rounded + 1) + expanded


def _round(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _first_rows(x: Any, count: int) -> Any:
    return x[:_ROWS] if isinstance(x, Tensor) and x.dim() and x.shape[0] == count else x


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()
