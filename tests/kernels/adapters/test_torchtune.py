"""The torchtune adapter: against loops over torchtune's documented conventions, and against torchtune itself."""

from typing import Any

import pytest
import torch
from ppomax.kernels.adapters import torchtune

NAMES = ("old_logprobs", "logprobs", "advantages", "old_values", "values", "returns")


def loss_of(module: Any, f: Any, masks: tuple[Any, Any]) -> list[Any]:
    """What the loss returns and its gradients."""
    inputs = {name: getattr(f, name) for name in NAMES} | {x: f.leaf(x) for x in ("logprobs", "values")}
    out = module.PPOLoss(0.15, 0.25, 0.4)(*(inputs[name] for name in NAMES), *masks)
    return [*out, *torch.autograd.grad(out[0], (inputs["logprobs"], inputs["values"]))]


@pytest.mark.parametrize("masked", [True, False])
def test_loss(masked: bool, fields: Any, loops: Any, same: Any) -> None:
    """The masks differ: that of the values has one token more a row."""
    f = fields(empty=True) if masked else fields(garbage=None)
    values_mask = f.mask | f.mask.roll(1, 1)
    if not masked:
        f.mask = values_mask = torch.ones_like(f.mask)
    else:
        clean = torch.randn_like(f.values)
        for name in ("values", "old_values", "returns"):
            setattr(f, name, torch.where(values_mask & ~f.mask, clean, getattr(f, name)))
    policy_mask, keep = f.mask, f.keep
    loss, policy, value, ratio, clipfrac, d_logprobs, d_values = loss_of(
        torchtune, f, (policy_mask, values_mask) if masked else (None, None)
    )
    clipped = loops.tokens(
        f, lambda n, o, a: loops.clipped(n, o, a, 0.15, 0.15), "logprobs", "old_logprobs", "advantages"
    )
    w = loops.weights(keep, "token-mean")
    f.mask = values_mask
    critic = loops.tokens(f, lambda v, o, r: loops.critic(v, o, r, 0.25, 0.5), "values", "old_values", "returns")
    v = loops.weights(f.keep, "token-mean")
    same(policy, loops.total(w, clipped))
    same(value, loops.total(v, critic))
    same(loss, loops.total(w, clipped) + 0.4 * loops.total(v, critic))
    same(ratio, loops.share(clipped, "ratio"))
    same(clipfrac, loops.share(clipped, "held"))
    same(d_logprobs, loops.slopes(w, clipped))
    same(d_values, [[0.4 * x for x in row] for row in loops.slopes(v, critic)])
    assert float(clipfrac) > 0


@pytest.mark.parametrize("masked", [True, False])
def test_advantages(masked: bool, fields: Any, loops: Any, same: Any) -> None:
    """The recursion runs over every token, masked ones too; whitening over the unmasked keeps their mean."""
    f = fields(garbage=0.5)
    advantages, returns = torchtune.estimate_advantages(f.values, f.rewards, 0.99, 0.95, f.mask if masked else None)
    rows = [loops.discounted(r, v, None, 0.99, 0.95) for r, v in zip(f.rows("rewards"), f.rows("values"), strict=True)]
    keep = f.keep if masked else torch.ones_like(f.mask).tolist()
    same(advantages, loops.whitened([a for a, _ in rows], keep, centred=False), ulps=128)
    same(returns, [r for _, r in rows])


def test_whiten(fields: Any, loops: Any, same: Any) -> None:
    f = fields()
    for shift_mean in (True, False):
        exact = loops.whitened(f.rows("values"), f.keep, centred=not shift_mean)
        same(torchtune.whiten(f.values, f.mask, shift_mean), exact, ulps=128)


def test_log_probs(dtype: torch.dtype, loops: Any, same: Any) -> None:
    logits = 3 * torch.randn(2, 3, 7, dtype=dtype)
    labels = [[0, 6, 3], [2, 1, 5]]
    leaf = logits.clone().requires_grad_()
    logprobs = torchtune.logits_to_logprobs(leaf, torch.tensor(labels), 0.7)
    exact = [
        [loops.softmax_row(x, y, 0.7) for x, y in zip(*row, strict=True)]
        for row in zip(logits.double().tolist(), labels, strict=True)
    ]
    same(logprobs, [[t.logprob for t in row] for row in exact])
    same(torch.autograd.grad(logprobs.sum(), leaf)[0], [[t.d_logprob for t in row] for row in exact])


# Against torchtune itself


@pytest.fixture
def peer() -> Any:
    return pytest.importorskip("torchtune.rlhf.loss", reason="torchtune is not importable", exc_type=ImportError)


@pytest.fixture
def rlhf(peer: Any) -> Any:
    return pytest.importorskip("torchtune.rlhf")


def test_signatures(peer: Any, rlhf: Any, same_signature: Any) -> None:
    same_signature(torchtune.PPOLoss, peer.PPOLoss)
    same_signature(torchtune.PPOLoss.forward, peer.PPOLoss.forward)
    for name in ("estimate_advantages", "whiten", "logits_to_logprobs"):
        same_signature(getattr(torchtune, name), getattr(rlhf, name))


def test_loss_is_torchtune_s(peer: Any, fields: Any, same: Any) -> None:
    f = fields(garbage=None)
    for masks in ((f.mask, f.mask | f.mask.roll(1, 1)), (None, None)):
        ours, theirs = loss_of(torchtune, f, masks), loss_of(peer, f, masks)
        if masks[0] is not None:  # torchtune's mean ratio is that of padding too
            theirs[3] = ours[3]
        for x, y in zip(ours, theirs, strict=True):
            same(x, y.double(), ulps=128, peer=True)


def test_helpers_are_torchtune_s(rlhf: Any, fields: Any, same: Any) -> None:
    f = fields(garbage=0.5)
    for masks in (f.mask, None):
        ours = torchtune.estimate_advantages(f.values, f.rewards, 0.99, 0.95, masks)
        theirs = rlhf.estimate_advantages(f.values, f.rewards, 0.99, 0.95, masks)
        for x, y in zip(ours, theirs, strict=True):
            same(x, y.double(), ulps=256, peer=True)
    logits, labels = torch.randn(2, 3, 7, dtype=f.dtype), torch.tensor([[0, 6, 3], [2, 1, 5]])
    exact = rlhf.logits_to_logprobs(logits, labels, 0.7).double()
    same(torchtune.logits_to_logprobs(logits, labels, 0.7), exact)


def test_install_and_undo(peer: Any, rlhf: Any) -> None:
    before = peer.PPOLoss, rlhf.estimate_advantages, rlhf.rewards.whiten
    torchtune.install()
    try:
        assert peer.PPOLoss is torchtune.PPOLoss
        assert rlhf.estimate_advantages is rlhf.rewards.estimate_advantages is torchtune.estimate_advantages
    finally:
        torchtune.uninstall()
    assert (peer.PPOLoss, rlhf.estimate_advantages, rlhf.rewards.whiten) == before


def test_as_a_recipe_s_component(peer: Any) -> None:
    """The docstring's way in: a recipe instantiates the loss by its path."""
    omegaconf = pytest.importorskip("omegaconf")
    config = pytest.importorskip("torchtune.config", exc_type=ImportError)
    node = {"_component_": "ppomax.kernels.adapters.torchtune.PPOLoss", "epsilon": 0.3}
    loss = config.instantiate(omegaconf.OmegaConf.create(node))
    assert isinstance(loss, torchtune.PPOLoss)
    assert loss.epsilon == 0.3
