"""The loop that the two supervised stages share: step, measure, log, save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from .config import RuntimeConfig
from .metrics import StageProgress, console, pick
from .models import Model
from .runs import RunFolder


class Trainee(Protocol):
    """One stage's model, data and optimizer."""

    name: str
    total_steps: int
    eval_every: int
    tokenizer: PreTrainedTokenizerBase

    @property
    def shown(self) -> Sequence[str]:
        """Names of the metrics that stand beside the progress bar."""

    @property
    def models(self) -> Mapping[str, Model]:
        """What a checkpoint holds as model folders."""

    def step(self) -> dict[str, float]:
        """One optimizer step; its metrics."""

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out data."""

    def state_dict(self) -> dict[str, Any]:
        """All else that a run needs to go on."""


def train(run: RunFolder, trainee: Trainee, runtime: RuntimeConfig, *, start: int = 0) -> None:
    """Train from step `start` to the end."""
    log = run.log(trainee.name, after=start)
    held_out: dict[str, float] = {}
    shown: dict[str, float] = {}
    try:
        with StageProgress(trainee.name, trainee.total_steps, done=start) as progress:
            for step in range(start + 1, trainee.total_steps + 1):
                metrics = trainee.step()
                last = step == trainee.total_steps
                if last or step % trainee.eval_every == 0:
                    held_out = trainee.evaluate()
                    metrics |= held_out
                log.write(step, metrics)
                shown |= pick(metrics, trainee.shown)
                progress.update(step, **shown)
                if last or step % runtime.save_every == 0:
                    run.save_checkpoint(
                        step, trainee.models, trainee.tokenizer, trainee.state_dict(), runtime.keep_checkpoints
                    )
    finally:
        log.close()
    if held_out:
        figures = ", ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in held_out.items())
        console.print(f"{trainee.name}: {figures}", soft_wrap=True)
