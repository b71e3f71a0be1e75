"""The definition of the PPO losses, in float64: against loops written from the papers, packed, padded and in pieces."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ppomax.kernels.ppo_loss import policy_loss, ppo_loss, value_loss
from ppomax.kernels.ppo_terms import PolicyOptions, ValueOptions, row_numbers
from torch import Tensor

REDUCTIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
ALL = {
    "clip_eps_high": 0.28, "dual_clip": 3.0, "entropy_coef": 0.01, "entropy_bound": 1.2, "kl_coef": 0.1,
    "importance_weights": True,
}  # fmt: skip
POLICY_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "asymmetric": {"clip_eps": 0.1, "clip_eps_high": 0.3},
    "dual": {"dual_clip": 1.5},
    "dual-inside-the-range": {"dual_clip": 1.05},
    "entropy": {"entropy_coef": 0.1},
    "bounded-entropy": {"entropy_coef": 0.1, "entropy_bound": 1.0},
    "k1": {"kl_coef": 0.2, "kl_kind": "k1"},
    "k2": {"kl_coef": 0.2, "kl_kind": "k2"},
    "k3": {"kl_coef": 0.2},
    "weighted": {"importance_weights": True},
    "all": ALL,
}


def policy_term(f: dict[str, float], options: dict[str, Any]) -> float:
    """One token, from the papers."""
    eps = options.get("clip_eps", 0.2)
    high = options.get("clip_eps_high", eps)
    ratio = math.exp(f["logprobs"] - f["old_logprobs"])
    a = f["advantages"]
    term = max(-a * ratio, -a * min(max(ratio, 1 - eps), 1 + high))
    if a < 0 and "dual_clip" in options:
        term = min(term, -a * options["dual_clip"])
    if "importance_weights" in options:
        term *= f["importance_weights"]
    if f["entropy"] < options.get("entropy_bound", math.inf):
        term -= options.get("entropy_coef", 0.0) * f["entropy"]
    d = f["logprobs"] - f["ref_logprobs"]
    kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[options.get("kl_kind", "k3")]
    return term + options.get("kl_coef", 0.0) * kl


def value_term(f: dict[str, float], eps: float | None) -> float:
    error = (f["values"] - f["returns"]) ** 2
    if eps is None:
        return 0.5 * error
    moved = min(max(f["values"] - f["old_values"], -eps), eps)
    return 0.5 * max(error, (f["old_values"] + moved - f["returns"]) ** 2)


def reduced(term: Callable[[dict[str, float]], float], fields: Any, reduction: str) -> float:
    """The loss of the batch by a loop over sequences and tokens."""
    sums, counts = [], []
    for b in range(fields.mask.shape[0]):
        kept = [t for t in range(fields.mask.shape[1]) if fields.mask[b, t]]
        sums.append(sum(term({name: float(x[b, t]) for name, x in fields.items()}) for t in kept))
        counts.append(len(kept))
    used = [(s, n) for s, n in zip(sums, counts, strict=True) if n]
    if reduction == "token-mean":
        return sum(sums) / sum(counts)
    if reduction == "token-sum":
        return sum(sums)
    if reduction == "seq-mean-token-sum":
        return sum(s for s, _ in used) / len(used)
    return sum(s / n for s, n in used) / len(used)


@pytest.fixture
def fields(tokens: Any) -> Any:
    made = tokens([7, 1, 12, 5], torch.float64)
    made.mask[1] = False  # a sequence without a token that counts
    return made


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", POLICY_OPTIONS.values(), ids=POLICY_OPTIONS.keys())
def test_policy_loss_is_the_papers(options: dict, reduction: str, fields: Any) -> None:
    loss, _ = policy_loss(*fields.policy(), fields.mask, reduction=reduction, **fields.options(options))
    assert float(loss) == pytest.approx(reduced(lambda f: policy_term(f, options), fields, reduction), rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("eps", [0.2, None])
def test_value_loss_is_the_papers(eps: float | None, reduction: str, fields: Any) -> None:
    loss, _ = value_loss(*fields.critic(), fields.mask, clip_eps=eps, reduction=reduction)
    assert float(loss) == pytest.approx(reduced(lambda f: value_term(f, eps), fields, reduction), rel=1e-12)


@pytest.mark.parametrize("options", POLICY_OPTIONS.values(), ids=POLICY_OPTIONS.keys())
def test_policy_gradcheck(options: dict, fields: Any) -> None:
    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        fields.update(logprobs=logprobs, entropy=entropy)
        return policy_loss(*fields.policy(), fields.mask, **fields.options(options)).loss

    torch.autograd.gradcheck(loss, (fields["logprobs"].requires_grad_(), fields["entropy"].requires_grad_()))


@pytest.mark.parametrize("eps", [0.2, None])
def test_value_gradcheck(eps: float | None, fields: Any) -> None:
    values, *rest = fields.critic()
    torch.autograd.gradcheck(lambda v: value_loss(v, *rest, fields.mask, clip_eps=eps).loss, (values.requires_grad_(),))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_equals_padded(reduction: str, fields: Any) -> None:
    flat, options = fields.packed(), {"reduction": reduction, **ALL}
    padded = policy_loss(*fields.policy(), fields.mask, **fields.options(options))
    packed = policy_loss(*flat.policy(), flat.mask, cu_seqlens=flat.bounds, **flat.options(options))
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(packed.stats, padded.stats)
    a = value_loss(*fields.critic(), fields.mask, reduction=reduction)
    b = value_loss(*flat.critic(), flat.mask, reduction=reduction, cu_seqlens=flat.bounds)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-13, atol=0)


def test_ppo_loss_is_the_sum_of_its_parts(fields: Any) -> None:
    options = fields.options(ALL)
    both = ppo_loss(
        *fields.policy(), *fields.critic(), fields.mask, value_clip_eps=0.1, value_coef=0.7, **options
    )  # fmt: skip
    p = policy_loss(*fields.policy(), fields.mask, **options)
    v = value_loss(*fields.critic(), fields.mask, clip_eps=0.1, coef=0.7)
    torch.testing.assert_close(both, (p.loss + v.loss, p.loss, v.loss, p.stats, v.stats), equal_nan=True)


def test_whitening_is_applied_to_advantages(fields: Any) -> None:
    mean, rstd = torch.tensor(0.4, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    lazily = policy_loss(*fields.policy(), fields.mask, whiten=(mean, rstd))
    fields["advantages"] = (fields["advantages"] - mean) * rstd
    torch.testing.assert_close(lazily, policy_loss(*fields.policy(), fields.mask), equal_nan=True)


def test_numbers_for_kernels() -> None:
    row = row_numbers(PolicyOptions(0.1, 0.3, entropy_coef=0.5, kl_coef=0.25), ValueOptions(None, 0.7))
    assert row == (0.9, 1.3, math.inf, math.inf, 0.5, math.inf, 0.25, math.inf, 0.7)
    row = row_numbers(PolicyOptions(dual_clip=3.0, entropy_bound=1.5, log_ratio_clamp=20.0), ValueOptions(0.4))
    assert row == (0.8, 1.2, 3.0, 20.0, 0.0, 1.5, 0.0, 0.4, 0.5)
