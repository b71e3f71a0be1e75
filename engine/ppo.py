"""PPO-max on models in memory. `PPO.iterate` is one iteration of the algorithm, top to bottom.

Loading, resuming, saving and display stand in `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.api import (
    ShapedGAE,
    linear_ppo_loss,
    merge_policy_stats,
    merge_value_stats,
    shaped_gae,
    value_loss,
)
from .batch import MicroBatch, Prompt, Request, Rollout, cumulative, plan_minibatches
from .config import PPOConfig
from .data import ShuffledStream
from .measures import IterationMetrics, experience_metrics, sampler_gap
from .models import CausalModel, ScalarModel
from .optim import Optimizer
from .rewards import Reward, RunningMoments, reparameterise
from .rollout import RolloutEngine, random_seeds
from .scoring import Scored, score_rollouts
from .sft import language_modelling_backward
from .templates import Encoded

# What a shuffle or a random stream is for: part of its seed, so that no two of them are alike.
_SAMPLING, _SHUFFLING = 1, 2

StepMetrics = dict[str, Tensor | float]


@dataclass(frozen=True)
class Experience:
    """One iteration's rollouts and all that the updates need to know of them. Per-token fields are `[N]`."""

    prompts: list[Prompt]
    rollouts: list[Rollout]
    scores: Tensor
    """`[S]`: as the reward gave them"""
    shaped_scores: Tensor
    """`[S]`: reparameterised"""
    judged: Tensor | None
    """`[S]`: the judge's scores"""
    scored: Scored
    shaped: ShapedGAE
    advantages: Tensor
    """Of `shaped`, normalised and clipped where the configuration says so"""
    recorded: Tensor
    """`[N]`: log-probs recorded while sampling, at temperature 1"""
    fresh: Tensor
    """`[N]` bool: drawn by the present weights, not by earlier ones"""
    old_logprobs: Tensor
    """Of the weights that drew each token"""
    importance_weights: Tensor | None


class PPO:
    """Policy, critic, frozen reference, reward, and the state of training them.

    Args:
        prompts: what to sample responses for; passed over in shuffled epochs.
        ptx: dialogues for the language-modelling loss (PPO-ptx); needed where `config.ptx_coef` > 0.
        stop_tokens: token ids that end a response.
        judge: a second reward that is measured and never optimised.
        decode: token ids to text; needed where `config.rollout.stop` holds texts.
    """

    def __init__(
        self,
        config: PPOConfig,
        policy: CausalModel,
        reference: CausalModel,
        critic: ScalarModel,
        reward: Reward,
        prompts: Sequence[Prompt],
        stop_tokens: Sequence[int],
        ptx: Sequence[Encoded] = (),
        judge: Reward | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.config, self.reward, self.prompts, self.ptx, self.judge = config, reward, prompts, ptx, judge
        self.policy, self.critic = policy, critic
        self.reference = reference.requires_grad_(False)
        self.engine = RolloutEngine(policy, config.rollout, stop_tokens, config.max_prompt, decode=decode)
        steps, critic_steps = config.optimizer_steps, config.optimizer_steps + config.critic_pretrain_steps
        self.policy_optimizer = Optimizer(policy, config.policy_optim, steps, config.grad_clip)
        self.critic_optimizer = Optimizer(critic, config.critic_optim, critic_steps, config.grad_clip)
        self.moments = RunningMoments()
        seed = config.runtime.seed
        self.prompt_stream = ShuffledStream(len(prompts), seed)
        self.ptx_stream = ShuffledStream(len(ptx), seed) if ptx else None
        self.batches = 0
        """Rollout batches collected so far, those of critic pre-training included."""
        self.under_way: list[tuple[Prompt, Request]] = []
        """Responses that the next batch goes on with"""

    def iterate(self) -> dict[str, float]:
        """One PPO iteration (paper section 5.4): sample, score, shape, update. Returns its metrics."""
        config, metrics = self.config, IterationMetrics()
        before = self.engine.statistics
        with metrics.timed("rollout"):
            prompts, rollouts = self.collect()
        with metrics.timed("score"):
            minibatches = self.plan(rollouts, epoch=0)
            experience = self.shape(prompts, rollouts, minibatches)
        with metrics.timed("update"):
            for epoch in range(config.ppo_epochs):
                for minibatch in minibatches if epoch == 0 else self.plan(rollouts, epoch):
                    metrics.add("policy", self.update_policy(minibatch, experience))
                    metrics.add("critic", self.update_critic(minibatch, experience))
        self.batches += 1
        self.engine.weights_changed()
        rollout_metrics = {**self._gap(experience), **self.engine.statistics.since(before).metrics()}
        return {**experience_metrics(experience), **rollout_metrics, **metrics.result()}

    def _gap(self, experience: Experience) -> dict[str, float]:
        """Recorded against recomputed log-probs, where both are there and mean the same: at temperature 1."""
        if self.config.old_logprobs == "recorded" or self.config.logprob_temperature != 1:
            return {}
        return sampler_gap(experience.recorded, experience.scored.logprobs, experience.fresh)

    def pretrain_critic(self) -> Iterator[dict[str, float]]:
        """Train the critic on rollouts of the fixed policy until its loss levels off (paper section 5.4).

        Yields the metrics of each rollout batch; `critic/fresh_loss` is the value loss before training on it.
        """
        config, previous = self.config, None
        while self.batches < config.critic_pretrain_iterations:
            prompts, rollouts = self.collect()
            minibatches = self.plan(rollouts, epoch=0)
            experience = self.shape(prompts, rollouts, minibatches)
            metrics = IterationMetrics()
            fresh = 0.5 * (experience.scored.values - experience.shaped.returns).square().mean().item()
            for epoch in range(config.critic_pretrain_epochs):
                for minibatch in self.plan(rollouts, epoch):
                    metrics.add("critic", self.update_critic(minibatch, experience))
            self.batches += 1
            yield {"critic/fresh_loss": fresh, **experience_metrics(experience), **metrics.result()}
            if previous is not None and fresh > (1 - config.critic_pretrain_tolerance) * previous:
                break
            previous = fresh

    def collect(self) -> tuple[list[Prompt], list[Rollout]]:
        """As many finished responses as an iteration trains on, and their prompts; others may stay under way."""
        config = self.config
        count = config.rollouts_per_iteration + config.extra_in_flight - len(self.under_way)
        places = self.prompt_stream.take(count // config.samples_per_prompt)
        prompts = [self.prompts[index] for index in places for _ in range(config.samples_per_prompt)]
        seeds = random_seeds(count, config.runtime.seed, _SAMPLING, self.batches)
        new = [(prompt, Request(prompt.tokens, seed)) for prompt, seed in zip(prompts, seeds, strict=True)]
        asked = [*self.under_way, *new]
        self.engine.forget()  # as that of a resumed run has: the bits must not tell them apart
        finished, left = self.engine.collect([request for _, request in asked], config.rollouts_per_iteration)
        self.under_way = [(asked[index][0], request) for index, request in left]
        if config.rollout.sleep:
            self.engine.sleep()
        return [asked[index][0] for index, _ in finished], [rollout for _, rollout in finished]

    def plan(self, rollouts: Sequence[Rollout], epoch: int) -> list[list[MicroBatch]]:
        """Minibatches of micro-batches, shuffled anew for each batch and epoch."""
        config = self.config
        seed = [config.runtime.seed, _SHUFFLING, self.batches, epoch]
        return plan_minibatches(rollouts, config.minibatch_size, config.micro_batch_tokens, seed, self.policy.device)

    def shape(self, prompts: list[Prompt], rollouts: list[Rollout], minibatches: list[list[MicroBatch]]) -> Experience:
        """Score the rollouts, transform the scores, add the KL penalty, estimate advantages and returns."""
        config, device = self.config, self.policy.device
        recorded = torch.cat([rollout.logprobs for rollout in rollouts]).to(device)
        policy = recorded if config.old_logprobs == "recorded" else self.policy
        scored = score_rollouts(minibatches, policy, self.reference, self.critic, config.logprob_temperature)
        scores = self.reward(prompts, rollouts)
        shaped_scores = reparameterise(scores, self.moments, config.reward)
        cut_off = torch.tensor([not rollout.finished for rollout in rollouts], device=device)
        shaped = shaped_gae(
            shaped_scores.to(device),
            scored.logprobs,
            scored.ref_logprobs,
            scored.values,
            cumulative([len(rollout.response) for rollout in rollouts], device),
            bootstrap_values=scored.last_values * cut_off if config.bootstrap_truncated else None,
            kl_coef=config.kl_coef,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
        )
        versions = torch.tensor([version for rollout in rollouts for version in rollout.versions], device=device)
        fresh = versions == self.engine.version
        return Experience(
            prompts=prompts,
            rollouts=rollouts,
            scores=scores,
            shaped_scores=shaped_scores,
            judged=self.judge(prompts, rollouts) if self.judge else None,
            scored=scored,
            shaped=shaped,
            advantages=self._finish_advantages(shaped),
            recorded=recorded,
            fresh=fresh,
            old_logprobs=torch.where(fresh, scored.logprobs, recorded.to(scored.logprobs.dtype)),
            importance_weights=self._importance_weights(scored.logprobs, recorded, fresh),
        )

    def _importance_weights(self, recomputed: Tensor, recorded: Tensor, fresh: Tensor) -> Tensor | None:
        """min(recomputed / recorded probability, clip). Tokens of earlier weights have their own old log-probs: 1."""
        bound = self.config.importance_clip
        return None if bound is None else torch.where(fresh, (recomputed - recorded).exp().clamp(max=bound), 1.0)

    def _finish_advantages(self, shaped: ShapedGAE) -> Tensor:
        advantages = shaped.advantages
        if self.config.normalize_advantages:
            std = (shaped.m2 / (shaped.count - 1).clamp(min=1)).sqrt()
            advantages = (advantages - shaped.mean) / (std + 1e-8)
        bound = self.config.advantage_clip
        return advantages if bound is None else advantages.clamp(-bound, bound)

    def update_policy(self, minibatch: Sequence[MicroBatch], experience: Experience) -> StepMetrics:
        """One optimizer step of the policy: clipped surrogate over the minibatch, plus PPO-ptx."""
        self.policy_optimizer.bring_in()
        config, weights = self.config, experience.importance_weights
        base_logprobs = experience.old_logprobs
        if config.ratio_base == "reference":
            base_logprobs = experience.scored.ref_logprobs
        tokens = sum(micro.batch.num_rows for micro in minibatch)
        losses, stats, gaps = [], [], []
        for micro in minibatch:
            old_logprobs = base_logprobs[micro.places]
            result = linear_ppo_loss(
                self.policy.hidden(micro.batch).index_select(0, micro.batch.rows),
                labels=micro.batch.labels,
                old_logprobs=old_logprobs,
                advantages=experience.advantages[micro.places],
                clip_eps=config.clip_eps,
                dual_clip=config.dual_clip,
                importance_weights=None if weights is None else weights[micro.places],
                entropy_coef=config.entropy_coef,
                entropy_bound=config.entropy_bound,
                temperature=config.logprob_temperature,
                normalizer=tokens,
                **self.policy.head,
            )
            result.loss.backward()
            losses.append(result.loss.detach())
            stats.append(result.stats)
            gaps.append((result.logprobs - old_logprobs).abs())
        ptx = {"ptx_loss": self._ptx_backward()} if config.ptx_coef else {}
        return {
            "loss": torch.stack(losses).sum(),
            **_summary("logratio", torch.cat(gaps)),
            **ptx,
            **merge_policy_stats(stats)._asdict(),
            **self.policy_optimizer.step(),
        }

    def _ptx_backward(self) -> Tensor:
        """Add the gradient of ptx_coef * CE on the next dialogues; returns the CE, nats per token."""
        config = self.config
        assert self.ptx_stream is not None, "ptx_coef > 0 needs dialogues"
        dialogues = [self.ptx[index] for index in self.ptx_stream.take(config.ptx_batch_size)]
        return language_modelling_backward(self.policy, dialogues, config.micro_batch_tokens, config.ptx_coef)

    def update_critic(self, minibatch: Sequence[MicroBatch], experience: Experience) -> StepMetrics:
        """One optimizer step of the critic: clipped value loss over the minibatch."""
        self.critic_optimizer.bring_in()
        tokens = sum(micro.batch.num_rows for micro in minibatch)
        losses, stats = [], []
        for micro in minibatch:
            result = value_loss(
                self.critic.read(self.critic.hidden(micro.batch), micro.batch.rows),
                experience.scored.values[micro.places],
                experience.shaped.returns[micro.places],
                clip_eps=self.config.value_clip,
                normalizer=tokens,
            )
            result.loss.backward()
            losses.append(result.loss.detach())
            stats.append(result.stats)
        merged = merge_value_stats(stats)
        return {
            "loss": torch.stack(losses).sum(),
            "clipfrac": merged.clipfrac,
            "explained_variance": merged.explained_variance,
            **self.critic_optimizer.step(),
        }

    def state_dict(self) -> dict[str, Any]:
        """All state but the weights of policy and critic."""
        return {
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "moments": self.moments.state_dict(),
            "batches": self.batches,
            "prompt_position": self.prompt_stream.position,
            "ptx_position": self.ptx_stream.position if self.ptx_stream else 0,
            "version": self.engine.version,
            "under_way": [(asdict(prompt), asdict(request)) for prompt, request in self.under_way],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.moments.load_state_dict(state["moments"])
        self.batches = state["batches"]
        self.engine.version = state["version"]
        self.under_way = [(Prompt(**prompt), Request(**request)) for prompt, request in state["under_way"]]
        self.prompt_stream.position = state["prompt_position"]
        if self.ptx_stream:
            self.ptx_stream.position = state["ptx_position"]


def _summary(name: str, gap: Tensor) -> dict[str, Tensor]:
    """Mean and largest of a gap `[n]` in nats, and the share above 1e-3."""
    return {f"{name}_mean": gap.mean(), f"{name}_max": gap.max(), f"{name}_share": (gap > 1e-3).float().mean()}
