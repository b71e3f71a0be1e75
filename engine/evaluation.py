"""Win / tie / lose of one policy against another on held-out prompts, judged by a reward model or functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from .batch import Prompt, Rollout, plan_minibatches
from .config import EvalConfig
from .data import OnBad, Paths, read_prompts, split_by_context
from .measures import action_metrics
from .models import CausalModel, Placement, check_same_tokenizer, check_vocabulary, load_policy, load_tokenizer
from .parallel import ALONE, Ranks, is_sharded
from .prompts import encode_prompts
from .rewards import Reward, Source, make_reward
from .rollout import RolloutEngine, random_seeds
from .scoring import logprobs_of
from .templates import Style, Template

_SEED = 3


@dataclass(frozen=True)
class Answers:
    """One policy's responses to S prompts, and what the judges say of them."""

    prompts: Sequence[Prompt]
    rollouts: list[Rollout]
    scores: dict[str, Tensor]
    """Judge -> `[S]`"""
    logprobs: Tensor
    """`[N]` under the policy itself, all responses in order"""
    ref_logprobs: Tensor
    """`[N]` under the reference"""

    def summary(self) -> dict[str, float]:
        """`JUDGE_mean` for each judge, and the action-space metrics."""
        means = {f"{judge}_mean": float(scores.mean()) for judge, scores in self.scores.items()}
        return means | action_metrics(self.rollouts, self.logprobs, self.ref_logprobs)


@torch.no_grad()
def answer_and_judge(
    engine: RolloutEngine,
    reference: CausalModel,
    prompts: Sequence[Prompt],
    judges: Mapping[str, Reward],
    *,
    micro_batch_tokens: int,
    seed: int,
    ranks: Ranks = ALONE,
) -> Answers:
    """Sample one response to each prompt and score it. The same seed draws the same random numbers."""
    seeds = random_seeds(len(prompts), seed, _SEED)
    own = ranks.share([1] * len(prompts))
    with ranks.gathered(engine.policy):
        drawn = engine.generate([prompts[i].tokens for i in own], [seeds[i] for i in own])
    if is_sharded(engine.policy):
        engine.decoder.forget()  # graphs hold addresses of weights, which are gone
    rollouts = [rollout for _, rollout in sorted(ranks.gather(list(zip(own, drawn, strict=True))), key=itemgetter(0))]
    (whole,) = plan_minibatches(
        rollouts, len(rollouts), micro_batch_tokens, None, reference.device, rank=ranks.rank, processes=ranks.size
    )
    return Answers(
        prompts=prompts,
        rollouts=rollouts,
        scores={name: judge(prompts, rollouts) for name, judge in judges.items()},
        logprobs=logprobs_of(engine.policy, [whole], ranks=ranks)[0],
        ref_logprobs=logprobs_of(reference, [whole], ranks=ranks)[0],
    )


@dataclass(frozen=True)
class WinRate:
    """Shares of prompts on which the policy's answer is judged better, alike, worse than the baseline's."""

    win: float
    tie: float
    lose: float


@dataclass(frozen=True)
class Evaluation:
    """A policy beside its baseline."""

    policy: Answers
    baseline: Answers
    tie_margin: float
    """Scores closer than this many of the baseline's standard deviations are a tie"""

    def win_rate(self, judge: str) -> WinRate:
        difference = self.policy.scores[judge] - self.baseline.scores[judge]
        margin = self.tie_margin * float(self.baseline.scores[judge].std(correction=0))
        outcomes = (difference > margin, difference.abs() <= margin, difference < -margin)
        return WinRate(*(float(outcome.double().mean()) for outcome in outcomes))

    def gain(self, judge: str) -> tuple[float, float]:
        """Mean difference of the scores, policy - baseline, and half of its 95 % interval over prompts (NaN of one)."""
        difference = self.policy.scores[judge] - self.baseline.scores[judge]
        deviation = float(difference.std()) if len(difference) > 1 else math.nan
        return float(difference.mean()), 1.96 * deviation / math.sqrt(len(difference))


def evaluate(
    policy: str | Path,
    baseline: str | Path,
    prompts: Paths,
    judges: Mapping[str, Source],
    config: EvalConfig,
    template: Style = "auto",
    on_bad: OnBad = "raise",
) -> Evaluation:
    """Answer held-out prompts with both policies and judge the answers.

    Args:
        policy, baseline: Hugging Face folders with the same tokenizer; KL is against the baseline.
        judges: name -> reward-model folder, `module:function` or function.

    Raises:
        InputError: unusable folders or files, or different tokenizers.
    """
    placement = Placement.of(config.runtime)
    tokenizer = load_tokenizer(policy)
    check_same_tokenizer(tokenizer, load_tokenizer(baseline), f"{policy} and {baseline}")
    format = Template(tokenizer, template)
    rewards = {name: make_reward(judge, format, placement, config.micro_batch_tokens) for name, judge in judges.items()}
    dialogues = read_prompts(prompts, on_bad)
    if config.held_out:
        _, dialogues = split_by_context(dialogues, config.held_out, config.runtime.seed)
    items = encode_prompts(format, dialogues[: config.max_prompts], config.max_prompt, on_bad)
    trained, reference = (load_policy(folder, placement) for folder in (policy, baseline))
    for folder, model in ((policy, trained), (baseline, reference)):
        check_vocabulary(tokenizer, model, folder)
    answers = []
    for model in (trained, reference):
        engine = RolloutEngine(
            model, config.rollout, format.eos_token_ids, config.max_prompt, decode=format.tokenizer.decode
        )
        answers.append(
            answer_and_judge(
                engine,
                reference,
                items,
                rewards,
                micro_batch_tokens=config.micro_batch_tokens,
                seed=config.runtime.seed,
            )
        )
    return Evaluation(answers[0], answers[1], config.tie_margin)
