"""The verl adapter: against loops over verl's documented conventions, and against verl where it is importable."""

import importlib
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppomax.kernels.adapters import verl

# verl's mode: (ours, what it further divides by in rows of 9)
MODES = {
    "token-mean": ("token-mean", 1),
    "token-sum": ("token-sum", 1),
    "seq-mean-token-sum": ("seq-mean-token-sum", 1),
    "seq-mean-token-sum-norm": ("seq-mean-token-sum", 9),
    "seq-mean-token-mean": ("seq-mean-token-mean", 1),
}
LOCAL: dict[str, Any] = {}
GLOBAL = {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 12, "loss_scale_factor": 9}


class Config(SimpleNamespace):
    """An actor's configuration."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def config(info: dict[str, Any], **changes: Any) -> Config:
    values = {"clip_ratio": 0.2, "clip_ratio_low": 0.15, "clip_ratio_high": 0.3, "clip_ratio_c": 1.4}
    return Config(**values | changes, global_batch_info=info)


def weights(f: Any, loops: Any, mode: str, info: dict[str, Any]) -> list[list[float]]:
    reduction, norm = MODES[mode]
    total = info.get("batch_num_tokens" if mode == "token-mean" else "global_batch_size")
    rows = loops.weights(f.keep, reduction, 1 if mode == "token-sum" else total)
    return [[w * info.get("dp_size", 1) / norm for w in row] for row in rows]


@pytest.mark.parametrize("info", [LOCAL, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss(mode: str, info: dict[str, Any], fields: Any, loops: Any, same: Any) -> None:
    f = fields(empty=True)
    new = f.leaf("logprobs")
    loss, metrics = verl.compute_policy_loss_vanilla(
        f.old_logprobs, new, f.advantages, f.mask, mode, config(info), rollout_is_weights=f.entropy
    )
    (slope,) = torch.autograd.grad(loss, new)
    tokens = loops.tokens(
        f,
        lambda n, o, a, w: loops.clipped(n, o, a, 0.15, 0.3, 1.4, 20.0, w),
        *("logprobs", "old_logprobs", "advantages", "entropy"),
    )
    w = weights(f, loops, mode, info)
    same(loss, loops.total(w, tokens))
    same(slope, loops.slopes(w, tokens))
    kl = loops.tokens(f, lambda n, o: SimpleNamespace(k1=o - n), "logprobs", "old_logprobs")
    assert list(metrics) == ["actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"]
    same(metrics["actor/ppo_kl"], loops.share(kl, "k1"))
    same(metrics["actor/pg_clipfrac"], loops.share(tokens, "held"))
    same(metrics["actor/pg_clipfrac_lower"], loops.share(tokens, "dual"))
    assert metrics["actor/pg_clipfrac"] > 0
    assert metrics["actor/pg_clipfrac_lower"] > 0


def test_clip_range_and_clamp(fields: Any, same: Any) -> None:
    """Without sides of their own both are clip_ratio, and c is 3; log-ratios end at +-20."""
    f = fields(b=1, t=2, garbage=None, gaps=False)
    new, old = (torch.tensor([x], dtype=f.dtype) for x in ([0.5, 0.0], [0.0, -60.0]))
    sides = config(LOCAL, clip_ratio_low=None, clip_ratio_high=None)
    del sides.clip_ratio_c
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    for advantage, expected in ((1.0, -1.2), (-1.0, (math.exp(0.5) + 3.0) / 2)):
        loss, metrics = verl.compute_policy_loss_vanilla(
            old, new, torch.full_like(new, advantage), everywhere, config=sides
        )
        same(loss, expected)
        same(metrics["actor/ppo_kl"], -(0.5 + 20.0) / 2)
    vanished, _ = verl.compute_policy_loss_vanilla(
        torch.zeros_like(new), new - 60.0, torch.ones_like(new), everywhere, config=sides
    )
    same(vanished, -math.exp(-20.0))
    with pytest.raises(ValueError, match="config"):
        verl.compute_policy_loss_vanilla(old, new, new, everywhere)


@pytest.mark.parametrize("info", [LOCAL, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_value_loss_and_aggregation(mode: str, info: dict[str, Any], fields: Any, loops: Any, same: Any) -> None:
    f = fields(empty=True)
    values = f.leaf("values")
    loss, clipfrac = verl.compute_value_loss(values, f.returns, f.old_values, f.mask, 0.2, mode, **info)
    (slope,) = torch.autograd.grad(loss, values)
    tokens = loops.tokens(f, lambda v, o, r: loops.critic(v, o, r, 0.2, 0.5), "values", "old_values", "returns")
    w = weights(f, loops, mode, info)
    same(loss, loops.total(w, tokens))
    same(slope, loops.slopes(w, tokens))
    same(clipfrac, loops.share(tokens, "held"))

    terms = f.leaf("rewards")
    aggregated = verl.agg_loss(terms, f.mask.long(), mode, **info)
    same(aggregated, loops.total(w, loops.tokens(f, lambda r: SimpleNamespace(term=r), "rewards")))
    same(torch.autograd.grad(aggregated, terms)[0], w)


def test_pieces_add_up(fields: Any, same: Any) -> None:
    """With global totals the losses of micro-batches add up to that of the batch."""
    f = fields(b=6)
    for mode in MODES:
        info = {"batch_num_tokens": int(f.mask.sum()), "global_batch_size": 6}
        arguments = (f.old_logprobs, f.logprobs, f.advantages, f.mask)
        whole, _ = verl.compute_policy_loss_vanilla(*arguments, mode, config(info))
        pieces = [
            verl.compute_policy_loss_vanilla(*(x[rows] for x in arguments), mode, config(info))[0]
            for rows in (slice(0, 2), slice(2, 6))
        ]
        same(sum(pieces), whole.double())


def test_aggregation_errors() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="unknown loss_agg_mode 'mean'"):
        verl.agg_loss(x, x, "mean")
    for mode, name in (("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")):
        with pytest.raises(ValueError, match=name):
            verl.agg_loss(x, x, mode, dp_size=2)


KL = {
    "kl": lambda d: (d, 1.0),
    "k1": lambda d: (d, 1.0),
    "abs": lambda d: (abs(d), math.copysign(1.0, d)),
    "mse": lambda d: (d * d / 2, d),
    "k2": lambda d: (d * d / 2, d),
    "k3": lambda d: (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
    "low_var_kl": lambda d: (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
}


@pytest.mark.parametrize("through", ["", "+"], ids=["pathwise", "straight-through"])
@pytest.mark.parametrize("kind", KL)
def test_kl_penalty(kind: str, through: str, dtype: torch.dtype, same: Any) -> None:
    """k3 above 10 and log-ratios beyond 20 are clamped, without a gradient; with + the gradient is k2's throughout."""
    new = torch.tensor([-1.0, -0.5, -3.0, -30.0, -1.0], dtype=dtype, requires_grad=True)
    ref = torch.tensor([-1.2, -0.6, -1.0, -1.0, -26.0], dtype=dtype)
    kl = verl.kl_penalty(new, ref, kind + through)
    d = (new.detach().double() - ref.double()).tolist()
    value, slope = zip(*(KL[kind](x) for x in d), strict=True)
    if kind in ("k3", "low_var_kl"):
        slope = tuple(s if v < 10 and abs(x) < 20 else 0.0 for v, s, x in zip(value, slope, d, strict=True))
        value = tuple(min(v, 10.0) for v in value)
    same(kl, value)
    same(torch.autograd.grad(kl.sum(), new)[0], d if through else slope)


def test_unknown_kl() -> None:
    for name in ("full", "k4+"):
        with pytest.raises(ValueError, match="unknown KL estimator"):
            verl.kl_penalty(torch.zeros(1), torch.zeros(1), name)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95)])
def test_gae(gamma: float, lam: float, fields: Any, loops: Any, same: Any) -> None:
    f = fields(empty=True)
    decay = torch.tensor(gamma, dtype=torch.float64)
    advantages, returns = verl.compute_gae_advantage_return(f.rewards, f.values, f.mask, decay, lam)
    rows = [loops.discounted(*row, gamma, lam) for row in zip(f.rows("rewards"), f.rows("values"), f.keep, strict=True)]
    same(advantages, loops.whitened([a for a, _ in rows], f.keep), ulps=256)
    same(returns, [r for _, r in rows])


def test_register(fake_package: Any) -> None:
    registry: dict[str, Any] = {}
    fake_package(
        "verl.trainer.ppo.core_algos",
        register_policy_loss=lambda name: lambda function: registry.setdefault(name, function),
    )
    verl.register()
    verl.register("mine")
    assert registry == dict.fromkeys(["ppomax", "mine"], verl.compute_policy_loss_vanilla)


# Against verl itself


@pytest.fixture
def core() -> Any:
    reason = "verl.trainer.ppo.core_algos is not importable"
    return pytest.importorskip("verl.trainer.ppo.core_algos", reason=reason, exc_type=ImportError)


@pytest.fixture
def installed(core: Any) -> Iterator[list[str]]:
    yield verl.install()
    verl.uninstall()


def test_signatures(core: Any, same_signature: Any) -> None:
    for name in ("agg_loss", "compute_gae_advantage_return", "compute_value_loss", "kl_penalty"):
        same_signature(getattr(verl, name), getattr(core, name))
    same_signature(verl.compute_policy_loss_vanilla, core.compute_policy_loss_vanilla)


@pytest.mark.parametrize("info", [LOCAL, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_losses_are_verl_s(mode: str, info: dict[str, Any], core: Any, fields: Any, same: Any) -> None:
    f = fields(garbage=None)
    results = []
    for module in (verl, core):
        new, values = f.leaf("logprobs"), f.leaf("values")
        policy = getattr(module, "compute_policy_loss_vanilla")  # noqa: B009
        loss, metrics = policy(f.old_logprobs, new, f.advantages, f.mask, mode, config(info), f.entropy)
        critic, clipfrac = module.compute_value_loss(values, f.returns, f.old_values, f.mask, 0.2, mode, **info)
        slopes = torch.autograd.grad(loss + critic, (new, values))
        results.append([loss, critic, clipfrac, *metrics.values(), *slopes])
    for ours, theirs in zip(*results, strict=True):
        same(ours, torch.as_tensor(theirs).detach().double(), ulps=128, peer=True)


def test_gae_and_kl_are_verl_s(core: Any, fields: Any, same: Any) -> None:
    f = fields(garbage=None)
    arguments = (f.rewards, f.values, f.mask.to(f.dtype), 0.99, 0.95)
    ours, theirs = verl.compute_gae_advantage_return(*arguments), core.compute_gae_advantage_return(*arguments)
    for x, y in zip(ours, theirs, strict=True):
        same(x, torch.where(f.mask, y, 0.0).double(), ulps=256, peer=True)
    for kind in [name + end for name in KL for end in ("", "+")]:
        x = verl.kl_penalty(f.logprobs * 8, f.ref_logprobs * 3, kind)
        same(x, core.kl_penalty(f.logprobs * 8, f.ref_logprobs * 3, kind).double())


def test_install_and_undo(core: Any) -> None:
    before = {name: getattr(core, name) for name in ("agg_loss", "kl_penalty", "compute_gae_advantage_return")}
    losses = importlib.import_module("verl.workers.utils.losses")
    places = verl.install()
    try:
        assert {"verl.trainer.ppo.core_algos.agg_loss", "verl.workers.utils.losses.kl_penalty"} <= set(places)
        assert losses.compute_value_loss is verl.compute_value_loss
    finally:
        verl.uninstall()
    assert {name: getattr(core, name) for name in before} == before
    assert losses.compute_value_loss is core.compute_value_loss
    assert "ppomax" not in inspect.getmodule(losses.compute_value_loss).__name__  # type: ignore[union-attr]


def test_through_the_trainer_s_own_calls(core: Any, installed: list[str], fields: Any, same: Any) -> None:
    """`compute_advantage` of verl's trainer finds the replaced GAE."""
    trainer = pytest.importorskip(
        "verl.trainer.ppo.ray_trainer", reason="verl's trainer is not importable", exc_type=ImportError
    )
    f = fields(garbage=None)
    batch = {"token_level_rewards": f.rewards, "values": f.values, "response_mask": f.mask.to(f.dtype)}
    data = SimpleNamespace(batch=batch, non_tensor_batch={})
    trainer.compute_advantage(data, core.AdvantageEstimator.GAE, gamma=0.99, lam=0.95, config={})
    expected = verl.compute_gae_advantage_return(f.rewards, f.values, f.mask, 0.99, 0.95)
    same(batch["advantages"], expected[0].double())
    same(batch["returns"], expected[1].double())


def test_external_module(core: Any, tmp_path: Path) -> None:
    """The docstring's way in: a module that VERL_USE_EXTERNAL_MODULES names, loaded while verl is imported."""
    (tmp_path / "ppo_losses.py").write_text(
        "from ppomax.kernels.adapters import verl\nverl.register()\nverl.install()\n"
    )
    code = (
        "import verl, verl.trainer.ppo.core_algos as core, verl.workers.utils.losses as losses\n"
        "print(core.get_policy_loss_fn('ppomax').__module__, losses.agg_loss.__module__)"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "ppo_losses"}
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.split()[-2:] == ["ppomax.kernels.adapters.verl"] * 2, run.stderr
