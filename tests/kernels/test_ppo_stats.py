"""The statistics of the PPO losses, in float64, and how those of several calls are joined."""

from typing import Any

import pytest
import torch
from ppomax.kernels.ppo_loss import policy_loss, value_loss
from ppomax.kernels.ppo_stats import merge_policy_stats, merge_value_stats

LENGTHS = [6, 3, 9, 4, 8]
ALL = {"dual_clip": 1.5, "entropy_coef": 0.01, "kl_coef": 0.1, "importance_weights": True}


@pytest.fixture
def fields(tokens: Any) -> Any:
    return tokens(LENGTHS, torch.float64)


def test_statistics_by_their_definition(fields: Any) -> None:
    _, stats = policy_loss(*fields.policy(), fields.mask, **fields.options({"dual_clip": 1.5, "entropy_coef": 0.1}))
    log_ratio = (fields["logprobs"] - fields["old_logprobs"])[fields.mask]
    ratio, a = log_ratio.exp(), fields["advantages"][fields.mask]
    low, high, dual = (a < 0) & (ratio < 0.8), (a > 0) & (ratio > 1.2), (a < 0) & (ratio > 1.5)
    expected = {
        "clipfrac": (low | high), "clipfrac_low": low, "clipfrac_dual": dual, "approx_kl": (ratio - 1) - log_ratio,
        "ratio_mean": ratio, "entropy": fields["entropy"][fields.mask], "active_fraction": ~(low | high | dual),
    }  # fmt: skip
    for name, x in expected.items():
        assert float(getattr(stats, name)) == pytest.approx(float(x.double().mean()), rel=1e-5), name
    assert float(stats.ratio_max) == pytest.approx(float(ratio.max()))
    assert float(stats.count) == int(fields.mask.sum())
    assert all(s.dtype == torch.float32 and s.dim() == 0 for s in stats)


def test_explained_variance_by_its_definition(fields: Any) -> None:
    _, stats = value_loss(*fields.critic(), fields.mask)
    r, v = fields["returns"][fields.mask], fields["values"][fields.mask]
    assert float(stats.explained_variance) == pytest.approx(1 - float((r - v).var() / r.var()), rel=1e-5)
    assert float(stats.return_var) == pytest.approx(float(r.var(unbiased=False)), rel=1e-5)


@pytest.mark.parametrize("reduction", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_micro_batches_add_up(reduction: str, fields: Any) -> None:
    options = {"reduction": reduction, **ALL}
    whole = policy_loss(*fields.policy(), fields.mask, **fields.options(options))
    normalizer = {"token-mean": fields.mask.sum(), "token-sum": 1.0}.get(reduction, (fields.mask.any(1)).sum())
    parts = []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        tensors = {name: x[rows] for name, x in fields.options(options).items() if isinstance(x, torch.Tensor)}
        part = [x[rows] for x in (*fields.policy(), fields.mask)]
        parts.append(policy_loss(*part, **{**fields.options(options), **tensors}, normalizer=normalizer))
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(merge_policy_stats([p.stats for p in parts]), whole.stats)


def test_value_stats_merge(fields: Any) -> None:
    whole = value_loss(*fields.critic(), fields.mask)
    parts = [
        value_loss(*(x[i : i + 1] for x in (*fields.critic(), fields.mask))) for i in range(len(LENGTHS))
    ]  # fmt: skip
    torch.testing.assert_close(merge_value_stats([p.stats for p in parts]), whole.stats)
