"""A PPO iteration against the paper's formulas written out, padded, on plain transformers models with autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from ppomax.engine.batch import MicroBatch, Prompt, Request, Rollout, plan_minibatches
from ppomax.engine.config import OptimConfig, PPOConfig, RewardConfig, RolloutConfig, RuntimeConfig, ScheduleConfig
from ppomax.engine.data import ShuffledStream
from ppomax.engine.errors import InputError
from ppomax.engine.measures import experience_metrics
from ppomax.engine.models import CPU
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
    clip_eps=0.15,
    value_clip=0.1,
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

    def build(
        config: PPOConfig = CONFIG, family: str = "llama", prompts: Sequence[Prompt] = PROMPTS, **options: Any
    ) -> PPO:
        return PPO(
            config,
            policy=new_policy(family, seed=1, **options),
            reference=new_policy(family, seed=2, **options),
            critic=new_scalar(family, seed=3, **options),
            reward=Recording(new_scalar(family, seed=4, **options), config.micro_batch_tokens),
            prompts=prompts,
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
        self.present = torch.tensor([[1] * len(r.tokens) + rest for r, rest in zip(self.rollouts, fill, strict=True)])
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
        self.losses: dict[str, list[float]] = {"policy": [], "critic": []}
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
        self.losses["policy"].append(total.item())
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
        loss = 0.5 * error[part.answer].mean()
        self.losses["critic"].append(loss.item())
        loss.backward()
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
        NO_PTX, gae_lambda=0.95, kl_coef=0.1, reward=RewardConfig("scale", None), minibatch_size=2, grad_clip=0.05,
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
        assert float((parameter - expected[name]).detach().abs().max()) < 1e-7 * moved, name


@pytest.mark.parametrize("config", SCENARIOS.values(), ids=SCENARIOS)
def test_two_iterations_against_the_formulas(
    config: PPOConfig, new_ppo: Callable[..., PPO], plain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ppo = new_ppo(config, **DOUBLE)
    by_hand, start = ByHand(ppo, plain), copy.deepcopy((ppo.policy.model, ppo.critic.model))
    steps, metrics = spied_plans(ppo, monkeypatch), []
    for _ in range(2):
        metrics.append(ppo.iterate())
        by_hand.iterate(ppo.reward.seen[-1], steps)
        steps.clear()
    assert_same_weights(ppo.policy.model, by_hand.policy, start[0])
    assert_same_weights(ppo.critic.model, by_hand.critic, start[1])
    for model, losses in by_hand.losses.items():
        mean = sum(each[f"{model}/loss"] for each in metrics) / 2
        assert mean == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    # a scenario in which nothing happens would show little
    assert {rollout.finished for rollouts in ppo.reward.seen for rollout in rollouts} == {True, False}
    assert max(each["policy/clipfrac"] for each in metrics) > 0
    assert (max(each["critic/clipfrac"] for each in metrics) > 0) == (config.value_clip is not None)
    assert (max(each["policy/clipfrac_dual"] for each in metrics) > 0) == (config.dual_clip is not None)


# The first ratio


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "temperature", "few-tokens"])
def test_the_first_ratio_is_exactly_1(
    kind: str, family: str, new_ppo: Callable[..., PPO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, with several micro-batches in a minibatch; also of 3 to 5 tokens, where the shape makes the bits."""
    config, prompts = NO_PTX, PROMPTS
    if kind == "temperature":
        config = replace(config, logprob_temperature=0.7)
    elif kind == "few-tokens":
        config = replace(config, micro_batch_tokens=5, rollout=replace(config.rollout, max_response=2))
        prompts = [Prompt(prompt.messages, prompt.tokens[:1]) for prompt in PROMPTS]
    ppo = new_ppo(config, family, prompts)
    micro_batches: list[int] = []
    update = ppo.update_policy

    def spy(minibatch: Sequence[MicroBatch], experience: Experience) -> Any:
        micro_batches.append(len(minibatch))
        return update(minibatch, experience)

    monkeypatch.setattr(ppo, "update_policy", spy)
    for _ in range(2):
        metrics = ppo.iterate()
        assert metrics["policy/first_logratio_max"] == 0.0
        assert metrics["policy/logratio_max"] > 0.0
    assert max(micro_batches) > 1


# The same loss and gradients whatever the micro-batching


def experience_of(ppo: PPO) -> tuple[list[Rollout], Experience]:
    prompts, rollouts = ppo.collect()
    return rollouts, ppo.shape(prompts, rollouts, ppo.plan(rollouts, epoch=0))


def gradients(optimizer: Optimizer, update: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What `update` returns, and the gradients that it leaves to the optimizer."""
    taken: list[Tensor] = []

    def take() -> dict[str, float]:
        taken.extend(p.grad for p in optimizer.parameters)
        optimizer.adamw.zero_grad()
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "step", take)
        return update(), taken


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """To 1e-10 of the largest."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        scale = float(other.abs().max())
        assert scale > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("model", ["policy", "critic"])
def test_micro_batches_and_packing_order_change_nothing(model: str, new_ppo: Callable[..., PPO]) -> None:
    config = replace(SCENARIOS["all-the-rest"], minibatch_size=8, ptx_coef=0.0)
    ppo = new_ppo(config, **DOUBLE)
    rollouts, experience = experience_of(ppo)
    optimizer, update = getattr(ppo, f"{model}_optimizer"), getattr(ppo, f"update_{model}")
    counts, results = [], []
    for budget, order in ((10_000, 0), (10_000, 1), (40, 0), (25, 2), (1, 3)):
        (minibatch,) = plan_minibatches(rollouts, 8, budget, [order], CPU.device)
        counts.append(len(minibatch))
        results.append(gradients(optimizer, lambda minibatch=minibatch: update(minibatch, experience)))
    assert counts[0] == counts[1] == 1 < counts[2] < counts[4] == 8
    for stats, taken in results[1:]:
        assert_close(taken, results[0][1])
        for name, value in stats.items():
            assert float(value) == pytest.approx(float(results[0][0][name]), rel=1e-5, abs=1e-6), name


def test_dialogues_give_the_same_gradient_in_any_packing(new_ppo: Callable[..., PPO]) -> None:
    """SFT's loss, and that of PPO-ptx."""
    policy = new_ppo(**DOUBLE).policy
    results = []
    for budget, order in ((10_000, 1), (10_000, -1), (20, 1), (1, -1)):
        loss = language_modelling_backward(policy, DIALOGUES[::order], budget)
        results.append([loss, *(p.grad for p in policy.parameters())])
        policy.zero_grad()
    for result in results[1:]:
        assert_close(result, results[0])


def test_ptx_adds_its_gradient(new_ppo: Callable[..., PPO], plain: Callable[..., Any]) -> None:
    """coef * the mean cross-entropy of the next dialogues, whatever the minibatch's size."""
    ppo = new_ppo(**DOUBLE)
    rollouts, experience = experience_of(ppo)
    minibatch = ppo.plan(rollouts, epoch=0)[0]
    chosen = [DIALOGUES[i] for i in ShuffledStream(len(DIALOGUES), SEED).take(3)]
    stats, with_ptx = gradients(ppo.policy_optimizer, lambda: ppo.update_policy(minibatch, experience))
    ppo.config = NO_PTX
    _, without = gradients(ppo.policy_optimizer, lambda: ppo.update_policy(minibatch, experience))
    model = plain(ppo.policy, "sdpa")
    loss = cross_entropy(model, chosen)
    loss.backward()
    assert float(stats["ptx_loss"]) == pytest.approx(loss.item())
    assert_close([a - b for a, b in zip(with_ptx, without, strict=True)], [0.5 * p.grad for p in model.parameters()])


# Options, one by one


def test_a_response_that_was_cut_off_may_be_bootstrapped(new_ppo: Callable[..., PPO]) -> None:
    """By the critic's value after its last token; what ended by itself is worth 0 after the end."""
    config = replace(NO_PTX, gamma=0.8, gae_lambda=0.5)
    plain, bootstrapped = (new_ppo(replace(config, bootstrap_truncated=on), **DOUBLE) for on in (False, True))
    rollouts, without = experience_of(plain)
    _, with_values = experience_of(bootstrapped)
    lengths = [len(rollout.response) for rollout in rollouts]
    difference = (with_values.shaped.advantages - without.shaped.advantages).split(lengths)
    for rollout, part, value in zip(rollouts, difference, without.scored.last_values, strict=True):
        after = 0.8 * float(value) * (not rollout.finished)
        expected = [after * 0.4**steps for steps in reversed(range(len(rollout.response)))]
        assert part.tolist() == pytest.approx(expected, abs=1e-9)
    assert {rollout.finished for rollout in rollouts} == {True, False}


def test_the_reference_may_be_the_ratios_base(new_ppo: Callable[..., PPO]) -> None:
    ppo = new_ppo(replace(NO_PTX, ratio_base="reference"), **DOUBLE)
    rollouts, experience = experience_of(ppo)
    minibatch, scored = ppo.plan(rollouts, epoch=0)[0], experience.scored
    places = torch.cat([micro.places for micro in minibatch])
    expected = (scored.logprobs - scored.ref_logprobs)[places]
    stats = ppo.update_policy(minibatch, experience)
    assert float(stats["logratio_max"]) == pytest.approx(float(expected.abs().max()))
    assert float(stats["ratio_mean"]) == pytest.approx(float(expected.exp().mean()), rel=1e-5)


def test_advantages_may_be_normalised_and_clipped(new_ppo: Callable[..., PPO]) -> None:
    _, raw = experience_of(new_ppo(NO_PTX, **DOUBLE))
    assert torch.equal(raw.advantages, raw.shaped.advantages)
    _, normal = experience_of(new_ppo(replace(NO_PTX, normalize_advantages=True), **DOUBLE))
    expected = (raw.advantages - raw.advantages.mean()) / raw.advantages.std()
    torch.testing.assert_close(normal.advantages, expected, rtol=0, atol=1e-6)
    assert torch.equal(normal.shaped.returns, raw.shaped.returns)
    _, clipped = experience_of(new_ppo(replace(NO_PTX, normalize_advantages=True, advantage_clip=0.5), **DOUBLE))
    torch.testing.assert_close(clipped.advantages, expected.clamp(-0.5, 0.5), rtol=0, atol=1e-6)


def test_the_entropy_bonus_acts_below_its_bound(new_ppo: Callable[..., PPO]) -> None:
    ppo = new_ppo(NO_PTX, **DOUBLE)
    rollouts, experience = experience_of(ppo)
    minibatch, entropy = ppo.plan(rollouts, epoch=0)[0], experience.scored.entropy
    middle = float(entropy.median())

    def gradient(coef: float, bound: float | None) -> list[Tensor]:
        ppo.config = replace(NO_PTX, entropy_coef=coef, entropy_bound=bound)
        return gradients(ppo.policy_optimizer, lambda: ppo.update_policy(minibatch, experience))[1]

    off, unbounded = gradient(0.0, None), gradient(0.5, None)
    assert_close(gradient(0.5, float(entropy.min()) / 2), off)
    assert_close(gradient(0.5, float(entropy.max()) * 2), unbounded)
    for other in (off, unbounded):
        assert not torch.allclose(gradient(0.5, middle)[0], other[0], rtol=1e-3)
    before, flat = mean_entropy(ppo, minibatch), [a - b for a, b in zip(unbounded, off, strict=True)]
    with torch.no_grad():
        for parameter, direction in zip(ppo.policy.parameters(), flat, strict=True):
            parameter.sub_(1e-3 * direction)
    assert mean_entropy(ppo, minibatch) > before, "the bonus should raise the entropy"


@torch.no_grad()
def mean_entropy(ppo: PPO, minibatch: Sequence[MicroBatch]) -> float:
    return float(torch.cat([ppo.policy.logprobs(micro.batch)[1] for micro in minibatch]).mean())


def test_a_dual_clip_inside_the_clip_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"PPOConfig\.dual_clip = 1\.2"):
        PPOConfig(dual_clip=1.2, clip_eps=0.2)
    assert PPOConfig(dual_clip=1.21, clip_eps=0.2).dual_clip == 1.21


def test_an_experiences_figures(new_ppo: Callable[..., PPO]) -> None:
    rollouts, experience = experience_of(new_ppo(NO_PTX, **DOUBLE))
    scored, metrics = experience.scored, experience_metrics(experience)
    log_ratio = (scored.logprobs - scored.ref_logprobs).sum() / len(rollouts)
    expected = {
        "reward/score_mean": experience.scores.mean(),
        "reward/score_std": experience.scores.std(correction=0),
        "reward/shaped_score_mean": experience.shaped_scores.mean(),
        "reward/total_mean": experience.shaped_scores.mean() - NO_PTX.kl_coef * log_ratio,
        "critic/value_mean": scored.values.mean(),
        "critic/return_mean": (experience.advantages + scored.values).mean(),
        "kl/ref_per_response": log_ratio,
        "ppl/policy": torch.exp(-scored.logprobs.mean()),
        "ppl/reference": torch.exp(-scored.ref_logprobs.mean()),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-6), name


def test_recorded_logprobs_are_compared_where_their_temperature_is_the_losses(new_ppo: Callable[..., PPO]) -> None:
    assert 0 <= new_ppo(NO_PTX, **DOUBLE).iterate()["rollout/logprob_gap_max"] < 1e-6
    other = new_ppo(replace(NO_PTX, logprob_temperature=0.7), **DOUBLE).iterate()
    assert "rollout/logprob_gap_max" not in other


def test_a_warm_up_of_the_critic_covers_its_pre_training(new_ppo: Callable[..., PPO]) -> None:
    config = replace(NO_PTX, critic_pretrain_iterations=2, critic_pretrain_epochs=3)
    minibatches = config.rollouts_per_iteration // config.minibatch_size
    ppo = new_ppo(config)
    assert ppo.critic_optimizer.total_steps - ppo.policy_optimizer.total_steps == 2 * 3 * minibatches


# Critic pre-training


def weights(*models: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for model in models for parameter in model.parameters()]


def all_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def pretraining(lr: float, batches: int, tolerance: float = 0.05) -> PPOConfig:
    """Of a greedy policy that gets the same prompts in each batch, so that only the critic changes the loss."""
    return replace(
        NO_PTX,
        rollouts_per_iteration=20,
        reward=RewardConfig("none", None),
        rollout=replace(CONFIG.rollout, temperature=0.0),
        critic_optim=OptimConfig(lr=lr),
        critic_pretrain_iterations=batches,
        critic_pretrain_tolerance=tolerance,
    )


def test_critic_pretraining_stops_when_the_loss_levels_off(new_ppo: Callable[..., PPO]) -> None:
    ppo = new_ppo(pretraining(lr=0.0, batches=6))
    first, second = (metrics["critic/fresh_loss"] for metrics in ppo.pretrain_critic())
    assert first == pytest.approx(second)
    assert ppo.batches == 2


def test_critic_pretraining_goes_on_while_the_loss_falls(new_ppo: Callable[..., PPO]) -> None:
    ppo = new_ppo(pretraining(lr=3e-3, batches=4))
    losses = [metrics["critic/fresh_loss"] for metrics in ppo.pretrain_critic()]
    assert len(losses) == ppo.batches == 4, "the limit ends it"
    assert all(later < 0.95 * earlier for earlier, later in pairwise(losses))
    strict = new_ppo(pretraining(lr=3e-3, batches=4, tolerance=0.99))
    assert [metrics["critic/fresh_loss"] for metrics in strict.pretrain_critic()] == losses[:2]


def test_critic_pretraining_trains_the_critic_alone(new_ppo: Callable[..., PPO]) -> None:
    ppo = new_ppo(replace(CONFIG, critic_pretrain_iterations=2, critic_pretrain_tolerance=0.0))
    fixed, trained = weights(ppo.policy, ppo.reference), weights(ppo.critic)
    assert len(list(ppo.pretrain_critic())) == 2
    assert all_equal(weights(ppo.policy, ppo.reference), fixed)
    assert not all_equal(weights(ppo.critic), trained)
    assert ppo.policy_optimizer.steps == 0
    assert ppo.critic_optimizer.steps == 2 * 2 * CONFIG.critic_pretrain_epochs
    assert not any(p.grad is not None for p in ppo.policy.parameters())


def test_no_critic_pretraining(new_ppo: Callable[..., PPO]) -> None:
    assert list(new_ppo().pretrain_critic()) == []


# The loop around it


def test_a_step_with_a_nan_gradient_is_skipped_and_counted(new_ppo: Callable[..., PPO]) -> None:
    ppo, spared = new_ppo(NO_PTX), new_ppo(NO_PTX)
    rollouts, experience = experience_of(ppo)
    experience_of(spared)
    minibatch = ppo.plan(rollouts, epoch=0)[0]
    poisoned = replace(
        experience,
        advantages=experience.advantages.clone().fill_(math.nan),
        shaped=experience.shaped._replace(returns=experience.shaped.returns * math.nan),
    )
    before = weights(ppo.policy, ppo.critic)
    assert ppo.update_policy(minibatch, poisoned)["skipped_steps"] == 1
    assert ppo.update_critic(minibatch, poisoned)["skipped_steps"] == 1
    assert all_equal(weights(ppo.policy, ppo.critic), before)
    for each in (ppo, spared):
        skipped = 1 if each is ppo else 0
        assert each.update_policy(minibatch, experience)["skipped_steps"] == skipped
        assert each.update_critic(minibatch, experience)["skipped_steps"] == skipped
    assert all_equal(weights(ppo.policy, ppo.critic), weights(spared.policy, spared.critic))
    assert not all_equal(weights(ppo.policy, ppo.critic), before)


def test_reference_and_reward_stay_as_they_are(new_ppo: Callable[..., PPO]) -> None:
    ppo = new_ppo()
    fixed = weights(ppo.reference, ppo.reward.model)
    ppo.iterate()
    assert all_equal(weights(ppo.reference, ppo.reward.model), fixed)
    assert not any(p.requires_grad for model in (ppo.reference, ppo.reward.model) for p in model.parameters())


def test_prompts_come_in_shuffled_passes_and_seeds_never_repeat(
    new_ppo: Callable[..., PPO], monkeypatch: pytest.MonkeyPatch
) -> None:
    ppo = new_ppo(NO_PTX)
    used: list[int] = []
    collect = ppo.engine.collect

    def spy(requests: Sequence[Request], enough: int) -> Any:
        used.extend(request.seed for request in requests)
        return collect(requests, enough)

    monkeypatch.setattr(ppo.engine, "collect", spy)
    collected: list[tuple[Prompt, Rollout]] = []
    for _ in range(5):
        collected += zip(*ppo.collect(), strict=True)
        ppo.batches += 1
    assert len(collected) == 40
    for first in (0, 20):
        assert {id(prompt) for prompt, _ in collected[first : first + 20]} == set(map(id, PROMPTS))
    assert [prompt for prompt, _ in collected[:20]] not in (PROMPTS, [prompt for prompt, _ in collected[20:]])
    assert all(prompt.tokens == rollout.prompt for prompt, rollout in collected)
    assert len(set(used)) == 40


def test_minibatches_are_shuffled_anew_for_each_epoch_and_batch(new_ppo: Callable[..., PPO]) -> None:
    ppo = new_ppo(NO_PTX)
    _, rollouts = ppo.collect()

    def order(epoch: int) -> list[int]:
        return [i for steps in ppo.plan(rollouts, epoch) for micro in steps for i in micro.members.tolist()]

    first, second = order(0), order(1)
    assert order(0) == first != second
    ppo.batches += 1
    assert order(0) not in (first, second)


def test_the_same_seed_gives_the_same_bits_and_a_saved_state_goes_on(new_ppo: Callable[..., PPO]) -> None:
    one, other, later = (new_ppo() for _ in range(3))
    timeless = lambda metrics: {k: v for k, v in metrics.items() if not k.startswith("time/")}  # noqa: E731
    first, second = timeless(one.iterate()), timeless(one.iterate())
    assert timeless(other.iterate()) == first
    for model in ("policy", "critic"):
        getattr(later, model).load_state_dict(getattr(other, model).state_dict())
    later.load_state_dict(copy.deepcopy(other.state_dict()))
    assert timeless(other.iterate()) == second
    assert timeless(later.iterate()) == second
    assert all_equal(weights(later.policy, later.critic), weights(one.policy, one.critic))
    seeded = new_ppo(replace(CONFIG, runtime=RuntimeConfig(device="cpu", seed=SEED + 1)))
    assert timeless(seeded.iterate()) != first
