"""The plan of a PPO run before it starts: memory by component and phase, batches, FLOPs, time, checkpoints.

Memory is counted, not estimated (`footprint.py`), except for what stands in no tensor: the CUDA context with its
libraries and graphs, `CUDA_RESERVE`; what the allocator cannot use between its blocks is not in it. With several GPUs
the sharding is a model: each keeps its part of weights, gradients and optimizer state, two decoder layers are whole at
a time, and what is outside the layers (embeddings, LM head) from the first micro-batch on. Models that are sharded or
offloaded arrive layer by layer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .communication import USUAL, Machines, Traffic, payloads, traffic
from .config import PPOConfig
from .costs import Batches, Work, phase_work, plan_batches, process_config, scored
from .errors import InputError
from .fake_models import JUDGES, Shapes
from .footprint import Footprint, Lengths, measure
from .hardware import GIB, Chip
from .kv_cache import blocks_for
from .lora import check_lora

CUDA_RESERVE = int(1.5 * GIB)
"""Context, cuBLAS workspaces, compiled kernels, CUDA graphs: a constant, nothing that is computed"""
DISK_RATE = 2e9
"""Bytes/s at which a checkpoint is taken to be written, as by one NVMe drive"""

PHASES = ("rollout", "score", "update policy", "update critic")
_USAGES = {
    "rollout": ("prefill", "decode"),
    "score": ("score policy", "score reference", "score critic", *(f"score {name}" for name in JUDGES)),
    "update policy": ("update policy", "step policy", "ptx"),
    "update critic": ("update critic", "step critic"),
}


@dataclass(frozen=True)
class Component:
    """Something that holds memory over more than one phase."""

    name: str
    bytes: int
    """Of one process"""
    phases: tuple[str, ...]
    """In which it is on the device"""
    on_host: bool
    """Waits in host memory in the others"""


@dataclass(frozen=True)
class Phase:
    """One phase of an iteration, of one process."""

    name: str
    resident: dict[str, int]
    """Bytes on the device at the peak, by component"""
    work: Work
    communication: float
    """Bytes that this process receives from others"""
    network: float
    """Bytes that pass its network adapter, towards all GPUs of its machine"""
    seconds: float | None
    """Of a model of the chip; None where its ceilings are not known"""
    bound: str
    """What takes so long: GPU (products and memory), links (to other GPUs of the machine), network (to other
    machines), host (the link to its memory)"""

    @property
    def peak(self) -> int:
        return sum(self.resident.values())


@dataclass(frozen=True)
class Checkpoint:
    """A resumable checkpoint; sizes of all processes together."""

    bytes: int
    policy: int
    """Of the policy's weights alone"""

    @property
    def seconds(self) -> float:
        """To write it at DISK_RATE."""
        return self.bytes / DISK_RATE


@dataclass(frozen=True)
class Plan:
    """What a run will take, if all sequences have the stated lengths."""

    config: PPOConfig
    chip: Chip
    gpus: int
    machines: Machines
    lengths: Lengths
    dtype: str
    parameters: dict[str, int]
    components: list[Component]
    phases: list[Phase]
    batches: Batches
    kv_tokens: int
    """That the KV cache of a process holds"""
    checkpoint: Checkpoint
    loading: int
    """Most bytes on the device of a process while the models are loaded"""
    arriving: int
    """Of them, what is whole for a moment beside the process's parts: of models that are sharded or offloaded"""

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def spare(self) -> int:
        """Bytes of the device that stay free at all times; negative: that are missing."""
        return self.chip.memory - self.most

    @property
    def most(self) -> int:
        """Bytes of a process at any time."""
        return max(self.peak, self.loading)

    @property
    def host(self) -> int:
        """Bytes in host memory, of one process."""
        return sum(component.bytes for component in self.components if component.on_host)

    @property
    def seconds(self) -> float | None:
        """Of an iteration."""
        times = [phase.seconds for phase in self.phases]
        return None if None in times else sum(time for time in times if time is not None)

    @property
    def needed(self) -> float:
        """FLOPs of an iteration that all processes together cannot do without."""
        return self.gpus * sum(phase.work.needed for phase in self.phases)

    @property
    def mfu(self) -> float | None:
        """Share of the vendor's peak that goes into needed FLOPs."""
        if self.seconds is None or self.chip.flops is None:
            return None
        return self.needed / (self.gpus * self.seconds * self.chip.flops)

    @property
    def tokens_per_second(self) -> float | None:
        """Prompt and response tokens of an iteration by its time."""
        return None if self.seconds is None else self.batches.rollouts * self.lengths.sequence / self.seconds

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data; bytes and seconds."""
        phases = [{**asdict(phase), "peak": phase.peak} for phase in self.phases]
        derived = {name: getattr(self, name) for name in ("peak", "fits", "spare", "host", "seconds", "needed", "mfu")}
        return {**asdict(self), "phases": phases, **derived, "tokens_per_second": self.tokens_per_second}


def plan(
    config: PPOConfig,
    shapes: Shapes,
    chip: Chip,
    *,
    lengths: Lengths,
    gpus: int = 1,
    machines: Machines = USUAL,
) -> Plan:
    """The plan of a run of `config` on `gpus` devices like `chip`, all sequences of the given lengths.

    Raises:
        InputError: lengths that `config` does not allow, fewer rollouts in a minibatch than GPUs, a number of GPUs
            that `shard_size` does not divide, machines without GPUs or a network, LoRA on several, float32 on a GPU,
            the exact mode.
    """
    _check(config, chip, lengths, gpus, machines)
    footprint = measure(process_config(config, gpus), shapes, lengths, on_gpu=chip.is_gpu)
    return _Planner(config, footprint, chip, lengths, gpus, machines).plan()


def _check(config: PPOConfig, chip: Chip, lengths: Lengths, gpus: int, machines: Machines) -> None:
    if not 1 <= lengths.response <= config.rollout.max_response:
        raise InputError(
            f"response tokens = {lengths.response}: expected 1 to rollout.max_response = {config.rollout.max_response}"
        )
    if not 1 <= lengths.prompt <= config.max_prompt:
        raise InputError(
            f"prompt tokens = {lengths.prompt}: expected 1 to {config.max_prompt}, which is max_sequence less "
            "rollout.max_response"
        )
    if not 1 <= gpus <= config.minibatch_size:
        raise InputError(f"GPUs = {gpus}: expected 1 to minibatch_size = {config.minibatch_size}")
    if gpus % _shards(config, gpus):
        raise InputError(
            f"RuntimeConfig.shard_size = {config.runtime.shard_size}: expected a divisor of the {gpus} GPUs"
        )
    if machines.gpus < 1:
        raise InputError(f"GPUs of a machine = {machines.gpus}: expected at least 1")
    if machines.network <= 0:
        raise InputError(f"network = {machines.network / 1e9:g} GB/s: expected more than 0")
    if config.runtime.exact:
        raise InputError("RuntimeConfig.exact = True: the exact mode is not planned")
    if chip.is_gpu and config.runtime.dtype == "float32":
        raise InputError("RuntimeConfig.dtype = 'float32': plans for a GPU are of bfloat16")
    if gpus > 1 and config.lora.rank:
        raise InputError(f"GPUs = {gpus}: expected 1 with LoRA")
    if config.lora.rank:
        check_lora(config.lora, critic="")


def _shards(config: PPOConfig, gpus: int) -> int:
    """Processes that share a copy of the weights."""
    return min(config.runtime.shard_size or gpus, gpus)


class _Planner:
    def __init__(
        self, config: PPOConfig, footprint: Footprint, chip: Chip, lengths: Lengths, gpus: int, machines: Machines
    ) -> None:
        self.config, self.footprint, self.chip, self.lengths = config, footprint, chip, lengths
        self.gpus, self.machines = gpus, machines
        self.shards = _shards(config, gpus)
        offloads = config.runtime.offload_frozen and chip.is_gpu
        frozen = JUDGES if config.lora.rank else ("reference", *JUDGES)  # adapters need their base
        self.offloaded = [name for name in frozen if name in footprint.weights] if offloads else []

    def plan(self) -> Plan:
        config, footprint, gpus = self.config, self.footprint, self.gpus
        blocks = self._blocks()
        per_sequence = blocks_for(self.lengths.sequence, config.rollout.block_size)
        running = min(footprint.running, (blocks - 1) // per_sequence)
        batches = plan_batches(config, footprint, self.lengths, gpus, running)
        components = self._components(blocks * footprint.kv_block)
        works = phase_work(config, footprint, self.lengths, batches, self.chip)
        traffics, arriving = self._traffics(batches), self._arriving()
        return Plan(
            config=config,
            chip=self.chip,
            gpus=gpus,
            machines=self.machines,
            lengths=self.lengths,
            dtype=footprint.dtype,
            parameters=footprint.parameters,
            components=components,
            phases=[self._phase(name, components, works[name], traffics[name], batches) for name in PHASES],
            batches=batches,
            kv_tokens=(blocks - 1) * config.rollout.block_size,
            checkpoint=self._checkpoint(),
            loading=sum(self._weights().values()) + arriving + self._reserve,
            arriving=arriving,
        )

    # Memory

    def _part(self, size: int) -> int:
        """What a process has of something sharded."""
        return -(-size // self.shards)

    def _blocks(self) -> int:
        """Of the KV cache, as `KVCache.for_model` counts them."""
        config, rollout = self.config, self.config.rollout
        longest = blocks_for(config.max_sequence, rollout.block_size)
        if rollout.kv_blocks is not None:
            blocks = rollout.kv_blocks
        elif self.chip.is_gpu:
            free = self.chip.memory - self._reserve - sum(self._weights().values())
            blocks = max(0, int(free * rollout.kv_memory)) // self.footprint.kv_block
        else:
            blocks = 1 + rollout.max_running * longest
        return max(blocks, longest + 1)  # fewer are an error when the run starts; what does not fit shows here

    @property
    def _reserve(self) -> int:
        return CUDA_RESERVE if self.chip.is_gpu else 0

    def _weights(self) -> dict[str, int]:
        """On the device all the time."""
        return {
            name: 0 if name in self.offloaded else self._part(size) for name, size in self.footprint.weights.items()
        }

    def _arriving(self) -> int:
        """Whole for a moment while models are loaded, with the process's part of it: a layer, or what is outside the
        layers."""
        sharded = list(self.footprint.weights) if self.gpus > 1 else self.offloaded
        pieces = [max(self.footprint.layer[name], self.footprint.sizes[name].rest) for name in sharded]
        most = max(pieces, default=0)
        return most + self._part(most)

    def _components(self, kv_cache: int) -> list[Component]:
        components, on_device = [], self._weights()
        for name, size in self.footprint.weights.items():
            waits = not on_device[name] and size > 0
            where = ("score",) if waits else PHASES
            components.append(Component(f"weights {name}", self._part(size), where, waits))
        for name, trained in self.footprint.trained.items():
            config = self.config.policy_optim if name == "policy" else self.config.critic_optim
            waits = config.offload and self.chip.is_gpu
            where = (f"update {name}",) if waits else PHASES
            for kind, size in (("low bits", trained.low_bits), ("moments", trained.moments)):
                if size:
                    components.append(Component(f"{kind} {name}", self._part(size), where, waits))
        asleep = self.config.rollout.sleep
        components.append(Component("KV cache", kv_cache, ("rollout",) if asleep else PHASES, False))
        components.append(Component("rollout buffers", self.footprint.buffers, PHASES, False))
        if self._reserve:
            components.append(Component("CUDA reserve", self._reserve, PHASES, False))
        return components

    def _phase(self, name: str, components: list[Component], work: Work, moved: Traffic, batches: Batches) -> Phase:
        resident = {c.name: c.bytes for c in components if name in c.phases}
        if name == "score":
            for model in self.offloaded:
                resident.pop(f"weights {model}", None)
        usages = [usage for usage in _USAGES[name] if usage in self.footprint.usage]
        candidates = [parts for usage in usages for parts in self._transients(usage)]
        most = max(candidates, key=lambda parts: sum(parts.values()))
        seconds, bound = self._seconds(name, work, moved, batches)
        return Phase(
            name=name,
            resident={**resident, **{part: size for part, size in most.items() if size}},
            work=work,
            communication=moved.received,
            network=moved.network,
            seconds=seconds,
            bound=bound,
        )

    def _seconds(self, name: str, work: Work, moved: Traffic, batches: Batches) -> tuple[float | None, str]:
        """Of a phase, and what takes the longest in it."""
        link, host, network = self.chip.link, self.chip.host_link, self.machines.network
        if work.seconds is None or link is None or host is None:
            return work.seconds, ""
        others = "network" if moved.network / network > moved.inside / link else "links"
        times = {
            "GPU": work.seconds,
            others: moved.seconds(link, network),
            "host": self._from_host(name, batches) / host,
        }
        longest = max(times, key=lambda key: times[key])
        if name == "rollout":  # all weights are there before the first token
            return times["GPU"] + times[others], longest
        if name == "score" and self.gpus == 1:  # of each model all weights are there before the first batch
            return times["GPU"] + times["host"], longest
        return times[longest], longest  # copies of weights and gradients run beside the computation

    def _transients(self, usage: str) -> list[dict[str, int]]:
        """What one step of a phase may have at its peak beside the components."""
        candidates = self.footprint.transients(usage)
        model = usage.split()[-1]
        for parts in candidates:
            if self.gpus > 1:
                parts["gradients"] = self._part(parts["gradients"])
            if self.gpus > 1 or model in self.offloaded:
                parts["gathered"] = self._gathered(usage, model)
        return candidates

    def _gathered(self, usage: str, model: str) -> int:
        """Whole weights (and their gradients in float32, before they are summed) beside the sharded ones."""
        if usage in ("prefill", "decode"):
            return self.footprint.weights["policy"] - self._part(self.footprint.weights["policy"])
        if usage.startswith("step"):
            return 0
        if self.gpus == 1:
            return self.footprint.weights[model]
        name = "policy" if usage == "ptx" else model
        whole = 2 * self.footprint.layer[name] + self.footprint.sizes[name].rest
        gradients = 0 if usage.startswith("score") else 4 * whole // self.footprint.itemsize
        return whole + gradients

    # Communication

    def _traffics(self, batches: Batches) -> dict[str, Traffic]:
        """What each phase brings to a GPU from others."""
        steps, ptx = batches.optimizer_steps, batches.ptx_micro_batches
        updated = {"policy": steps * (batches.micro_batches + ptx), "critic": steps * batches.micro_batches}
        whole = payloads(self.footprint.sizes, scored(self.config, self.footprint, batches), updated)
        return {name: traffic(payload, self.gpus, self.shards, self.machines) for name, payload in whole.items()}

    def _from_host(self, name: str, batches: Batches) -> float:
        """Bytes between host and device in the busier direction."""
        if name == "score":
            passes = scored(self.config, self.footprint, batches)
            return sum(
                self._part(self.footprint.weights[m]) * (passes[m] if self.gpus > 1 else 1) for m in self.offloaded
            )
        if not name.startswith("update"):
            return 0.0
        model = name.split()[1]
        config = self.config.policy_optim if model == "policy" else self.config.critic_optim
        trained = self.footprint.trained[model]
        return self._part(trained.low_bits + trained.moments) * batches.optimizer_steps if config.offload else 0.0

    def _checkpoint(self) -> Checkpoint:
        footprint = self.footprint
        states = sum(t.low_bits + t.moments for t in footprint.trained.values())
        if self.config.lora.rank:
            weights = {name: t.parameters * footprint.itemsize for name, t in footprint.trained.items()}
        else:
            weights = footprint.weights
        return Checkpoint(weights["policy"] + weights["critic"] + states, weights["policy"])
