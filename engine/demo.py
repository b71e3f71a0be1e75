"""`ppomax demo`: the whole job on a small world whose truth is known, on a CPU, in minutes.

Dialogues are generated (`world.py`), a tokenizer and a model of 0.4 million parameters are trained on them, then
SFT -> reward model -> critic pre-training -> PPO, and the result is judged on held-out prompts by the learned reward
and by the gold preference, which the world knows exactly. All of it goes through the same functions and files as a
run on real data.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from .config import (
    EvalConfig,
    OptimConfig,
    PPOConfig,
    RewardModelConfig,
    RolloutConfig,
    RuntimeConfig,
    ScheduleConfig,
    SFTConfig,
)
from .errors import InputError
from .evaluation import Evaluation, evaluate
from .metrics import console
from .models import load_tokenizer
from .presets import preset
from .report import plot_curves, show_evaluation
from .reward_model import train_reward_model
from .rewards import Source
from .sft import train_sft
from .templates import Template
from .trainer import PPOTrainer
from .world import World

Arm = Literal["ppo-max", "vanilla"]

GOLD = "ppomax.engine.world:gold_rewards"
MAX_SEQUENCE = 112
SAMPLES = 8
ROLLOUT = RolloutConfig(max_response=48, temperature=1.0, top_p=1.0, repetition_penalty=1.0, max_running=128)


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demonstration. It has its own settings: those of 7B models do not suit a tiny one."""

    seed: int = 0
    sft_dialogues: int = 6000
    pairs: int = 12000
    prompts: int = 4000
    held_out_prompts: int = 256
    vocab_size: int = 512
    sft_steps: int = 480
    rm_steps: int = 450
    iterations: int = 40
    rollouts: int = 128
    eval_every: int = 10

    @property
    def runtime(self) -> RuntimeConfig:
        # One thread: matrices of this size gain little from a second one, and a busy machine punishes it.
        return RuntimeConfig(device="cpu", seed=self.seed, save_every=10**6)

    @property
    def sft(self) -> SFTConfig:
        return SFTConfig(
            epochs=1000,
            max_steps=self.sft_steps,
            max_sequence=MAX_SEQUENCE,
            vocab_size=self.vocab_size,
            optim=OptimConfig(lr=3e-3, schedule=ScheduleConfig("cosine", warmup=0.05, floor=0.1)),
            runtime=self.runtime,
        )

    @property
    def reward_model(self) -> RewardModelConfig:
        return RewardModelConfig(
            max_steps=self.rm_steps,
            batch_size=32,
            max_sequence=MAX_SEQUENCE,
            imitation_coef=0.1,
            optim=OptimConfig(lr=1e-3, schedule=ScheduleConfig("cosine", warmup=0.1, floor=0.1)),
            runtime=self.runtime,
        )

    def ppo(self, arm: Arm) -> PPOConfig:
        """The paper's preset with the learning rates, sampling and penalty of a tiny model."""
        common = {
            "iterations": self.iterations,
            "rollouts_per_iteration": self.rollouts,
            "minibatch_size": self.rollouts // 4,
            "gae_lambda": 0.95,
            "eval_every": self.eval_every,
            "policy_optim.lr": 5e-4,
            "critic_optim.lr": 1e-3,
        }
        ppo_max = {"kl_coef": 0.1, "reward.clip": 0.8, "ptx_coef": 0.05, "ptx_batch_size": self.rollouts // 4,
                   "critic_pretrain_iterations": 4}  # fmt: skip
        config = preset(arm, **common, **(ppo_max if arm == "ppo-max" else {}))
        return replace(config, max_sequence=MAX_SEQUENCE, rollout=ROLLOUT, runtime=self.runtime)

    @property
    def evaluation(self) -> EvalConfig:
        return EvalConfig(
            max_prompts=self.held_out_prompts, max_sequence=MAX_SEQUENCE, rollout=ROLLOUT, runtime=self.runtime
        )


def run_demo(
    config: DemoConfig, arms: Sequence[Arm] = ("ppo-max",), out: str | Path | None = None
) -> dict[str, Evaluation]:
    """Run the demonstration into `out` (default: a new folder runs/demo, runs/demo-2, ...).

    Args:
        arms: one, or both: side by side in two processes.

    Returns:
        arm -> its policy beside the SFT model on held-out prompts.
    """
    RuntimeConfig(seed=config.seed)  # one that cannot be is an error before anything is written
    folder = _new_folder(out)
    threads, started = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(1)
    try:
        sizes = {"sft": config.sft_dialogues, "pairs": config.pairs, "prompts": config.prompts,
                 "held_out": config.held_out_prompts}  # fmt: skip
        files = World(config.seed).write_files(folder / "data", sizes)
        console.print(f"[bold]ppomax demo[/] in {folder}: {sum(sizes.values())} records of a generated world")
        train_sft(config.sft, model="builtin:tiny", data=[files["sft"]], out=folder / "sft")
        train_reward_model(config.reward_model, model=folder / "sft", data=[files["pairs"]], out=folder / "rm")
        _train_arms(config, arms, folder, files)
        evaluations: dict[str, Evaluation] = {arm: _evaluate(config, arm, folder, files) for arm in arms}
        _report(config, folder, evaluations, time.monotonic() - started)
    finally:
        torch.set_num_threads(threads)
    return evaluations


def _new_folder(out: str | Path | None) -> Path:
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} is not empty: choose another --out")
        return folder
    candidates = (Path("runs") / (f"demo-{number}" if number > 1 else "demo") for number in range(1, 10**6))
    return next(folder for folder in candidates if not folder.exists())


def _train_arms(config: DemoConfig, arms: Sequence[Arm], folder: Path, files: Mapping[str, Path]) -> None:
    if len(arms) == 1:
        _train_arm(config, arms[0], folder, files)
        return
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_train_arm, args=(config, arm, folder, files, True)) for arm in arms]
    for worker in workers:
        worker.start()
    try:
        for worker, arm in zip(workers, arms, strict=True):
            worker.join()
            if worker.exitcode:
                raise InputError(f"training {arm} ended with exit code {worker.exitcode}, see its error above")
    finally:
        for worker in workers:
            worker.terminate()


def _train_arm(
    config: DemoConfig, arm: Arm, folder: Path, files: Mapping[str, Path], side_by_side: bool = False
) -> None:
    torch.set_num_threads(1)
    trainer = PPOTrainer(
        config.ppo(arm),
        policy=folder / "sft",
        reward=folder / "rm",
        prompts=files["prompts"],
        ptx=files["sft"],
        eval_prompts=files["held_out"],
        judge=GOLD,
        out=folder / arm,
    )
    trainer.train(name=arm, plain=side_by_side)


def _evaluate(config: DemoConfig, arm: Arm, folder: Path, files: Mapping[str, Path]) -> Evaluation:
    judges: dict[str, Source] = {"learned reward": folder / "rm", "gold": GOLD}
    return evaluate(folder / arm, folder / "sft", files["held_out"], judges, config.evaluation)


def _report(config: DemoConfig, folder: Path, evaluations: Mapping[str, Evaluation], seconds: float) -> None:
    """Table, samples and curves: in the terminal and under `folder`."""
    template = Template(load_tokenizer(folder / "sft"))
    show_evaluation("SFT", evaluations, template, SAMPLES, folder / "report.md", figure="curves.png")
    plot_curves({arm: folder / arm for arm in evaluations}, folder / "curves.png")
    console.print(f"{seconds:.0f} s. Report: {folder}/report.md, curves: {folder}/curves.png")
