"""Log-probs of the policy that sampled: recorded, recomputed, of earlier weights; responses that go on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ppomax.engine.batch import Prompt, Rollout, pack_rollouts
from ppomax.engine.config import OptimConfig, PPOConfig, RolloutConfig, RuntimeConfig
from ppomax.engine.errors import InputError
from ppomax.engine.models import CausalModel
from ppomax.engine.ppo import PPO
from ppomax.engine.rewards import ModelReward
from ppomax.kernels.api import linear_ppo_loss
from torch import Tensor

FAMILIES = ["llama", "qwen2", "qwen2-window", "qwen3", "mistral", "gemma2"]
STOPS = [1, 2, 3, 4]
CONFIG = PPOConfig(
    iterations=4,
    rollouts_per_iteration=8,
    minibatch_size=4,
    micro_batch_tokens=40,
    max_sequence=32,
    policy_optim=OptimConfig(lr=0.01, eps=1e-6),
    critic_optim=OptimConfig(lr=0.01, eps=1e-6),
    rollout=RolloutConfig(max_response=16, temperature=0.9, top_p=0.95, max_running=5, block_size=4),
    runtime=RuntimeConfig(device="cpu", seed=3),
)
PARTIAL = replace(CONFIG, extra_in_flight=4)


def draw(count: int, seed: int) -> list[int]:
    return torch.randint(7, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [Prompt([{"role": "user", "content": ""}], draw(1 + 3 * i % 11, i)) for i in range(20)]


@pytest.fixture
def new_ppo(new_policy: Any, new_scalar: Any) -> Callable[..., PPO]:
    def build(config: PPOConfig = CONFIG, family: str = "llama", exact: bool = False) -> PPO:
        policy, reference = new_policy(family, seed=1), new_policy(family, seed=2)
        policy.exact = exact
        reward = ModelReward(new_scalar(family, seed=4), config.micro_batch_tokens)
        return PPO(config, policy, reference, new_scalar(family, seed=3), reward, PROMPTS, STOPS)

    return build


def shaped(ppo: PPO) -> Any:
    prompts, rollouts = ppo.collect()
    minibatches = ppo.plan(rollouts, 0)
    return minibatches, ppo.shape(prompts, rollouts, minibatches)


@torch.no_grad()
def recomputed(policy: CausalModel, rollouts: list[Rollout]) -> list[Tensor]:
    batch = pack_rollouts(rollouts, policy.device)
    return list(policy.logprobs(batch)[0].split([len(r.response) for r in rollouts]))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_exact_mode_recorded_and_recomputed_are_equal(family: str, new_ppo: Callable[..., PPO]) -> None:
    """Bit for bit, before and after an update; every prompt sampled in a crowd of other lengths."""
    ppo = new_ppo(family=family, exact=True)
    for _ in range(2):
        metrics = ppo.iterate()
        assert metrics["rollout/logprob_gap_max"] == 0.0
        assert metrics["policy/first_logratio_max"] == 0.0
        assert metrics["rollout/stale_share"] == 0.0


def test_in_the_exact_mode_a_response_is_the_same_alone_and_in_a_crowd(new_ppo: Callable[..., PPO]) -> None:
    ppo = new_ppo(exact=True)
    tokens = [prompt.tokens for prompt in PROMPTS]
    crowd = ppo.engine.generate(tokens, list(range(20)))
    alone = [ppo.engine.generate([prompt], [seed])[0] for seed, prompt in enumerate(tokens)]
    assert [r.response for r in crowd] == [r.response for r in alone]
    assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(crowd, alone, strict=True))


def test_the_gap_is_logged(new_ppo: Callable[..., PPO]) -> None:
    metrics = new_ppo().iterate()
    assert 0 < metrics["rollout/logprob_gap_max"] < 1e-5
    assert 0 < metrics["rollout/logprob_gap_mean"] <= metrics["rollout/logprob_gap_max"]
    assert metrics["rollout/logprob_gap_share"] == 0.0


def test_recorded_logprobs_save_the_pass(new_ppo: Callable[..., PPO], monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = new_ppo(replace(CONFIG, old_logprobs="recorded"))
    monkeypatch.setattr(ppo.policy, "logprobs", lambda *_: pytest.fail("the policy was asked"))
    minibatches, experience = shaped(ppo)
    recorded = torch.cat([rollout.logprobs for rollout in experience.rollouts])
    assert torch.equal(experience.old_logprobs, recorded)
    assert torch.equal(experience.scored.logprobs, recorded)
    assert experience.scored.entropy is None
    step = ppo.update_policy(minibatches[0], experience)
    assert 0 < step["logratio_max"] < 1e-5, "the gap shows in the first update"
    metrics = ppo.iterate()
    assert metrics["policy/first_logratio_share"] == 0.0
    assert "rollout/logprob_gap_max" not in metrics


def test_importance_weights_are_truncated_and_used(new_ppo: Callable[..., PPO]) -> None:
    """A sampler whose log-probs are off by up to 0.5 nats."""
    ppo = new_ppo(replace(CONFIG, importance_clip=1.2))
    collect = ppo.collect

    def off() -> tuple[list[Prompt], list[Rollout]]:
        prompts, rollouts = collect()
        generator = torch.Generator().manual_seed(0)
        noise = [torch.rand(len(r.response), generator=generator) - 0.5 for r in rollouts]
        return prompts, [replace(r, logprobs=r.logprobs + n) for r, n in zip(rollouts, noise, strict=True)]

    ppo.collect = off  # type: ignore[method-assign]
    minibatches, experience = shaped(ppo)
    recorded = torch.cat([rollout.logprobs for rollout in experience.rollouts])
    expected = torch.exp(experience.scored.logprobs - recorded).clamp(max=1.2)
    assert experience.importance_weights is not None
    torch.testing.assert_close(experience.importance_weights, expected)
    assert 0 < (expected == 1.2).float().mean() < 1
    assert torch.equal(experience.old_logprobs, experience.scored.logprobs)
    tokens = sum(micro.batch.num_rows for micro in minibatches[0])
    by_hand = [
        linear_ppo_loss(
            ppo.policy.hidden(micro.batch)[micro.batch.rows],
            labels=micro.batch.labels,
            old_logprobs=experience.old_logprobs[micro.places],
            advantages=experience.advantages[micro.places],
            importance_weights=expected[micro.places],
            clip_eps=CONFIG.clip_eps,
            normalizer=tokens,
            **ppo.policy.head,
        ).loss
        for micro in minibatches[0]
    ]
    torch.testing.assert_close(ppo.update_policy(minibatches[0], experience)["loss"], torch.stack(by_hand).sum())


def test_an_unfinished_response_goes_on_under_new_weights(new_ppo: Callable[..., PPO]) -> None:
    """Each token carries the version of the weights that drew it, and its log-prob under those."""
    ppo, policies, across = new_ppo(PARTIAL), [], 0
    for iteration in range(4):
        policies.append(copy.deepcopy(ppo.policy))
        assert ppo.engine.version == iteration
        under_way = [request for _, request in ppo.under_way]
        minibatches, experience = shaped(ppo)
        assert len(experience.rollouts) == 8
        assert len(ppo.under_way) == 4
        for request in under_way:
            now = [*(r.tokens for r in experience.rollouts), *(q.prompt + q.response for _, q in ppo.under_way)]
            begun = request.prompt + request.response
            assert any(tokens[: len(begun)] == begun for tokens in now), "no response is lost or begun anew"
        for rollout in experience.rollouts:
            assert rollout.versions == sorted(rollout.versions)
            assert len(rollout.versions) == len(rollout.response)
            across += rollout.versions[0] < rollout.versions[-1]
            for version in set(rollout.versions):
                drawn = torch.tensor(rollout.versions) == version
                theirs = recomputed(policies[version], [rollout])[0]
                torch.testing.assert_close(rollout.logprobs[drawn], theirs[drawn], rtol=0, atol=1e-5)
        versions = torch.tensor([v for rollout in experience.rollouts for v in rollout.versions])
        stale, recorded = versions < iteration, torch.cat([r.logprobs for r in experience.rollouts])
        assert torch.equal(experience.old_logprobs[stale], recorded[stale])
        assert torch.equal(experience.old_logprobs[~stale], experience.scored.logprobs[~stale])
        for minibatch in minibatches:
            ppo.update_policy(minibatch, experience)
        ppo.batches += 1
        ppo.engine.weights_changed()
    assert across > 2, "some responses should have gone on over an update"


def test_responses_under_way_survive_a_save(new_ppo: Callable[..., PPO]) -> None:
    first = new_ppo(PARTIAL)
    first.iterate()
    second = new_ppo(PARTIAL)
    for name in ("policy", "critic"):
        getattr(second, name).load_state_dict(getattr(first, name).state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert any(request.response for _, request in second.under_way)
    for ours, theirs in zip((second.iterate() for _ in range(2)), (first.iterate() for _ in range(2)), strict=True):
        untimed = [{k: v for k, v in m.items() if not k.startswith("time/")} for m in (ours, theirs)]
        assert untimed[0] == untimed[1]
        assert untimed[0]["rollout/stale_share"] > 0


def test_several_responses_to_a_prompt(new_ppo: Callable[..., PPO]) -> None:
    prompts, rollouts = new_ppo(replace(CONFIG, samples_per_prompt=4)).collect()
    assert len({id(prompt) for prompt in prompts}) == 2
    assert [prompt.tokens for prompt in prompts] == [rollout.prompt for rollout in rollouts]
    assert len({tuple(rollout.response) for rollout in rollouts}) == 8


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"old_logprobs": "recorded", "logprob_temperature": 0.8}, r"logprob_temperature = 0\.8: expected 1 where"),
        ({"extra_in_flight": 2, "logprob_temperature": 0.8}, r"logprob_temperature = 0\.8: expected 1 where"),
        ({"old_logprobs": "recorded", "importance_clip": 2.0}, r"importance_clip = 2\.0: expected none with"),
        ({"samples_per_prompt": 3}, r"samples_per_prompt = 3: expected a divisor of rollouts_per_iteration = 8"),
        ({"samples_per_prompt": 4, "extra_in_flight": 2}, "expected a divisor of extra_in_flight = 2"),
        ({"old_logprobs": "guessed"}, "expected one of 'recomputed', 'recorded'"),
        ({"importance_clip": 0.0}, "expected a number > 0"),
    ],
    ids=str,
)
def test_what_does_not_go_together(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        replace(CONFIG, **fields)
