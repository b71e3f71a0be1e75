"""Gradients of a reward-model step in float64: against the formula, and the same in any micro-batching."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ppomax.engine.config import RewardModelConfig
from ppomax.engine.data import Pair, Turn
from ppomax.engine.reward_model import _RewardModel
from torch import Tensor

Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def pairs(texts: list[str]) -> list[Pair]:
    """Of answers between one and seventeen words."""
    user, answer = (lambda text, role=role: (Turn(role, text),) for role in ("user", "assistant"))
    return [
        Pair(user(texts[i]), answer(texts[i + 1]), answer(texts[i + 2].split()[0] + texts[i + 3] * (i % 2)), f"{i}")
        for i in range(0, 40, 4)
    ]


@pytest.fixture
def new_trainee(pairs: list[Pair], new_policy: Any, tokenizer: Any) -> Any:
    def build(budget: int, imitation_coef: float) -> _RewardModel:
        config = RewardModelConfig(
            batch_size=10, micro_batch_tokens=budget, imitation_coef=imitation_coef, held_out=0.0, max_sequence=256
        )
        policy = new_policy(seed=1, dtype=torch.float64, vocab_size=len(tokenizer))
        return _RewardModel(config, policy, tokenizer, "en", "raise", pairs)

    return build


def step(trainee: _RewardModel, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], Gradients]:
    """One step's metrics, and the gradients that it gives to the optimizer."""
    monkeypatch.setattr(trainee.optimizer, "step", dict)
    metrics = trainee.step()
    named = {**dict(trainee.causal.model.named_parameters()), "score": trainee.scalar.model.score.weight}
    return metrics, {name: parameter.grad for name, parameter in named.items()}


def assert_close(ours: Gradients, theirs: Gradients) -> None:
    """To 1e-10 of the largest."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = float(theirs[name].abs().max())
        assert scale > 0, name
        assert float((gradient - theirs[name]).abs().max()) <= 1e-10 * scale, name


def by_hand(trainee: _RewardModel, plain: Any) -> tuple[float, Gradients]:
    """Mean of -log sigmoid(r_w - r_l) + coef * CE(y_w), pair by pair on a plain model; the step's pairs are all."""
    model, head = plain(trainee.causal, "sdpa"), copy.deepcopy(trainee.scalar.model.score)
    losses = []
    for chosen, rejected in trainee.pairs:
        hidden = [
            model.model(torch.tensor([side.tokens]), use_cache=False).last_hidden_state[0]
            for side in (chosen, rejected)
        ]
        better, worse = (head(states[-1]) for states in hidden)
        labels, mask = torch.tensor(chosen.tokens)[1:], torch.tensor(chosen.mask)[1:]
        nll = F.cross_entropy(model.lm_head(hidden[0][:-1]), labels, reduction="none")[mask].mean()
        losses.append(-torch.log(torch.sigmoid(better - worse)) + trainee.config.imitation_coef * nll)
    loss = torch.stack(losses).mean()
    loss.backward()
    named = {**dict(model.named_parameters()), "score": head.weight}
    return loss.item(), {name: parameter.grad for name, parameter in named.items()}


def test_a_step_against_the_formula(new_trainee: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainee = new_trainee(budget=100, imitation_coef=0.7)
    loss, expected = by_hand(trainee, plain)
    metrics, gradients = step(trainee, monkeypatch)
    assert metrics["rm/ranking_loss"] + 0.7 * metrics["rm/lm_loss"] == pytest.approx(loss)
    assert_close(gradients, expected)


def test_micro_batches_change_nothing(new_trainee: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainees = [new_trainee(budget, 1.0) for budget in (10_000, 200, 1)]
    counts = [len(list(trainee._micro_batches(trainee.pairs))) for trainee in trainees]
    assert counts[0] == 1 < counts[1] < counts[2] == 10
    metrics, gradients = zip(*(step(trainee, monkeypatch) for trainee in trainees), strict=True)
    for other in (1, 2):
        assert metrics[other] == pytest.approx(metrics[0])
        assert_close(gradients[other], gradients[0])
