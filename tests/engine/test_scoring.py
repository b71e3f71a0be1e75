"""What policy, reference and critic say of rollouts: right values in their places, and the bits of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ppomax.engine.batch import Rollout, plan_minibatches
from ppomax.engine.models import CPU
from ppomax.engine.scoring import score_rollouts
from ppomax.kernels.api import linear_ppo_loss
from torch import Tensor

families = pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2-window", "qwen3", "mistral", "gemma2"])
SHAPES = [(3, 5), (9, 1), (1, 12), (4, 4), (2, 7), (6, 2), (1, 1), (5, 9)]


def draw_rollouts(seed: int = 0) -> list[Rollout]:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(2, 61, (count,), generator=generator).tolist()

    return [Rollout(draw(p), draw(r), torch.zeros(r), finished=True, versions=[0] * r) for p, r in SHAPES]


@torch.no_grad()
def alone(
    policy: Any, critic: Any, rollouts: list[Rollout], temperature: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Log-probs, entropies, values, last values of plain models, response by response."""
    logprobs, entropies, values, last = [], [], [], []
    for rollout in rollouts:
        tokens, start = torch.tensor([rollout.tokens]), len(rollout.prompt)
        logp = torch.log_softmax(policy(tokens, use_cache=False).logits[0, start - 1 : -1] / temperature, -1)
        logprobs.append(logp.gather(1, tokens[0, start:, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
        scalars = critic.score(critic.base_model(tokens, use_cache=False).last_hidden_state[0])[:, 0]
        values.append(scalars[start - 1 : -1])
        last.append(scalars[-1:])
    return logprobs, entropies, values, last


@families
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_fields_against_each_response_alone(
    family: str, temperature: float, new_policy: Any, new_scalar: Any, plain: Any
) -> None:
    double = {"dtype": torch.float64}
    policy, reference = new_policy(family, seed=1, **double), new_policy(family, seed=2, **double)
    critic, rollouts = new_scalar(family, seed=3, **double), draw_rollouts()
    minibatches = plan_minibatches(rollouts, 4, 20, [0], CPU.device)
    scored = score_rollouts(minibatches, policy, reference, critic, temperature)
    twins = plain(policy), plain(critic)
    logprobs, entropies, values, last = map(torch.cat, alone(*twins, rollouts, temperature))
    ref_logprobs = torch.cat(alone(plain(reference), twins[1], rollouts, temperature)[0])
    expected = (logprobs, entropies, ref_logprobs, values, last)
    fields = (scored.logprobs, scored.entropy, scored.ref_logprobs, scored.values, scored.last_values)
    for ours, theirs in zip(fields, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)  # eager rounds its weights to float32
        assert not ours.requires_grad


def test_fields_do_not_depend_on_the_plan(new_policy: Any, new_scalar: Any) -> None:
    double = {"dtype": torch.float64}
    models = new_policy(seed=1, **double), new_policy(seed=2, **double), new_scalar(seed=3, **double)
    rollouts = draw_rollouts()
    plans = [(4, 20, 0), (8, 1000, 1), (1, 1, 2), (2, 15, 3)]
    results = [
        score_rollouts(plan_minibatches(rollouts, size, budget, [seed], CPU.device), *models, 1.0)
        for size, budget, seed in plans
    ]
    for result in results[1:]:
        for name, field in vars(result).items():
            torch.testing.assert_close(field, vars(results[0])[name], rtol=0, atol=1e-12)


@families
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_in_the_loss_to_the_last_bit(
    family: str, temperature: float, new_policy: Any, new_scalar: Any
) -> None:
    """In float32, with gradients there and without here, in several micro-batches."""
    policy, rollouts = new_policy(family), draw_rollouts()
    minibatches = plan_minibatches(rollouts, 4, 20, [0], CPU.device)
    assert max(map(len, minibatches)) > 1
    scored = score_rollouts(minibatches, policy, policy, new_scalar(family), temperature)
    assert torch.equal(scored.ref_logprobs, scored.logprobs)
    for micro in (micro for minibatch in minibatches for micro in minibatch):
        result = linear_ppo_loss(
            policy.hidden(micro.batch).index_select(0, micro.batch.rows),
            labels=micro.batch.labels,
            old_logprobs=scored.logprobs[micro.places],
            advantages=torch.ones(micro.batch.num_rows),
            temperature=temperature,
            **policy.head,
        )
        assert result.loss.requires_grad
        assert torch.equal(result.logprobs, scored.logprobs[micro.places])
        assert torch.equal(result.entropy, scored.entropy[micro.places])
        assert result.stats.ratio_max == 1
