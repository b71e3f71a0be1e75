"""The plan of a run, shown when it starts, and beside it at the end what the run took."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch

from .communication import USUAL, Machines
from .config import PPOConfig
from .errors import first_line
from .fake_models import Shapes
from .footprint import Lengths
from .hardware import GIB, MIB, chip_of
from .memory import CUDA_RESERVE, PHASES, Plan, plan
from .metrics import console
from .plan import is_tight, unit_of, verdict
from .ppo import PPO
from .rewards import ModelReward, Reward

_TIMED = {"rollout": ("rollout",), "score": ("score",), "update": ("update policy", "update critic")}


class RunPlan:
    """What the main process of a run shows of its plan; the others show nothing."""

    def __init__(self, ppo: PPO, name: str) -> None:
        """`name`: of the run, which its lines begin with."""
        self.ppo, self.name, self.device = ppo, name, ppo.policy.device
        self.plan: Plan | None = None
        self.iterations: list[dict[str, float]] = []

    def show(self) -> None:
        """Plan the run with every sequence at its longest, and print that in a few lines."""
        if not self.ppo.ranks.is_main:
            return
        self._print(self._header())
        longest = max(len(prompt.tokens) for prompt in self.ppo.prompts)
        self.plan = self._planned(Lengths(longest, self.ppo.config.rollout.max_response))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for line in [] if self.plan is None else _summary(self.plan):
            self._print(line)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take note of an iteration."""
        wanted = {f"time/{name}" for name in _TIMED} | {"response/length_mean"}
        if wanted <= metrics.keys():
            self.iterations.append({name: metrics[name] for name in wanted})

    def compare(self) -> None:
        """Print what the run took beside what was planned."""
        if self.plan is None:
            return
        if self.device.type != "cuda":
            self._compare_resident(self.plan)
            return
        peak, planned = torch.cuda.max_memory_allocated(self.device), self.plan.peak - CUDA_RESERVE
        self._print(
            f"memory: {peak / GIB:.1f} GiB allocated at the peak, {planned / GIB:.1f} planned for sequences at their "
            f"longest ({peak / planned - 1:+.0%})"
        )
        if self.iterations:
            self._compare_times()

    def _compare_resident(self, planned: Plan) -> None:
        """A CPU has no count of tensors' bytes, and its ceilings are not known."""
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self._print(
            f"memory: {planned.peak / MIB:,.0f} MiB of tensors planned; the process was at {peak / MIB:,.0f} at most, "
            "stages before this one, libraries and what the allocator keeps included"
        )

    def _compare_times(self) -> None:
        """Times of an iteration against a plan for the lengths that responses had."""
        prompts = [len(prompt.tokens) for prompt in self.ppo.prompts]
        response = _mean(entry["response/length_mean"] for entry in self.iterations)
        made = self._planned(Lengths(round(sum(prompts) / len(prompts)), max(1, round(response))))
        if made is None or made.seconds is None:
            return
        parts = []
        for name, phases in _TIMED.items():
            took = _mean(entry[f"time/{name}"] for entry in self.iterations)
            parts.append(f"{name} {took:.2f} s (model {sum(made.phase(p).seconds or 0 for p in phases):.2f})")
        self._print(f"an iteration: {', '.join(parts)}")

    def _planned(self, lengths: Lengths) -> Plan | None:
        """None, with the reason printed, where a model cannot be run on tensors without contents."""
        ppo = self.ppo
        try:
            reward, judge = _shape(ppo.reward), _shape(ppo.judge)
            shapes = Shapes.of(ppo.policy.config, ppo.critic.config, reward, None if judge is reward else judge)
            machines = Machines(int(os.environ.get("LOCAL_WORLD_SIZE", USUAL.gpus)))
            return plan(
                ppo.config, shapes, chip_of(self.device), lengths=lengths, gpus=ppo.ranks.size, machines=machines
            )
        except Exception as error:  # a plan is a convenience: no model is too unusual to be trained for want of one
            self._print(f"no plan of this run: {type(error).__name__}: {first_line(error)}")
            return None

    def _print(self, line: str) -> None:
        console.print(f"{self.name} {line}", soft_wrap=True, markup=False)

    def _header(self) -> str:
        config, policy, ranks = self.ppo.config, self.ppo.policy, self.ppo.ranks
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        several = f"{ranks.size} x " if ranks.size > 1 else ""
        versions = ", ".join(f"{package} {version(package)}" for package in ("ppomax", "torch", "transformers"))
        dtype = str(policy.model.dtype).removeprefix("torch.")
        return f"on {several}{name}, {dtype}, attention {policy.placement.attention}{_options(config)}; {versions}"


def _shape(reward: Reward | None) -> Any:
    """The configuration of a reward model; None where there is no model. Of one model it is one object."""
    return reward.model.config if isinstance(reward, ModelReward) else None


def _options(config: PPOConfig) -> str:
    """What else was chosen of how layers run."""
    runtime = config.runtime
    chosen = {
        f"checkpointing {runtime.checkpointing}": runtime.checkpointing != "none",
        "compiled layers": runtime.compile,
        "Liger": runtime.liger,
        f"LoRA of rank {config.lora.rank}": config.lora.rank > 0,
    }
    return "".join(f", {name}" for name, is_on in chosen.items() if is_on)


def _summary(made: Plan) -> list[str]:
    batches, config = made.batches, made.config
    unit = unit_of(made)
    peaks = ", ".join(f"{name} {made.phase(name).peak / unit.bytes:.1f}" for name in PHASES)
    end = f": {verdict(made)}" if is_tight(made) else ""
    if not made.fits:
        end = f": MORE THAN THE {made.chip.memory / unit.bytes:.1f} THERE ARE (see ppomax plan)"
    lines = [
        f"plan: {batches.rollouts} rollouts, {batches.running} sampled at a time; {batches.minibatches} minibatches of "
        f"{config.minibatch_size}, a process's part in {batches.micro_batches} micro-batches of {batches.micro_batch}",
        f"plan: {unit.name} of tensors, sequences at their longest: {peaks}{end}",
    ]
    if made.seconds is not None and made.mfu is not None:
        lines.append(f"plan: {made.seconds:.1f} s an iteration at the longest (a model), MFU {made.mfu:.0%}")
    return lines


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
