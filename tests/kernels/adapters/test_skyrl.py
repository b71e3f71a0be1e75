"""The SkyRL adapter: against loops over SkyRL's documented conventions, and against its own module."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppomax.kernels.adapters import skyrl


def config(loss: str = "ppomax", **changes: Any) -> SimpleNamespace:
    values = {"eps_clip_low": 0.15, "eps_clip_high": 0.3, "clip_ratio_c": 1.4, "value_clip": 0.2}
    return SimpleNamespace(**values | changes, policy_loss_type=loss, off_policy_correction=None)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["ppomax", "ppomax_dual_clip"])
def test_policy_loss(name: str, masked: bool, fields: Any, loops: Any, same: Any) -> None:
    f = fields(empty=True) if masked else fields(garbage=None)
    mask = f.mask.to(f.dtype) if masked else None
    f.mask = f.mask if masked else torch.ones_like(f.mask)
    new = f.leaf("logprobs")
    loss, metrics = skyrl.ppo_policy_loss(new, f.old_logprobs, f.advantages, config(name), mask)
    dual = 1.4 if name.endswith("dual_clip") else None
    tokens = loops.tokens(
        f, lambda n, o, a: loops.clipped(n, o, a, 0.15, 0.3, dual, 20.0), "logprobs", "old_logprobs", "advantages"
    )
    w = loops.weights(f.keep, "token-sum")
    same(loss, loops.total(w, tokens))
    same(torch.autograd.grad(loss, new)[0], loops.slopes(w, tokens))
    assert list(metrics) == ["clip_ratio"]
    same(metrics["clip_ratio"], loops.share(tokens, "held"))


def test_corrections_are_skyrl_s(fake_package: Any, fields: Any, same: Any) -> None:
    """Its function gives a ratio, a mask and metrics; masked sequences still count in the clipped fraction."""
    f = fields()
    kept = f.mask.clone()
    kept[0] = False
    ratio = torch.tensor([[2.0], [0.5], [1.0], [1.0], [3.0]], dtype=f.dtype)
    seen: list[Any] = []

    def correct(*arguments: Any) -> Any:
        seen.extend(arguments)
        return ratio, {"tis_seq_clip_high_ratio": 0.25}, kept.to(f.dtype)

    utils = "skyrl.backends.skyrl_train.utils.off_policy_correction_utils"
    fake_package(utils, compute_off_policy_correction=correct)
    algorithm = config()
    plain, metrics = skyrl.ppo_policy_loss(f.logprobs, f.old_logprobs, f.advantages, algorithm, f.mask)
    algorithm.off_policy_correction = object()
    arguments = (f.logprobs, f.old_logprobs, f.advantages, algorithm, f.mask)
    assert skyrl.ppo_policy_loss(*arguments)[0] == plain
    assert not seen
    loss, corrected = skyrl.ppo_policy_loss(*arguments, f.rollout_logprobs)
    assert seen == [f.old_logprobs, f.rollout_logprobs, f.mask, algorithm.off_policy_correction]
    assert corrected == {**metrics, "tis_seq_clip_high_ratio": 0.25}
    expected = sum(
        float(r) * float(skyrl.ppo_policy_loss(*(x[i : i + 1] for x in arguments[:3]), config(), kept[i : i + 1])[0])
        for i, r in enumerate(ratio.flatten())
    )
    same(loss, expected)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("clip", [0.2, None])
def test_critic_loss(clip: float | None, masked: bool, fields: Any, loops: Any, same: Any) -> None:
    """A mean over all rows, one without a token among them."""
    f = fields(empty=True) if masked else fields(garbage=None)
    mask = f.mask if masked else None
    f.mask = f.mask if masked else torch.ones_like(f.mask)
    values = f.leaf("values")
    loss, clipfrac = skyrl.ppo_critic_loss(values, f.old_values, f.returns, config(value_clip=clip), mask)
    tokens = loops.tokens(f, lambda v, o, r: loops.critic(v, o, r, clip, 0.5), "values", "old_values", "returns")
    w = loops.weights(f.keep, "seq-mean-token-mean", total=5)
    same(loss, loops.total(w, tokens))
    same(torch.autograd.grad(loss, values)[0], loops.slopes(w, tokens))
    if clip is None:
        assert clipfrac is None
    else:
        same(clipfrac, loops.share(tokens, "held"))


def test_gae(fields: Any, loops: Any, same: Any) -> None:
    """The recursion runs over every token, masked ones too."""
    f = fields(garbage=0.5)
    advantages, returns = skyrl.compute_gae_advantage_return(
        f.rewards, f.values, f.mask, 0.99, 0.95, index=None, config=None
    )
    rows = [loops.discounted(r, v, None, 0.99, 0.95) for r, v in zip(f.rows("rewards"), f.rows("values"), strict=True)]
    same(advantages, loops.whitened([a for a, _ in rows], f.keep), ulps=256)
    same(returns, [r for _, r in rows])


def test_register(fake_package: Any) -> None:
    entries: dict[str, Any] = {}
    registry = SimpleNamespace(register=entries.__setitem__)
    fake_package(
        "skyrl.backends.skyrl_train.utils.ppo_utils", PolicyLossRegistry=registry, AdvantageEstimatorRegistry=registry
    )
    skyrl.register()
    assert entries == {
        "ppomax": skyrl.ppo_policy_loss,
        "ppomax_dual_clip": skyrl.ppo_policy_loss,
        "ppomax_gae": skyrl.compute_gae_advantage_return,
    }


# Against SkyRL's own module

UTILS = "skyrl.backends.skyrl_train.utils.ppo_utils"


@pytest.fixture
def peer(without_packages: Any) -> Any:
    """ppo_utils.py as released; its package wants Python 3.12, its configuration serves annotations alone."""
    return without_packages(UTILS, {"skyrl.train.config": {"AlgorithmConfig": object}})


def test_signatures(peer: Any, same_signature: Any) -> None:
    for name in ("ppo_policy_loss", "ppo_critic_loss"):
        same_signature(getattr(skyrl, name), getattr(peer, name))
    same_signature(skyrl.compute_gae_advantage_return, peer.compute_gae_advantage_return.__wrapped__)


CORRECTION = {
    "tis_ratio_type": None, "token_tis_ratio_clip_high": 1.2, "sequence_tis_ratio_clip_high": 1.5,
    "sequence_mask_metric": None, "geo_mask_high": 1.05, "geo_mask_low": 0.95, "product_mask_high": 2.0,
    "product_mask_low": 0.5, "outlier_token_is_threshold_low": None, "outlier_token_is_threshold_high": None,
    "token_mask_is_threshold_low": None, "token_mask_is_threshold_high": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "correction",
    [
        {},
        {"tis_ratio_type": "token"},
        {"tis_ratio_type": "sequence", "sequence_mask_metric": "geometric"},
        {"token_mask_is_threshold_low": 0.8, "token_mask_is_threshold_high": 1.25},
    ],
    ids=["off", "tokens", "sequences", "masked-tokens"],
)
@pytest.mark.parametrize("kind", ["regular", "dual_clip"])
def test_policy_loss_is_skyrl_s(kind: str, correction: dict[str, Any], peer: Any, fields: Any, same: Any) -> None:
    f, results = fields(garbage=None), []
    algorithm = config(kind)
    algorithm.off_policy_correction = SimpleNamespace(**CORRECTION | correction)
    for module in (skyrl, peer):
        new = f.leaf("logprobs")
        loss, metrics = module.ppo_policy_loss(
            new, f.old_logprobs, f.advantages, algorithm, f.mask.to(f.dtype), f.rollout_logprobs
        )
        results.append((dict(metrics), loss, *torch.autograd.grad(loss, new)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for ours, theirs in zip(results[0][1:], results[1][1:], strict=True):
        same(ours, theirs.detach().double(), ulps=128, peer=True)  # SkyRL's ratio is float32


def test_critic_and_gae_are_skyrl_s(peer: Any, fields: Any, same: Any) -> None:
    f, results = fields(garbage=None), []
    for module in (skyrl, peer):
        values = f.leaf("values")
        loss, clipfrac = module.ppo_critic_loss(values, f.old_values, f.returns, config(), f.mask.to(f.dtype))
        advantages, returns = module.compute_gae_advantage_return(f.rewards, f.values, f.mask.to(f.dtype), 0.99, 0.95)
        results.append([loss, *torch.autograd.grad(loss, values), torch.where(f.mask, advantages, 0.0), returns])
        results[-1].append(torch.tensor(clipfrac))
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs.detach().double(), ulps=256, peer=True)


def test_registries_and_critic(peer: Any) -> None:
    skyrl.register("mine")
    assert peer.PolicyLossRegistry.get("mine_dual_clip") is skyrl.ppo_policy_loss
    assert peer.AdvantageEstimatorRegistry.get("mine_gae") is skyrl.compute_gae_advantage_return
    before = peer.ppo_critic_loss
    assert skyrl.install() == [f"{UTILS}.ppo_critic_loss"]
    assert peer.ppo_critic_loss is skyrl.ppo_critic_loss
    skyrl.uninstall()
    assert peer.ppo_critic_loss is before
