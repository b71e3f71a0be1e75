"""What an iteration is measured by, against loops over responses and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ppomax.engine.batch import Rollout
from ppomax.engine.measures import IterationMetrics, action_metrics, sampler_gap
from torch import Tensor


@st.composite
def measured(draw: Callable) -> tuple[list[Rollout], Tensor, Tensor]:
    """Rollouts, and the log-probs of their tokens under the policy and the reference."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rollouts = [
        Rollout([3], [4] * length, -torch.rand(length, generator=generator), draw(st.booleans()), [0] * length)
        for length in lengths
    ]
    logprobs, ref = (-3 * torch.rand(sum(lengths), generator=generator, dtype=torch.float64) for _ in range(2))
    return rollouts, logprobs, ref


@given(measured())
def test_action_metrics_against_loops(drawn: tuple[list[Rollout], Tensor, Tensor]) -> None:
    rollouts, logprobs, ref_logprobs = drawn
    metrics = action_metrics(rollouts, logprobs, ref_logprobs)
    tokens = iter(zip(logprobs.tolist(), ref_logprobs.tolist(), strict=True))
    count, k1, k3, nll, ref_nll, released = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    for rollout in rollouts:
        own = 0.0
        for _ in rollout.response:
            p, q = next(tokens)
            count += 1
            k1 += p - q
            k3 += math.exp(q - p) - 1 - (q - p)
            own -= p
            ref_nll -= q
        nll += own
        released += own / len(rollout.response)
    lengths = [len(rollout.response) for rollout in rollouts]
    assert metrics == pytest.approx({
        "kl/ref": k1 / count,
        "kl/ref_k3": k3 / count,
        "kl/ref_per_response": k1 / len(rollouts),
        "ppl/policy": math.exp(nll / count),
        "ppl/reference": math.exp(ref_nll / count),
        "ppl/released_code": math.exp(released / count),
        "response/length_mean": sum(lengths) / len(rollouts),
        "response/length_max": max(lengths),
        "response/cut_off": sum(not rollout.finished for rollout in rollouts) / len(rollouts),
    }, rel=1e-9)  # fmt: skip
    assert metrics["kl/ref_k3"] >= 0


def uniform_rollouts(length: int, count: int = 4) -> tuple[list[Rollout], Tensor]:
    """Responses of so many tokens, each token of probability 1/2."""
    logprobs = torch.full((length * count,), -math.log(2))
    return [Rollout([3], [4] * length, part, True, [0] * length) for part in logprobs.split(length)], logprobs


def test_the_released_codes_perplexity_falls_with_length_alone() -> None:
    for length in (10, 100):
        rollouts, logprobs = uniform_rollouts(length)
        metrics = action_metrics(rollouts, logprobs, logprobs)
        assert metrics["ppl/policy"] == pytest.approx(2.0)
        assert metrics["ppl/released_code"] == pytest.approx(2 ** (1 / length))
        assert metrics["kl/ref"] == metrics["kl/ref_k3"] == 0


def test_a_collapse_moves_the_two_perplexities_apart() -> None:
    """A policy that repeats itself is sure of it; the reference is not."""
    rollouts, logprobs = uniform_rollouts(10)
    metrics = action_metrics(rollouts, logprobs / 10, logprobs * 3)
    assert metrics["ppl/policy"] == pytest.approx(2**0.1)
    assert metrics["ppl/reference"] == pytest.approx(8.0)
    assert metrics["kl/ref_per_response"] == pytest.approx(10 * 2.9 * math.log(2))


def test_the_samplers_gap() -> None:
    recorded, recomputed = torch.tensor([-1.0, -2.0, -3.0, -9.0]), torch.tensor([-1.0, -2.5, -2.75, -1.0])
    gap = sampler_gap(recorded, recomputed, fresh=torch.tensor([True, True, True, False]))
    assert gap == pytest.approx(
        {
            "rollout/logprob_gap_mean": 0.25,
            "rollout/logprob_gap_max": 0.5,
            "rollout/logprob_gap_share": 2 / 3,
            "rollout/stale_share": 0.25,
        }
    )
    nothing_fresh = sampler_gap(recorded, recomputed, torch.zeros(4, dtype=torch.bool))
    assert nothing_fresh["rollout/logprob_gap_max"] == 0.0
    assert nothing_fresh["rollout/stale_share"] == 1.0


def test_iteration_metrics() -> None:
    metrics = IterationMetrics()
    with metrics.timed("update"):
        metrics.add("policy", {"loss": torch.tensor(1.0), "ratio_max": 3.0, "logratio_max": 0.0, "count": 7})
        metrics.add("policy", {"loss": 2.0, "ratio_max": torch.tensor(2.0), "logratio_max": 0.5, "count": 8})
        metrics.add("critic", {"loss": 5.0})
    result = metrics.result()
    assert 0 <= result.pop("time/update") < 10
    assert result == {
        "policy/loss": 1.5,
        "policy/ratio_max": 3.0,
        "policy/logratio_max": 0.5,
        "policy/first_logratio_max": 0.0,
        "critic/loss": 5.0,
    }
