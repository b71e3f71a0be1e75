"""PPO-max on models in memory. `PPO.iterate` is one iteration of the algorithm, top to bottom.

Loading, resuming, saving and display stand in `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.api import ShapedGAE, merge_policy_stats, merge_value_stats, shaped_gae
from .batch import Minibatch, Prompt, Request, Rollout, cumulative, deal_requests, plan_minibatches, quotas
from .config import PPOConfig
from .data import ShuffledStream
from .lora import has_adapter, sum_gradients
from .measures import IterationMetrics, experience_metrics, sampler_gap
from .models import CausalModel, ScalarModel
from .optim import Optimizer
from .parallel import ALONE, Ranks, is_sharded
from .rewards import ModelReward, Reward, RunningMoments, reparameterise
from .rollout import RolloutEngine, RolloutStatistics, random_seeds
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
        ranks: the processes that train together; each calls all methods and gets the same results.
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
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.reward, self.prompts, self.ptx, self.judge = config, reward, prompts, ptx, judge
        self.policy, self.critic, self.ranks = policy, critic, ranks
        self.reference = reference.requires_grad_(False)
        ranks.check_same("prompts", (prompt.tokens for prompt in prompts))
        ranks.check_same("dialogues", (dialogue.tokens for dialogue in ptx))
        if not has_adapter(policy):  # else the three share their weights, which each process has whole
            for model in (policy, critic):
                ranks.shard(model)
            ranks.shard(reference, frozen=True)
        for source in (reward, judge):
            if isinstance(source, ModelReward):
                ranks.shard(source.model, frozen=True)
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
        sampled = RolloutStatistics.together(self.ranks.gather([self.engine.statistics.since(before)]))
        rollout_metrics = {**self._gap(experience), **sampled.metrics()}
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
        finished, left = self._sample([request for _, request in asked])
        self.under_way = [(asked[index][0], request) for index, request in left]
        if config.rollout.sleep:
            self.engine.sleep()
        return [asked[index][0] for index, _ in finished], [rollout for _, rollout in finished]

    def _sample(self, requests: Sequence[Request]) -> tuple[list[tuple[int, Rollout]], list[tuple[int, Request]]]:
        """`RolloutEngine.collect`, each process with its part of the requests."""
        config, ranks = self.config, self.ranks
        parts = deal_requests(requests, config.rollout.max_response, ranks.size)
        own = parts[ranks.rank]
        enough = quotas([len(part) for part in parts], config.rollouts_per_iteration)[ranks.rank]
        with ranks.gathered(self.policy):
            finished, left = self.engine.collect([requests[index] for index in own], enough)
        if is_sharded(self.policy):
            self.engine.decoder.forget()  # graphs hold addresses of weights, which are gone
        return (
            sorted(ranks.gather([(own[index], rollout) for index, rollout in finished]), key=itemgetter(0)),
            sorted(ranks.gather([(own[index], request) for index, request in left]), key=itemgetter(0)),
        )

    def plan(self, rollouts: Sequence[Rollout], epoch: int) -> list[Minibatch]:
        """Minibatches of micro-batches, shuffled anew for each batch and epoch."""
        config, ranks = self.config, self.ranks
        seed = [config.runtime.seed, _SHUFFLING, self.batches, epoch]
        return plan_minibatches(
            rollouts, config.minibatch_size, config.micro_batch_tokens, seed, self.policy.device,
            rank=ranks.rank, processes=ranks.size,
        )  # fmt: skip

    def shape(self, prompts: list[Prompt], rollouts: list[Rollout], minibatches: list[Minibatch]) -> Experience:
        """Score the rollouts, transform the scores, add the KL penalty, estimate advantages and returns."""
        config, device = self.config, self.policy.device
        recorded = torch.cat([rollout.logprobs for rollout in rollouts]).to(device)
        policy = recorded if config.old_logprobs == "recorded" else self.policy
        models = (policy, self.reference, self.critic)
        scored = score_rollouts(minibatches, *models, config.logprob_temperature, self.ranks)
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

    def update_policy(self, minibatch: Minibatch, experience: Experience) -> StepMetrics:
        """One optimizer step of the policy: clipped surrogate over the minibatch, plus PPO-ptx."""
        self.policy_optimizer.bring_in()
        config, weights = self.config, experience.importance_weights
        base_logprobs = experience.old_logprobs
        if config.ratio_base == "reference":
            base_logprobs = experience.scored.ref_logprobs
        losses, stats, gaps = [], [], []
        for micro in minibatch:
            old_logprobs = base_logprobs[micro.places]
            result = self.policy.policy_loss(
                micro.batch,
                old_logprobs=old_logprobs,
                advantages=experience.advantages[micro.places],
                clip_eps=config.clip_eps,
                dual_clip=config.dual_clip,
                importance_weights=None if weights is None else weights[micro.places],
                entropy_coef=config.entropy_coef,
                entropy_bound=config.entropy_bound,
                temperature=config.logprob_temperature,
                normalizer=minibatch.rows,
            )
            result.loss.backward()
            losses.append(result.loss.detach())
            stats.append(result.stats)
            gaps.append(_gap_of(result.logprobs, old_logprobs))
        ptx = {"ptx_loss": self._ptx_backward()} if config.ptx_coef else {}
        sum_gradients(self.policy, self.ranks)
        return {
            "loss": self.ranks.sum(torch.stack(losses).sum()),
            **_summary("logratio", self.ranks.gather_stats(gaps)),
            **ptx,
            **merge_policy_stats(self.ranks.gather_stats(stats))._asdict(),
            **self.policy_optimizer.step(),
        }

    def _ptx_backward(self) -> Tensor:
        """Add the gradient of ptx_coef * CE on the next dialogues; returns the CE, nats per token."""
        config = self.config
        assert self.ptx_stream is not None, "ptx_coef > 0 needs dialogues"
        dialogues = [self.ptx[index] for index in self.ptx_stream.take(config.ptx_batch_size)]
        return language_modelling_backward(
            self.policy, dialogues, config.micro_batch_tokens, config.ptx_coef, self.ranks
        )

    def update_critic(self, minibatch: Minibatch, experience: Experience) -> StepMetrics:
        """One optimizer step of the critic: clipped value loss over the minibatch."""
        self.critic_optimizer.bring_in()
        losses, stats = [], []
        for micro in minibatch:
            result = self.critic.value_loss(
                micro.batch,
                experience.scored.values[micro.places],
                experience.shaped.returns[micro.places],
                clip_eps=self.config.value_clip,
                normalizer=minibatch.rows,
            )
            result.loss.backward()
            losses.append(result.loss.detach())
            stats.append(result.stats)
        sum_gradients(self.critic, self.ranks)
        merged = merge_value_stats(self.ranks.gather_stats(stats))
        return {
            "loss": self.ranks.sum(torch.stack(losses).sum()),
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


class _Gap(NamedTuple):
    """Of the distances between two log-probs of n tokens, nats."""

    total: Tensor
    largest: Tensor
    above: Tensor
    """How many are above 1e-3"""
    tokens: Tensor


def _gap_of(logprobs: Tensor, others: Tensor) -> _Gap:
    gap = (logprobs - others).abs()
    largest = gap.max() if gap.numel() else gap.new_zeros(())
    return _Gap(gap.sum(), largest, (gap > 1e-3).sum(dtype=gap.dtype), gap.new_full((), gap.numel()))


def _summary(name: str, gaps: Sequence[_Gap]) -> dict[str, Tensor]:
    """Mean and largest of all tokens' gaps, and the share above 1e-3."""
    total, largest, above, tokens = (torch.stack(parts) for parts in zip(*gaps, strict=True))
    count = tokens.sum()
    return {f"{name}_mean": total.sum() / count, f"{name}_max": largest.max(), f"{name}_share": above.sum() / count}
