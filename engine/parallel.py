"""Several processes: FSDP2 under `torchrun`. One process is the same code with one rank.

What is where. Weights, gradients and optimizer state are sharded: of each decoder layer, and of what is outside the
layers, every process keeps its rows. With `RuntimeConfig.shard_size` so many neighbours share a copy of the weights,
and only gradients travel farther. Rollouts, lengths and per-token fields are small and the same everywhere. So each
process plans the whole batch by itself, knows its part of it, and computes what is global (advantages, moments,
denominators) from the same numbers as one process would. Micro-batches are of unequal size, but each process runs as
many of them as the others, some perhaps empty: every layer's communication finds its partners.
"""

from __future__ import annotations

import atexit
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from .batch import deal, pack, split_evenly
from .config import RuntimeConfig
from .errors import InputError, first_line
from .layers import decoder_layers
from .models import Placement
from .weights import arrive, only_dtype

T = TypeVar("T")
Stats = TypeVar("Stats", bound=NamedTuple)


class Ranks:
    """The processes that train together, and this one's place among them.

    All methods that communicate have to be called by all processes in the same order; with one process they hand back
    what they are given.
    """

    def __init__(self, rank: int = 0, size: int = 1, mesh: DeviceMesh | None = None, offloads: bool = False) -> None:
        self.rank, self.size, self.mesh = rank, size, mesh
        self.offloads = offloads
        """Frozen models wait in host memory"""
        self._whole: set[nn.Module] = set()

    @classmethod
    def of(cls, runtime: RuntimeConfig) -> Ranks:
        """Those that torchrun started; sets up their communication, by gloo on a CPU and NCCL on GPUs.

        Raises InputError where there is no GPU for this process.
        """
        from .metrics import console  # which saves files by means of what imports this module

        size = int(os.environ.get("WORLD_SIZE", "1"))
        on_gpu = runtime.device.startswith("cuda") or (runtime.device == "auto" and torch.cuda.is_available())
        offloads = runtime.offload_frozen and on_gpu
        if size == 1 and not offloads:
            return cls()
        if size > 1 and ":" in runtime.device:
            raise InputError(f"RuntimeConfig.device = {runtime.device!r}: expected no number with {size} processes")
        if not dist.is_initialized():
            _start(size, on_gpu, runtime.device)
            console.quiet = dist.get_rank() > 0
        mesh = _mesh("cuda" if on_gpu else "cpu", size, min(runtime.shard_size or size, size))
        return cls(dist.get_rank(), size, mesh, offloads)

    @property
    def is_main(self) -> bool:
        """Of all processes the one that writes and speaks."""
        return self.rank == 0

    def check_same(self, what: str, lists: Iterable[Sequence[int]]) -> None:
        """Raise InputError unless all processes hold the same lists: they would train on different things."""
        if self.size > 1:
            checksum = 0
            for each in lists:
                checksum = zlib.crc32(repr(list(each)).encode(), checksum)
            if len(set(self.gather([checksum]))) > 1:
                raise InputError(f"{what}: the processes have read different ones; all need the same files")

    # Who does what

    def share(self, weights: Sequence[int]) -> list[int]:
        """Indices of this process's part of things that are so heavy, in order."""
        return deal(weights, self.size)[self.rank]

    def micro_batches(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        """Indices of this process's sequences in micro-batches of at most `budget` tokens, as many as elsewhere."""
        return split_evenly(lengths, budget, self.size)[self.rank]

    # Communication

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def sum(self, x: Tensor) -> Tensor:
        """Over the processes; may overwrite `x`."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, in the order of the ranks; small things, they are pickled."""
        return self.gather_from(lambda: list(items))

    def gather_from(self, work: Callable[[], list[T]]) -> list[T]:
        """What `work` returns on each process, in the order of the ranks.

        Raises InputError on all processes where one of them did.
        """
        if self.size == 1:
            return work()
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, _outcome(work))
        return [item for part in parts for item in _value(part)]

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns where only the main process runs it; raises InputError on all where it did."""
        if self.size == 1:
            return work()
        outcome = [_outcome(work) if self.is_main else None]
        dist.broadcast_object_list(outcome, src=0)
        return _value(outcome[0])

    def gather_stats(self, stats: Sequence[Stats]) -> list[Stats]:
        """Named tuples of 0-dim tensors, as many on each process: those of all, in the order of the ranks."""
        if self.size == 1:
            return list(stats)
        own = torch.stack([torch.stack([x.to(one[0].dtype) for x in one]) for one in stats])
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return [type(stats[0])(*row.unbind()) for row in torch.cat(parts)]

    # Models

    def shards(self, *, frozen: bool = False) -> bool:
        """Whether `shard` does anything to a model."""
        return self.mesh is not None and (self.size > 1 or frozen)

    def placement(self, placement: Placement, *, frozen: bool = False) -> Placement:
        """For a model to be loaded: what `shard` will bring in is not read before."""
        return replace(placement, deferred=self.shards(frozen=frozen))

    def shard(self, model: Any, *, frozen: bool = False) -> None:
        """Leave this process its rows of the model's weights, or with `offloads` of a frozen one none on the GPU.

        Where these are deferred (`Placement`) they arrive here: of all models no more than one layer, or what is
        outside the layers, is whole at any time.

        From then on the methods that `model.entries` names, and `gathered`, are the ways to compute with it. Gradients
        are summed over the processes, in float32 where the weights are halves.
        """
        if not self.shards(frozen=frozen) or isinstance(model, FSDPModule):
            return
        device, place = model.device, model.placement
        dtype = place.dtype if place.deferred else only_dtype(model)
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32)),
            "offload_policy": _offload() if frozen and self.offloads else OffloadPolicy(),
        }
        for part in [*decoder_layers(model), model]:
            if place.deferred:
                arrive(part, device, dtype)
            fully_shard(part, **options)
        parts = _parts(model)
        for part, before in zip(parts, [parts[-1], *parts[:-1]], strict=True):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            # by itself it goes by what ran before: where a process has nothing to sample, other things than elsewhere
            part.set_modules_to_backward_prefetch([before])
        for name in model.entries:
            register_fsdp_forward_method(model, name)
            setattr(model, name, self._let_go(model, getattr(model, name)))
        model.home = device
        with torch.no_grad():  # the first forward pass tells the root from its layers
            getattr(model, model.entries[0])(pack([], [], device))
            if place.deferred:
                model.check_packing()

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Inside, each process has all weights of `model` and may run its layers by itself, as plain modules: FSDP2's
        hooks, which let streams wait for each other, would break a CUDA graph."""
        parts = _parts(model)
        hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
        for part in parts:
            part.unshard()
            part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
        self._whole.add(model)
        try:
            yield
        finally:
            self._whole.remove(model)
            for part, own in zip(parts, hooks, strict=True):
                part._forward_pre_hooks, part._forward_hooks = own
                part.reshard()

    def at_hand(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, one process by itself has an offloaded model on its GPU: copied once, not by layers for each pass."""
        return self.gathered(model) if self.size == 1 else nullcontext()

    def _let_go(self, model: Any, method: Callable[..., T]) -> Callable[..., T]:
        """FSDP2 keeps what is outside the layers after a forward pass, for its backward pass. Where none will come the
        weights would stay, and be found in place of the sharded ones by whoever saves or loads them."""

        @wraps(method)
        def call(*args: Any, **options: Any) -> T:
            result = method(*args, **options)
            if not torch.is_grad_enabled() and model not in self._whole:
                model.reshard()
            return result

        return call


ALONE = Ranks()


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are only at times in one place."""
    return isinstance(model, FSDPModule)


def _start(size: int, on_gpu: bool, device: str) -> None:
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if on_gpu:
        number = int(device.partition(":")[2] or os.environ.get("LOCAL_RANK", "0"))
        if number >= (there := torch.cuda.device_count()):
            raise InputError(f"no GPU of number {number}, which this process needs: this machine has {there}")
        torch.cuda.set_device(number)
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        try:
            dist.init_process_group(backend)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"WORLD_SIZE = {size}, but the processes do not meet ({first_line(error)})") from error
    atexit.register(dist.destroy_process_group)


def _offload() -> CPUOffloadPolicy:
    return CPUOffloadPolicy(pin_memory=torch.cuda.is_available())


def _mesh(device: str, size: int, shard_size: int) -> DeviceMesh:
    """Processes that share a copy of the weights are neighbours, as those of a machine are."""
    if size % shard_size:
        raise InputError(f"RuntimeConfig.shard_size = {shard_size}: expected a divisor of the {size} processes")
    if shard_size == size:
        return init_device_mesh(device, (size,))
    return init_device_mesh(device, (size // shard_size, shard_size), mesh_dim_names=("copy", "shard"))


def _outcome(work: Callable[[], Any]) -> tuple[Any, InputError | None]:
    try:
        return work(), None
    except InputError as error:
        return None, InputError(str(error))  # other classes of it may not survive the journey


def _value(outcome: Any) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value


def _parts(model: nn.Module) -> list[Any]:
    """What is sharded by itself, the root first."""
    return [part for part in model.modules() if isinstance(part, FSDPModule)]
