"""A PPO iteration against the paper's formulas written out, padded, on plain transformers models with autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from ppomax.engine import ppo as ppo_module
from ppomax.engine.batch import MicroBatch, Prompt, Rollout
from ppomax.engine.config import OptimConfig, PPOConfig, RewardConfig, RolloutConfig, RuntimeConfig, ScheduleConfig
from ppomax.engine.data import ShuffledStream
from ppomax.engine.optim import Optimizer, lr_factor
from ppomax.engine.ppo import PPO, Experience
from ppomax.engine.rewards import ModelReward
from ppomax.engine.sft import language_modelling_backward
from ppomax.engine.templates import Encoded
from torch import Tensor, nn

STOPS = [1, 2, 3, 4, 5, 6]  # many, so that some responses end and some are cut off
SEED = 3
DOUBLE = {"dtype": torch.float64}
FAMILIES = ["llama", "qwen2", "qwen2-window", "qwen3", "mistral", "gemma2"]

# Small and with everything of PPO-max on; learning rates so high that ratios and values get clipped.
CONFIG = PPOConfig(
    iterations=2,
    rollouts_per_iteration=8,
    minibatch_size=4,
    micro_batch_tokens=30,
    max_sequence=24,
    kl_coef=0.05,
    gae_lambda=0.9,
    ptx_coef=0.5,
    ptx_batch_size=3,
    policy_optim=OptimConfig(lr=0.02, eps=1e-6),
    critic_optim=OptimConfig(lr=0.02, eps=1e-6),
    rollout=RolloutConfig(max_response=9, temperature=1.0, top_p=1.0, max_running=3, block_size=4),
    reward=RewardConfig("normalize", 0.8),
    runtime=RuntimeConfig(device="cpu", seed=SEED),
)
NO_PTX = replace(CONFIG, ptx_coef=0.0)


def draw(count: int, seed: int) -> list[int]:
    return torch.randint(7, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [Prompt([{"role": "user", "content": ""}], draw(1 + 3 * i % 11, i)) for i in range(20)]
DIALOGUES = [Encoded(draw(n, n), [False] * 2 + [i % 3 != 1 for i in range(n - 2)]) for n in (6, 9, 4, 14, 8)]


class Recording(ModelReward):
    """A reward model that keeps what it scored."""

    seen: list[list[Rollout]]

    def __call__(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Tensor:
        self.__dict__.setdefault("seen", []).append(list(rollouts))
        return super().__call__(prompts, rollouts)


@pytest.fixture
def new_ppo(new_policy: Any, new_scalar: Any) -> Callable[..., PPO]:
    """PPO of tiny models with random weights."""

    def build(config: PPOConfig = CONFIG, family: str = "llama", **options: Any) -> PPO:
        return PPO(
            config,
            policy=new_policy(family, seed=1, **options),
            reference=new_policy(family, seed=2, **options),
            critic=new_scalar(family, seed=3, **options),
            reward=Recording(new_scalar(family, seed=4, **options), config.micro_batch_tokens),
            prompts=PROMPTS,
            stop_tokens=STOPS,
            ptx=DIALOGUES if config.ptx_coef else (),
        )

    return build


# The paper's formulas, padded


@dataclass
class Padded:
    """Responses beside each other: `[B, L]` tokens, and `[B, L - 1]` fields of the tokens from the second on."""

    rollouts: Sequence[Rollout]
    tokens: Tensor = field(init=False)
    present: Tensor = field(init=False)
    answer: Tensor = field(init=False)

    def __post_init__(self) -> None:
        longest = max(len(r.tokens) for r in self.rollouts)
        fill = [[0] * (longest - len(r.tokens)) for r in self.rollouts]
        self.tokens = torch.tensor([r.tokens + rest for r, rest in zip(self.rollouts, fill, strict=True)])
        self.present = torch.tensor(
            [[1] * len(r.tokens) + rest for r, rest in zip(self.rollouts, fill, strict=True)]
        )
        masks = [[0] * len(r.prompt) + [1] * len(r.response) for r in self.rollouts]
        rows = [mask + rest for mask, rest in zip(masks, fill, strict=True)]
        self.answer = torch.tensor(rows, dtype=torch.bool)[:, 1:]

    def logprobs(self, model: Any, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies `[B, L - 1]`."""
        logits = model(self.tokens, attention_mask=self.present, use_cache=False).logits[:, :-1]
        logp = torch.log_softmax(logits / temperature, -1)
        return logp.gather(2, self.tokens[:, 1:, None])[..., 0], -(logp.exp() * logp).sum(-1)

    def scalars(self, model: Any) -> Tensor:
        """The scalar head's output at every position `[B, L]`."""
        hidden = model.base_model(self.tokens, attention_mask=self.present, use_cache=False).last_hidden_state
        return model.score(hidden)[..., 0]

    def at_last(self, scalars: Tensor) -> Tensor:
        """`[B]` at each response's last token."""
        return torch.stack([row[len(r.tokens) - 1] for row, r in zip(scalars, self.rollouts, strict=True)])


class Adam:
    """AdamW written out, with the schedule and the clipping of the global norm."""

    def __init__(self, model: nn.Module, config: OptimConfig, steps: int, grad_clip: float | None) -> None:
        self.model, self.config, self.total, self.grad_clip = model, config, steps, grad_clip
        self.m: dict[str, Any] = {name: 0.0 for name, _ in model.named_parameters()}
        self.v, self.t = dict(self.m), 0

    @torch.no_grad()
    def step(self) -> None:
        (b1, b2), config = self.config.betas, self.config
        lr = config.lr * lr_factor(config.schedule, self.t, self.total)
        self.t += 1
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in self.model.parameters()))
        scale = 1.0 if self.grad_clip is None else min(1.0, self.grad_clip / (norm + 1e-6))
        for name, p in self.model.named_parameters():
            g = p.grad * scale
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
            p.mul_(1 - lr * config.weight_decay * (p.ndim >= 2))
            p.sub_(lr * self.m[name] / (1 - b1**self.t) / ((self.v[name] / (1 - b2**self.t)).sqrt() + config.eps))
            p.grad = None


class ByHand:
    """The same training on copies of the models: loops, padding, autograd."""

    def __init__(self, ppo: PPO, plain: Callable[..., Any]) -> None:
        self.config = config = ppo.config
        self.policy, self.reference, self.critic = (
            plain(model, "sdpa").requires_grad_() for model in (ppo.policy, ppo.reference, ppo.critic)
        )
        self.reward = plain(ppo.reward.model, "sdpa")
        steps = config.optimizer_steps
        self.policy_adam = Adam(self.policy, config.policy_optim, steps, config.grad_clip)
        self.critic_adam = Adam(self.critic, config.critic_optim, steps, config.grad_clip)
        self.history: list[float] = []
        self.dialogues = ShuffledStream(len(DIALOGUES), SEED)

    def iterate(self, rollouts: list[Rollout], minibatches: list[list[int]]) -> None:
        """Score, shape and update; `minibatches` hold the indices of their rollouts, one list a step."""
        config, batch = self.config, Padded(rollouts)
        with torch.no_grad():
            old, _ = batch.logprobs(self.policy, config.logprob_temperature)
            ref, _ = batch.logprobs(self.reference, config.logprob_temperature)
            scalars = batch.scalars(self.critic)
            shaped = self.shape_scores(batch.at_last(batch.scalars(self.reward)).tolist())
        advantages, returns = self.advantages(batch, old, ref, scalars, shaped)
        base = old if config.ratio_base == "rollout" else ref
        for members in minibatches:
            part = Padded([rollouts[i] for i in members])
            rows = (torch.tensor(members)[:, None], torch.arange(part.answer.shape[1]))
            self.update_policy(part, base[rows], advantages[rows])
            self.update_critic(part, scalars[:, :-1][rows], returns[rows])

    def shape_scores(self, scores: list[float]) -> list[float]:
        """Figure 5, star 5: moments over the whole history, this batch included; then the clip."""
        reward = self.config.reward
        self.history += scores
        mean = sum(self.history) / len(self.history)
        std = math.sqrt(sum((x - mean) ** 2 for x in self.history) / (len(self.history) - 1))
        if reward.transform == "normalize":
            scores = [(score - mean) / std for score in scores]
        elif reward.transform == "scale":
            scores = [score / std for score in scores]
        bound = math.inf if reward.clip is None else reward.clip
        return [min(max(score, -bound), bound) for score in scores]

    def advantages(
        self, batch: Padded, old: Tensor, ref: Tensor, scalars: Tensor, scores: list[float]
    ) -> tuple[Tensor, Tensor]:
        """KL penalty, score at the last token, GAE backwards token by token."""
        config = self.config
        advantages, returns = torch.zeros_like(old), torch.zeros_like(old)
        for b, rollout in enumerate(batch.rollouts):
            end = len(rollout.tokens) - 1
            cut_off = config.bootstrap_truncated and rollout.response[-1] not in STOPS
            next_value = float(scalars[b, end]) if cut_off else 0.0
            running = 0.0
            for t in reversed(range(len(rollout.prompt) - 1, end)):
                reward = -config.kl_coef * float(old[b, t] - ref[b, t]) + (scores[b] if t == end - 1 else 0.0)
                delta = reward + config.gamma * next_value - float(scalars[b, t])
                running = delta + config.gamma * config.gae_lambda * running
                advantages[b, t], returns[b, t] = running, running + float(scalars[b, t])
                next_value = float(scalars[b, t])
        if config.normalize_advantages:
            kept = advantages[batch.answer]
            advantages = (advantages - kept.mean()) / (kept.std() + 1e-8)
        bound = math.inf if config.advantage_clip is None else config.advantage_clip
        return advantages.clamp(-bound, bound), returns

    def update_policy(self, part: Padded, base: Tensor, advantages: Tensor) -> None:
        config = self.config
        logprobs, entropy = part.logprobs(self.policy, config.logprob_temperature)
        ratio = torch.exp(logprobs - base)
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - config.clip_eps, 1 + config.clip_eps))
        if config.dual_clip is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * config.dual_clip), loss)
        bonus = entropy if config.entropy_bound is None else entropy * (entropy < config.entropy_bound)
        total = (loss - config.entropy_coef * bonus)[part.answer].mean()
        if config.ptx_coef:
            chosen = [DIALOGUES[i] for i in self.dialogues.take(config.ptx_batch_size)]
            total = total + config.ptx_coef * cross_entropy(self.policy, chosen)
        total.backward()
        self.policy_adam.step()

    def update_critic(self, part: Padded, old_values: Tensor, returns: Tensor) -> None:
        values, bound = part.scalars(self.critic)[:, :-1], self.config.value_clip
        error = (values - returns) ** 2
        if bound is not None:
            clipped = old_values + (values - old_values).clamp(-bound, bound)
            error = torch.maximum(error, (clipped - returns) ** 2)
        (0.5 * error[part.answer].mean()).backward()
        self.critic_adam.step()


def cross_entropy(model: Any, dialogues: Sequence[Encoded]) -> Tensor:
    """Mean over all learned tokens."""
    losses = []
    for dialogue in dialogues:
        tokens = torch.tensor(dialogue.tokens)
        logp = torch.log_softmax(model(tokens[None], use_cache=False).logits[0, :-1], -1)
        losses.append(-logp.gather(1, tokens[1:, None])[:, 0][torch.tensor(dialogue.mask[1:])])
    return torch.cat(losses).mean()


SCENARIOS = {
    "ppo-max": CONFIG,
    "released-code": replace(
        NO_PTX, gae_lambda=0.95, kl_coef=0.1, reward=RewardConfig("scale", None), minibatch_size=8, grad_clip=0.05,
        policy_optim=OptimConfig(lr=0.02, eps=1e-6, schedule=ScheduleConfig("inverse-sqrt", warmup=1, floor=0.1)),
    ),
    "vanilla": replace(NO_PTX, kl_coef=0.0, reward=RewardConfig("none", None), value_clip=None, grad_clip=None),
    "discounted": replace(NO_PTX, gamma=0.9, gae_lambda=0.5, bootstrap_truncated=True, minibatch_size=2),
    "all-the-rest": replace(
        CONFIG, ppo_epochs=2, ratio_base="reference", normalize_advantages=True, advantage_clip=1.2, dual_clip=1.6,
        entropy_coef=0.3, entropy_bound=2.5, logprob_temperature=0.7, minibatch_size=2,
        policy_optim=OptimConfig(lr=0.01, eps=1e-6, weight_decay=0.1, schedule=ScheduleConfig("cosine", floor=0.1)),
    ),
}  # fmt: skip


def spied_plans(ppo: PPO, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rollouts of each optimizer step to come, filled as `ppo` plans them."""
    steps: list[list[int]] = []
    plan = ppo.plan

    def spy(rollouts: Sequence[Rollout], epoch: int) -> list[list[MicroBatch]]:
        minibatches = plan(rollouts, epoch)
        steps.extend([i for micro in minibatch for i in micro.members.tolist()] for minibatch in minibatches)
        return minibatches

    monkeypatch.setattr(ppo, "plan", spy)
    return steps


def assert_same_weights(ours: nn.Module, theirs: nn.Module, start: nn.Module) -> None:
    """To 1e-7 of how far training has moved each weight matrix."""
    expected, before = dict(theirs.named_parameters()), dict(start.named_parameters())
    for name, parameter in ours.named_parameters():
        moved = float((expected[name] - before[name]).detach().abs().max())
        assert moved > 1e-3, name
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-7 * moved, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("config", SCENARIOS.values(), ids=SCENARIOS)
def test_two_iterations_against_the_formulas(
    config: PPOConfig, new_ppo: Callable[..., PPO], plain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ppo = new_ppo(config, **DOUBLE)
    by_hand, start = ByHand(ppo, plain), copy.deepcopy((ppo.policy.model, ppo.critic.model))
    steps = spied_plans(ppo, monkeypatch)
    metrics = []
    for _ in range(2):
        metrics.append(ppo.iterate())
        by_hand.iterate(ppo.reward.seen[-1], steps)
        steps.clear()
    assert_same_weights(ppo.policy.model, by_hand.policy, start[0])
    assert_same_weights(ppo.critic.model, by_hand.critic, start[1])
    assert {rollout.finished for rollouts in ppo.reward.seen for rollout in rollouts} == {True, False}
    assert metrics[0]["policy/clipfrac"] > 0, "a scenario in which nothing is clipped shows little"
    assert (metrics[0]["critic/clipfrac"] > 0) == (config.value_clip is not None)
