"""Supervised fine-tuning: cross-entropy on assistant tokens, packed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .batch import pack
from .builtin import is_builtin, new_model, train_tokenizer
from .checkpoint import load_state, save_model
from .config import SFTConfig
from .data import Dialogue, OnBad, ShuffledStream, read_dialogues, split_by_context
from .models import CausalModel, Model, Placement, check_vocabulary, load_policy, load_tokenizer
from .optim import Optimizer
from .parallel import ALONE, Ranks
from .runs import Inputs, RunFolder
from .supervised import train
from .templates import Encoded, Style, Template, encode_all


def train_sft(
    config: SFTConfig,
    *,
    model: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    template: Style = "auto",
    on_bad: OnBad = "raise",
    overwrite: bool = False,
) -> Path:
    """Fine-tune `model` (a Hugging Face folder, or `builtin:NAME`) on dialogues; returns `out`, a model folder.

    Raises InputError for unusable data, models or folders, before anything is written.
    """
    inputs: Inputs = {
        "model": str(model), "data": [str(path) for path in data], "template": template, "on_bad": on_bad
    }  # fmt: skip
    ranks = Ranks.of(config.runtime)
    dialogues = read_dialogues(inputs["data"], inputs["on_bad"])
    policy, tokenizer = _starting_point(config, inputs, dialogues, ranks)
    trainee = _SFT(config, policy, tokenizer, template, on_bad, dialogues, ranks)
    run = RunFolder.create(out, "sft", inputs, config, overwrite=overwrite, ranks=ranks)
    return _finish(run, trainee, start=0)


def resume_sft(folder: str | Path) -> Path:
    """Continue the run in `folder` from its newest checkpoint, bit for bit on a CPU."""
    run = RunFolder.open(folder)
    inputs, config = run.inputs("sft"), run.config(SFTConfig)
    checkpoint = run.latest_checkpoint()
    run = replace(run, ranks=Ranks.of(config.runtime))
    policy = load_policy(checkpoint / "policy", run.ranks.placement(Placement.of(config.runtime)))
    dialogues = read_dialogues(inputs["data"], inputs["on_bad"])
    trainee = _SFT(
        config, policy, load_tokenizer(checkpoint / "policy"), inputs["template"], inputs["on_bad"], dialogues,
        run.ranks,
    )  # fmt: skip
    state = load_state(checkpoint)
    trainee.load_state_dict(state)
    return _finish(run, trainee, start=state["step"])


def _finish(run: RunFolder, trainee: _SFT, start: int) -> Path:
    train(run, trainee, trainee.config.runtime, start=start)
    save_model(trainee.policy, trainee.tokenizer, run.path, write=run.ranks.is_main)
    return run.path


def _starting_point(
    config: SFTConfig, inputs: Inputs, dialogues: Sequence[Dialogue], ranks: Ranks
) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    placement = Placement.of(config.runtime)
    name = inputs["model"]
    if is_builtin(name):
        texts = (f"{turn.role}: {turn.content}" for dialogue in dialogues for turn in dialogue.turns)
        tokenizer = train_tokenizer(texts, config.vocab_size)
        return new_model(name, tokenizer, placement, config.runtime.seed), tokenizer
    tokenizer = load_tokenizer(name)
    policy = load_policy(name, ranks.placement(placement))
    check_vocabulary(tokenizer, policy, name)
    return policy, tokenizer


class _SFT:
    """The stage's state: model, data, optimizer."""

    name = "sft"
    shown = ("sft/loss", "sft/held_out_loss", "sft/held_out_ppl")

    def __init__(
        self,
        config: SFTConfig,
        policy: CausalModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Style,
        on_bad: OnBad,
        dialogues: Sequence[Dialogue],
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.policy, self.tokenizer, self.ranks = config, policy, tokenizer, ranks
        encode = partial(Template(tokenizer, template).encode_dialogue, limit=config.max_sequence)
        seen, held_out = split_by_context(dialogues, config.held_out, config.runtime.seed)
        self.dialogues = encode_all(encode, seen, on_bad)
        self.held_out = encode_all(encode, held_out, on_bad)
        self.stream = ShuffledStream(len(self.dialogues), config.runtime.seed)
        steps = config.epochs * math.ceil(len(self.dialogues) / config.batch_size)
        self.total_steps = min(steps, config.max_steps or steps)
        self.eval_every = config.eval_every
        ranks.check_same("dialogues", (dialogue.tokens for dialogue in self.dialogues))
        ranks.check_same("held-out dialogues", (dialogue.tokens for dialogue in self.held_out))
        ranks.shard(policy)
        self.optimizer = Optimizer(policy, config.optim, self.total_steps, config.grad_clip)

    @property
    def models(self) -> Mapping[str, Model]:
        return {"policy": self.policy}

    def step(self) -> dict[str, float]:
        dialogues = [self.dialogues[index] for index in self.stream.take(self.config.batch_size)]
        loss = language_modelling_backward(self.policy, dialogues, self.config.micro_batch_tokens, ranks=self.ranks)
        step = self.optimizer.step()
        return {"sft/loss": float(loss), **{f"sft/{name}": float(value) for name, value in step.items()}}

    def evaluate(self) -> dict[str, float]:
        if not self.held_out:
            return {}
        with torch.no_grad():
            parts = language_modelling_losses(self.policy, self.held_out, self.config.micro_batch_tokens, self.ranks)
            loss = float(self.ranks.sum(torch.stack(list(parts)).sum()))
        return {"sft/held_out_loss": loss, "sft/held_out_ppl": math.exp(min(loss, 700.0))}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "position": self.stream.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.position = state["position"]


def language_modelling_losses(
    model: CausalModel, dialogues: Sequence[Encoded], micro_batch_tokens: int, ranks: Ranks = ALONE
) -> Iterator[Tensor]:
    """Micro-batch by micro-batch, the parts whose sum, over all processes, is the mean CE of all learned tokens, nats
    per token."""
    total = sum(sum(dialogue.mask) for dialogue in dialogues)
    for group in ranks.micro_batches([len(dialogue.tokens) for dialogue in dialogues], micro_batch_tokens):
        batch = pack([dialogues[i].tokens for i in group], [dialogues[i].mask for i in group], model.device)
        yield model.cross_entropy(batch, total)


def language_modelling_backward(
    model: CausalModel,
    dialogues: Sequence[Encoded],
    micro_batch_tokens: int,
    coef: float = 1.0,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Add the gradient of `coef` * mean CE over the dialogues' learned tokens; returns the CE, nats per token."""
    parts = []
    for loss in language_modelling_losses(model, dialogues, micro_batch_tokens, ranks):
        (coef * loss).backward()
        parts.append(loss.detach())
    return ranks.sum(torch.stack(parts).sum())
