"""What an iteration is measured by: optimizer statistics, and the action-space metrics that reveal a collapse.

The paper's point is that reward and losses do not show a collapse: KL to the reference, response length and
perplexity do (section 5.2).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .batch import Rollout

if TYPE_CHECKING:
    from .ppo import Experience

_MAXIMA = ("ratio_max", "logratio_max")
_FIRST = ("logratio_mean", "logratio_max", "logratio_share")  # also told of the first step alone


class IterationMetrics:
    """Averages over an iteration's optimizer steps, and the time of its phases."""

    def __init__(self) -> None:
        self.steps: dict[str, list[Tensor]] = defaultdict(list)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started

    def add(self, group: str, stats: Mapping[str, Tensor | float]) -> None:
        """One optimizer step's statistics; nothing waits for the device here."""
        for name, value in stats.items():
            if name != "count":
                self.steps[f"{group}/{name}"].append(torch.as_tensor(value))

    def result(self) -> dict[str, float]:
        """Means over the steps (maxima where the name says so; `first_`: of the first step alone), seconds."""
        out = {}
        for name, parts in self.steps.items():
            values = torch.stack([part.detach().float().cpu() for part in parts])
            maximum = name.endswith(_MAXIMA)
            out[name] = float(values.max() if maximum else values.mean())
            if name.endswith(_FIRST):
                out[name.replace("logratio", "first_logratio")] = float(values[0])
        return out | {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}


def experience_metrics(experience: Experience) -> dict[str, float]:
    """Rewards, KL, perplexity, length and value fit of an iteration's rollouts, before any update."""
    scored, shaped, rollouts = experience.scored, experience.shaped, experience.rollouts
    judged = {} if experience.judged is None else {"reward/judge_mean": float(experience.judged.mean())}
    return {
        **judged,
        "reward/score_mean": float(experience.scores.mean()),
        "reward/score_std": float(experience.scores.std(correction=0)),
        "reward/shaped_score_mean": float(experience.shaped_scores.mean()),
        "reward/total_mean": float(shaped.rewards.sum() / len(rollouts)),
        "critic/value_mean": float(scored.values.mean()),
        "critic/return_mean": float(shaped.returns.mean()),
        "policy/advantage_std": float(experience.advantages.std(correction=0)),
        **action_metrics(rollouts, scored.logprobs, scored.ref_logprobs),
    }


def action_metrics(rollouts: Sequence[Rollout], logprobs: Tensor, ref_logprobs: Tensor) -> dict[str, float]:
    """The action-space metrics.

    Args:
        logprobs, ref_logprobs: `[N]` of all response tokens in order.

    Returns:
        kl/ref: mean of log pi - log pi_ref per token (k1: unbiased, may be negative on a sample);
        kl/ref_k3: the never-negative estimator of the same; kl/ref_per_response: k1 summed over a response;
        ppl/policy, ppl/reference: exp(NLL per token) under either, the first falls in a collapse, the second rises;
        ppl/released_code: exp(sum over responses of their mean NLL / all tokens), the quantity that the released
        code calls perplexity: it falls merely because responses get longer.
    """
    lengths = [len(rollout.response) for rollout in rollouts]
    log_ratio = logprobs - ref_logprobs
    mean_nll = torch.stack([-part.mean() for part in logprobs.split(lengths)])
    return {
        "kl/ref": float(log_ratio.mean()),
        "kl/ref_k3": float((torch.expm1(-log_ratio) + log_ratio).mean()),
        "kl/ref_per_response": float(log_ratio.sum() / len(rollouts)),
        "ppl/policy": math.exp(-float(logprobs.mean())),
        "ppl/reference": math.exp(-float(ref_logprobs.mean())),
        "ppl/released_code": math.exp(float(mean_nll.sum()) / sum(lengths)),
        "response/length_mean": sum(lengths) / len(lengths),
        "response/length_max": float(max(lengths)),
        "response/cut_off": sum(not rollout.finished for rollout in rollouts) / len(rollouts),
    }


def sampler_gap(recorded: Tensor, recomputed: Tensor, fresh: Tensor) -> dict[str, float]:
    """How far the log-probs `[N]` recorded while sampling are from recomputed ones, nats.

    Of tokens that the present weights drew (`fresh`), whose log-probs would be equal in exact arithmetic; `share` is
    that of those more than 1e-3 apart. Beside it the share of tokens that earlier weights drew.
    """
    gap = (recorded - recomputed).abs()[fresh]
    gap = gap if gap.numel() else gap.new_zeros(1)
    return {
        "rollout/logprob_gap_mean": float(gap.mean()),
        "rollout/logprob_gap_max": float(gap.max()),
        "rollout/logprob_gap_share": float((gap > 1e-3).float().mean()),
        "rollout/stale_share": float((~fresh).float().mean()),
    }
