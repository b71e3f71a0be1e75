"""Reward-model training: ranking loss with an imitation term (paper section 3.1).

    loss = mean over pairs of -log sigmoid(r(x, y_w) - r(x, y_l)) + beta_rm * CE(y_w)

r is read at the last token of a response; CE is the mean per token of the chosen response, through the LM head of the
same trunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..kernels.api import linear_cross_entropy
from .batch import PackedBatch, pack
from .checkpoint import load_state, save_model
from .config import RewardModelConfig
from .data import OnBad, Pair, ShuffledStream, read_pairs, split_by_context
from .metrics import console
from .models import (
    CausalModel,
    Model,
    Placement,
    ScalarModel,
    check_vocabulary,
    load_policy,
    load_tokenizer,
    scalar_from_causal,
)
from .optim import Optimizer
from .parallel import ALONE, Ranks
from .runs import Inputs, RunFolder
from .supervised import train
from .templates import Encoded, Style, Template, encode_all
from .tensors import fill

EncodedPair = tuple[Encoded, Encoded]

# Dynamic batches hold this many pairs, whatever their length (released code).
_FEWEST_PAIRS, _MOST_PAIRS = 4, 128


def train_reward_model(
    config: RewardModelConfig,
    *,
    model: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    template: Style = "auto",
    on_bad: OnBad = "raise",
    overwrite: bool = False,
) -> Path:
    """Train a reward model on pairs, starting from the language model in `model`; returns `out`, a model folder.

    The result is a sequence classifier with one label, which transformers and other tools load.

    Raises InputError for unusable data, models or folders, before anything is written.
    """
    inputs: Inputs = {
        "model": str(model), "data": [str(path) for path in data], "template": template, "on_bad": on_bad
    }  # fmt: skip
    ranks = Ranks.of(config.runtime)
    pairs = read_pairs(inputs["data"], inputs["on_bad"])
    tokenizer = load_tokenizer(model)
    causal = load_policy(model, ranks.placement(Placement.of(config.runtime)))
    check_vocabulary(tokenizer, causal, model)
    trainee = _RewardModel(config, causal, tokenizer, template, on_bad, pairs, ranks)
    run = RunFolder.create(out, "rm", inputs, config, overwrite=overwrite, ranks=ranks)
    return _finish(run, trainee, start=0)


def resume_reward_model(folder: str | Path) -> Path:
    """Continue the run in `folder` from its newest checkpoint, bit for bit on a CPU."""
    run = RunFolder.open(folder)
    inputs, config = run.inputs("rm"), run.config(RewardModelConfig)
    checkpoint = run.latest_checkpoint()
    run = replace(run, ranks=Ranks.of(config.runtime))
    causal = load_policy(checkpoint / "language_model", run.ranks.placement(Placement.of(config.runtime)))
    tokenizer = load_tokenizer(checkpoint / "language_model")
    trainee = _RewardModel(
        config, causal, tokenizer, inputs["template"], inputs["on_bad"],
        read_pairs(inputs["data"], inputs["on_bad"]), run.ranks,
    )  # fmt: skip
    state = load_state(checkpoint)
    trainee.load_state_dict(state)
    return _finish(run, trainee, start=state["step"])


def _finish(run: RunFolder, trainee: _RewardModel, start: int) -> Path:
    train(run, trainee, trainee.config.runtime, start=start)
    save_model(trainee.scalar, trainee.tokenizer, run.path, write=run.ranks.is_main)
    if trainee.tokenizer.pad_token_id in (None, trainee.tokenizer.eos_token_id):
        console.print(
            "note: this tokenizer has no padding token of its own; transformers' classifier then reads a score before "
            "the end token, not at it (ppomax reads it there)"
        )
    return run.path


class _TwoHeads(nn.Module):
    """A scalar head and an LM head on one trunk."""

    entries = ("margins", "losses", "check_packing")

    def __init__(self, causal: CausalModel, scalar: ScalarModel) -> None:
        super().__init__()
        self.scalar, self.causal = scalar, causal
        self.home = scalar.device

    @property
    def device(self) -> torch.device:
        return self.home

    @property
    def placement(self) -> Placement:
        return self.scalar.placement

    def check_packing(self) -> None:
        """As each of the two has it."""
        self.causal.check_packing()

    def losses(self, batch: PackedBatch, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ranking loss, accuracy and imitation loss of a micro-batch, as its parts of means over `pairs`."""
        hidden = self.scalar.hidden(batch)
        margins = self._margins(hidden, batch)
        ranking = -F.logsigmoid(margins).sum() / pairs
        accuracy = (margins > 0).sum() / pairs
        lengths = torch.tensor(batch.row_lengths, device=hidden.device)
        imitation = linear_cross_entropy(
            hidden.index_select(0, batch.rows),
            labels=batch.labels,
            row_weights=(1.0 / lengths.double()).repeat_interleave(lengths, output_size=batch.num_rows),
            normalizer=pairs,
            **self.causal.head,
        )
        return ranking, accuracy, imitation.loss

    def margins(self, batch: PackedBatch) -> Tensor:
        """Score of the chosen side less that of the rejected, of each pair."""
        return self._margins(self.scalar.hidden(batch), batch)

    def _margins(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        scores = self.scalar.read(hidden, batch.last)
        return scores[::2] - scores[1::2]


class _RewardModel:
    """The stage's state: one trunk under a scalar head and an LM head, data, optimizer."""

    name = "rm"
    shown = ("rm/ranking_loss", "rm/accuracy", "rm/held_out_accuracy")

    def __init__(
        self,
        config: RewardModelConfig,
        causal: CausalModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Style,
        on_bad: OnBad,
        pairs: Sequence[Pair],
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.causal, self.tokenizer, self.ranks = config, causal, tokenizer, ranks
        generator = torch.Generator().manual_seed(config.runtime.seed)
        width = causal.config.get_text_config().hidden_size
        self.scalar = scalar_from_causal(causal, std=(width + 1) ** -0.5, generator=generator)
        encode = partial(Template(tokenizer, template).encode_pair, limit=config.max_sequence)
        seen, held_out = split_by_context(pairs, config.held_out, config.runtime.seed)
        self.pairs = encode_all(encode, seen, on_bad)
        self.held_out = encode_all(encode, held_out, on_bad)
        self.stream = ShuffledStream(len(self.pairs), config.runtime.seed)
        self.total_steps, self.eval_every = config.max_steps, config.eval_every
        ranks.check_same("pairs", (side.tokens for pair in self.pairs for side in pair))
        ranks.check_same("held-out pairs", (side.tokens for pair in self.held_out for side in pair))
        self.heads = _TwoHeads(causal, self.scalar)
        ranks.shard(self.heads)
        self.optimizer = Optimizer(self.heads, config.optim, self.total_steps, config.grad_clip)

    @property
    def models(self) -> Mapping[str, Model]:
        return {"language_model": self.causal, "reward_model": self.scalar}

    def step(self) -> dict[str, float]:
        pairs, parts = self._next_pairs(), []
        for group in self._micro_batches(pairs):
            ranking, accuracy, imitation = self.heads.losses(_pack_pairs(group, self.heads.device), len(pairs))
            (ranking + self.config.imitation_coef * imitation).backward()
            parts.append(torch.stack([ranking.detach(), accuracy, imitation.detach()]))
        names = ("ranking_loss", "accuracy", "lm_loss")
        means = dict(zip(names, self.ranks.sum(torch.stack(parts).sum(0)).tolist(), strict=True))
        values = {**means, **self.optimizer.step(), "pairs": len(pairs)}
        return {f"rm/{name}": float(value) for name, value in values.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        if not self.held_out:
            return {}
        groups = self._micro_batches(self.held_out)
        parts = [self.heads.margins(_pack_pairs(group, self.heads.device)).tolist() for group in groups]
        margins = torch.tensor(self.ranks.gather([margin for part in parts for margin in part]))
        shorter = [len(chosen.tokens) - len(rejected.tokens) for chosen, rejected in self.held_out]
        return {
            "rm/held_out_accuracy": float((margins > 0).float().mean()),
            "rm/held_out_ranking_loss": float(-F.logsigmoid(margins).mean()),
            # A baseline that has learned nothing but a length: ties count half.
            "rm/held_out_shorter_wins": sum((d < 0) + 0.5 * (d == 0) for d in shorter) / len(shorter),
        }

    def _next_pairs(self) -> list[EncodedPair]:
        if self.config.batch_size is not None:
            return [self.pairs[index] for index in self.stream.take(self.config.batch_size)]
        pairs: list[EncodedPair] = []
        tokens = 0
        while len(pairs) < _FEWEST_PAIRS or (len(pairs) < _MOST_PAIRS and tokens < self.config.batch_tokens):
            pairs.append(self.pairs[self.stream.take(1)[0]])
            tokens += _length(pairs[-1])
        return pairs

    def _micro_batches(self, pairs: Sequence[EncodedPair]) -> Iterator[list[EncodedPair]]:
        for group in self.ranks.micro_batches(list(map(_length, pairs)), self.config.micro_batch_tokens):
            yield [pairs[index] for index in group]

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "position": self.stream.position,
            "head": self.scalar.model.score.weight.detach(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.position = state["position"]
        with torch.no_grad():
            fill(self.scalar.model.score.weight, state["head"])


def _pack_pairs(pairs: Sequence[EncodedPair], device: torch.device) -> PackedBatch:
    """chosen, rejected, chosen, rejected, ...; only the chosen responses are learned."""
    tokens = [side.tokens for pair in pairs for side in pair]
    masks = [mask for chosen, rejected in pairs for mask in (chosen.mask, [False] * len(rejected.mask))]
    return pack(tokens, masks, device)


def _length(pair: EncodedPair) -> int:
    chosen, rejected = pair
    return len(chosen.tokens) + len(rejected.tokens)
