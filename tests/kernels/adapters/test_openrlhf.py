"""The OpenRLHF adapter: against loops over OpenRLHF's documented conventions, and against its own modules."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppomax.kernels.adapters import openrlhf

GLOBAL: dict[str, Any] = {"dp_size": 2, "batch_num_tokens": 77.0, "global_batch_size": 12.0}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "off": {},
    "token-mask": {"is_correction_level": "token", "is_correction_threshold": (0.8, 1.25)},
    "token-clip": {
        "is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.8, 1.25),
    },
    "token-kl": {
        "is_correction_level": "token", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.02),
    },
    "token-tv": {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.03)},
    "seq-mask": {"is_correction_level": "seq", "is_correction_threshold": (0.8, 1.1)},
    "seq-kl": {
        "is_correction_level": "seq", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.02),
    },
}  # fmt: skip


def weights(f: Any, loops: Any, token_level: bool, info: dict[str, Any]) -> list[list[float]]:
    total = info.get("batch_num_tokens" if token_level else "global_batch_size")
    rows = loops.weights(f.keep, "token-mean" if token_level else "seq-mean-token-mean", total)
    return [[w * info.get("dp_size", 1) for w in row] for row in rows]


def divergence(old: float, rollout: float, gating: str) -> float:
    """What a token is judged by."""
    p, q = math.exp(rollout), math.exp(old)
    if gating == "ratio":
        return q / p
    return abs(p - q) if gating == "tv" else p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def correction(f: Any, loops: Any, options: dict[str, Any]) -> tuple[list[list[float]], float]:
    """(each token's weight, fraction of units outside)."""
    gating, (low, high) = options.get("is_correction_gating", "ratio"), options["is_correction_threshold"]
    judged, of_rows, result = [], [], []
    for old, rollout, flags in zip(f.rows("old_logprobs"), f.rows("rollout_logprobs"), f.keep, strict=True):
        row = [divergence(o, r, gating) if k else 1.0 for o, r, k in zip(old, rollout, flags, strict=True)]
        mean = loops.row_mean([math.log(x) for x in row] if gating == "ratio" else row, flags)
        of_rows.append(math.exp(mean) if gating == "ratio" else mean)
        judged.append([of_rows[-1]] * len(row) if options["is_correction_level"] == "seq" else row)
        ratios = [math.exp(o - r) if k else 0.0 for o, r, k in zip(old, rollout, flags, strict=True)]
        if options.get("is_correction_mode") == "clip":
            result.append([min(max(x, low), high) for x in ratios])
        else:
            result.append([x if low <= y <= high else 0.0 for x, y in zip(ratios, judged[-1], strict=True)])
    outside = [[float(not low <= y <= high) for y in row] for row in judged]
    if options["is_correction_level"] == "seq":
        kept = [row[0] for row, flags in zip(outside, f.keep, strict=True) if any(flags)]
        return result, sum(kept) / len(kept)
    return result, loops.mean(outside, f.keep)


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("token_level", [True, False], ids=["tokens", "sequences"])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_policy_loss(name: str, token_level: bool, info: dict[str, Any], fields: Any, loops: Any, same: Any) -> None:
    f, options = fields(empty=True), CORRECTIONS[name]
    new = f.leaf("logprobs")
    module = openrlhf.PolicyLoss(0.15, 0.3, 1.4, token_level, **options)
    loss, clip_ratio, ppo_kl, vllm_kl, filtered = module(
        new, f.old_logprobs, f.advantages, f.mask.long(), f.rollout_logprobs, **info
    )
    factors = [[1.0] * 9] * 5
    if options:
        factors, share = correction(f, loops, options)
        same(filtered, share)
        assert 0 < share < 1
        kl = loops.tokens(f, lambda r, o: SimpleNamespace(k1=r - o), "rollout_logprobs", "old_logprobs")
        same(vllm_kl, loops.share(kl, "k1"))
    else:
        assert vllm_kl is filtered is None
    tokens = loops.tokens(
        f, lambda n, o, a: loops.clipped(n, o, a, 0.15, 0.3, 1.4, 20.0), "logprobs", "old_logprobs", "advantages"
    )
    w = [
        [x * y for x, y in zip(*row, strict=True)]
        for row in zip(weights(f, loops, token_level, info), factors, strict=True)
    ]
    same(loss, loops.total(w, tokens))
    same(torch.autograd.grad(loss, new)[0], loops.slopes(w, tokens))
    same(clip_ratio, loops.share(tokens, "held"))
    kl = loops.tokens(f, lambda o, n: SimpleNamespace(k1=o - n), "old_logprobs", "logprobs")
    same(ppo_kl, loops.share(kl, "k1"))


def test_ranks_count_only_with_totals(fields: Any) -> None:
    f = fields()
    for token_level in (True, False):
        policy, value = openrlhf.PolicyLoss(token_level_loss=token_level), openrlhf.ValueLoss(0.2, token_level)
        for module, inputs in (
            (policy, (f.logprobs, f.old_logprobs, f.advantages, f.mask)),
            (value, (f.values, f.old_values, f.returns, f.mask)),
        ):
            one, two = module(*inputs), module(*inputs, dp_size=2)
            assert torch.equal(*(x[0] if isinstance(x, tuple) else x for x in (one, two)))


@pytest.mark.parametrize("against", ["old", "rollout"])
def test_one_ratio_a_sequence(against: str, fields: Any, loops: Any, same: Any) -> None:
    f = fields(empty=True)
    new = f.leaf("logprobs")
    level = {"old": "off", "rollout": "token"}[against]
    module = openrlhf.PolicyLoss(0.05, 0.05, None, True, "gspo", is_correction_level=level)
    loss, clip_ratio, _, vllm_kl, _ = module(new, f.old_logprobs, f.advantages, f.mask, f.rollout_logprobs)
    base = f.rows({"old": "old_logprobs", "rollout": "rollout_logprobs"}[against])
    ratios = [
        loops.row_mean([n - o for n, o in zip(*row, strict=True)], flags)
        for row, flags in zip(zip(f.rows("logprobs"), base, strict=True), f.keep, strict=True)
    ]
    counts = [sum(flags) for flags in f.keep]
    w = loops.weights(f.keep, "seq-mean-token-mean")
    tokens = [
        [loops.clipped(ratio, 0.0, a, 0.05, 0.05) if k else None for a, k in zip(*row, strict=True)]
        for ratio, row in zip(ratios, zip(f.rows("advantages"), f.keep, strict=True), strict=True)
    ]
    rows = [sum(row) / max(count, 1) for row, count in zip(loops.slopes(w, tokens), counts, strict=True)]
    same(loss, loops.total(w, tokens))
    same(torch.autograd.grad(loss, new)[0], [[x * k for k in flags] for x, flags in zip(rows, f.keep, strict=True)])
    same(clip_ratio, loops.share(tokens, "held"))
    assert vllm_kl is None


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("token_level", [True, False], ids=["tokens", "sequences"])
def test_value_loss(
    token_level: bool, clip: float | None, info: dict[str, Any], fields: Any, loops: Any, same: Any
) -> None:
    f = fields(empty=True)
    values = f.leaf("values")
    loss = openrlhf.ValueLoss(clip, token_level)(values, f.old_values, f.returns, f.mask, **info)
    tokens = loops.tokens(f, lambda v, o, r: loops.critic(v, o, r, clip, 0.5), "values", "old_values", "returns")
    w = weights(f, loops, token_level, info)
    same(loss, loops.total(w, tokens))
    same(torch.autograd.grad(loss, values)[0], loops.slopes(w, tokens))


@pytest.mark.parametrize(("clip", "kl_coef"), [((-0.5, 0.5), 0.1), (None, -1.0)])
def test_rewards(clip: Any, kl_coef: float, fields: Any, same: Any) -> None:
    f = fields(empty=True)
    scores = torch.tensor([-2.0, -0.1, 0.3, 4.0, 7.0], dtype=f.dtype)
    rewards = openrlhf.compute_reward(scores, kl_coef, f.rewards, f.mask.long(), clip)
    expected = []
    for kl, score, flags in zip(f.rows("rewards"), scores.double().tolist(), f.keep, strict=True):
        row = [-max(kl_coef, 0.0) * x if k else 0.0 for x, k in zip(kl, flags, strict=True)]
        if any(flags):
            row[max(t for t, k in enumerate(flags) if k)] += min(max(score, clip[0]), clip[1]) if clip else score
        expected.append(row)
    same(rewards, expected)
    everywhere = openrlhf.compute_reward(scores, 0.0, torch.zeros(5, 3, dtype=f.dtype))
    same(everywhere, [[0.0, 0.0, x] for x in scores.double().tolist()])


@pytest.mark.parametrize(
    "options",
    [
        {"policy_loss_type": "grpo"},
        {"is_correction_level": "word"},
        {"is_correction_mode": "drop"},
        {"is_correction_gating": "kl"},
        {"is_correction_level": "seq", "is_correction_mode": "clip"},
        {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_gating": "tv"},
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"policy_loss_type|is_correction"):
        openrlhf.PolicyLoss(**options)


def test_correction_without_rollout() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="rollout_log_probs"):
        openrlhf.PolicyLoss(is_correction_level="token")(x, x, x)


# Against OpenRLHF's own modules


@pytest.fixture
def peer(without_packages: Any) -> Any:
    """loss.py and utils.py as released; their package wants flash-attn, which wants a GPU."""
    losses, utils = (without_packages(f"openrlhf.models.{name}") for name in ("loss", "utils"))
    return SimpleNamespace(
        PolicyLoss=losses.PolicyLoss, ValueLoss=losses.ValueLoss, compute_reward=utils.compute_reward, losses=losses
    )


def test_signatures(peer: Any, same_signature: Any) -> None:
    same_signature(openrlhf.compute_reward, peer.compute_reward)
    for name in ("PolicyLoss", "ValueLoss"):
        same_signature(getattr(openrlhf, name), getattr(peer, name))
        same_signature(getattr(openrlhf, name).forward, getattr(peer, name).forward)


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("token_level", [True, False], ids=["tokens", "sequences"])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_policy_loss_is_openrlhf_s(
    name: str, token_level: bool, info: dict[str, Any], kind: str, peer: Any, fields: Any, same: Any
) -> None:
    f, results = fields(garbage=None), []
    for module in (openrlhf, peer):
        new = f.leaf("logprobs")
        policy = module.PolicyLoss(0.15, 0.3, 1.4, token_level, kind, **CORRECTIONS[name])
        out = policy(new, f.old_logprobs, f.advantages, f.mask.to(f.dtype), f.rollout_logprobs, **info)
        results.append([*out, *torch.autograd.grad(out[0], new)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            same(ours, theirs.detach().double(), ulps=128, peer=True)


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("token_level", [True, False], ids=["tokens", "sequences"])
def test_values_and_rewards_are_openrlhf_s(
    token_level: bool, info: dict[str, Any], peer: Any, fields: Any, same: Any
) -> None:
    f, results = fields(garbage=None), []
    for module in (openrlhf, peer):
        values = f.leaf("values")
        loss = module.ValueLoss(0.2, token_level)(values, f.old_values, f.returns, f.mask.to(f.dtype), **info)
        rewards = module.compute_reward(f.returns[:, 0], 0.1, f.rewards, f.mask.long(), (-0.5, 0.5))
        results.append([loss, *torch.autograd.grad(loss, values), rewards])
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs.detach().double(), ulps=128, peer=True)


def test_install_and_undo(peer: Any) -> None:
    assert openrlhf.install() == [
        "openrlhf.models.loss.PolicyLoss", "openrlhf.models.loss.ValueLoss", "openrlhf.models.utils.compute_reward",
    ]  # fmt: skip
    assert peer.losses.PolicyLoss is openrlhf.PolicyLoss
    openrlhf.uninstall()
    assert peer.losses.PolicyLoss is peer.PolicyLoss
