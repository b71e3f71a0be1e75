"""The presets, value by value, and where each value comes from."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from ppomax.engine.config import OptimConfig, PPOConfig, RewardConfig, RolloutConfig, from_dict, to_dict
from ppomax.engine.errors import InputError
from ppomax.engine.presets import PRESETS, preset, provenance
from ppomax.engine.runs import read_toml

NAMES = ["ppo-max", "moss-en", "moss-zh", "vanilla"]
names = pytest.mark.parametrize("name", NAMES)

# field -> value in ppo-max (the paper), moss-en, moss-zh (the released scripts), vanilla (the paper's baseline)
TABLE: dict[str, tuple[Any, Any, Any, Any]] = {
    "policy_optim.lr": (5e-7, 5e-7, 5e-7, 5e-7),
    "critic_optim.lr": (1.65e-6, 1.5e-6, 1.5e-6, 1.65e-6),
    **{
        f"{model}_optim.schedule.{field}": values
        for model in ("policy", "critic")
        for field, values in {
            "kind": ("constant", "inverse-sqrt", "inverse-sqrt", "constant"),
            "warmup": (0.0, 100.0, 100.0, 0.1),
            "floor": (0.0, 0.1, 0.1, 0.0),
        }.items()
    },
    "rollouts_per_iteration": (128, 14, 14, 128),
    "minibatch_size": (32, 14, 14, 32),
    "ppo_epochs": (1, 1, 1, 1),
    "gamma": (1.0, 1.0, 1.0, 1.0),
    "gae_lambda": (0.9, 0.95, 0.95, 0.9),
    "kl_coef": (0.05, 0.01, 0.1, 0.0),
    "reward.transform": ("normalize", "scale", "scale", "none"),
    "reward.clip": (5.0, None, None, None),
    "clip_eps": (0.2, 0.2, 0.2, 0.2),
    "value_clip": (0.2, 0.2, 0.2, None),
    "grad_clip": (1.0, 1.0, 1.0, None),
    "ptx_coef": (0.05, 0.0, 0.0, 0.0),
    "critic_pretrain_iterations": (8, 0, 0, 0),
    "policy_optim.betas": ((0.9, 0.95),) * 4,
    "critic_optim.betas": ((0.9, 0.95),) * 4,
    "policy_optim.eps": (1e-6,) * 4,
    "critic_optim.eps": (1e-8,) * 4,
    "policy_optim.weight_decay": (0.0,) * 4,
    "critic_optim.weight_decay": (0.0,) * 4,
    "max_sequence": (2048,) * 4,
    "rollout.max_response": (512,) * 4,
    "rollout.temperature": (0.8,) * 4,
    "rollout.top_p": (0.9,) * 4,
    "rollout.repetition_penalty": (1.1,) * 4,
    "bootstrap_truncated": (False,) * 4,
    "entropy_coef": (0.0,) * 4,
    "normalize_advantages": (False,) * 4,
    "ratio_base": ("rollout",) * 4,
    "logprob_temperature": (1.0,) * 4,
    # Offered, off by default
    "advantage_clip": (None,) * 4,
    "dual_clip": (None,) * 4,
    "entropy_bound": (None,) * 4,
    "rollout.top_k": (0,) * 4,
    "rollout.stop": ((),) * 4,
    "old_logprobs": ("recomputed",) * 4,
    "importance_clip": (None,) * 4,
    "samples_per_prompt": (1,) * 4,
    "extra_in_flight": (0,) * 4,
    "lora.rank": (0,) * 4,
    "lora.alpha": (32,) * 4,
    "lora.rslora": (False,) * 4,
    "lora.targets": (("all-linear",),) * 4,
}
# What says how a run is carried out, not which algorithm it is.
EXECUTION = {
    "iterations", "micro_batch_tokens", "critic_pretrain_epochs", "critic_pretrain_tolerance", "ptx_batch_size",
    "held_out", "eval_every", "rollout.max_running", "rollout.prefill_tokens", "rollout.block_size",
    "rollout.attention", "rollout.kv_memory", "rollout.kv_blocks", "rollout.sleep", "rollout.cuda_graphs",
    *(f"{model}_optim.{name}" for model in ("policy", "critic") for name in ("moments", "offload")),
}  # fmt: skip


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field names -> values."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nested = dataclasses.is_dataclass(value)
        values |= flat(value, f"{prefix}{field.name}.") if nested else {f"{prefix}{field.name}": value}
    return values


def test_these_are_all_presets() -> None:
    assert list(PRESETS) == NAMES


@pytest.mark.parametrize("field", TABLE)
def test_values(field: str) -> None:
    assert tuple(flat(preset(name))[field] for name in NAMES) == TABLE[field]


def test_the_table_has_every_field_of_the_algorithm() -> None:
    fields = {field for field in flat(PPOConfig()) if not field.startswith("runtime.")}
    assert fields - EXECUTION == set(TABLE)


@names
def test_every_value_that_a_preset_sets_says_where_it_comes_from(name: str) -> None:
    values = flat(preset(name))
    for field, (value, source) in provenance(name).items():
        assert values[field] == value, field
        assert source.split()[0].strip(":,") in ("paper", "scripts", "chosen"), (field, source)


@names
def test_whatever_differs_from_the_defaults_has_a_provenance(name: str) -> None:
    defaults = flat(PPOConfig())
    changed = {field for field, value in flat(preset(name)).items() if value != defaults[field]}
    assert changed <= set(provenance(name))


@names
def test_presets_set_the_same_choices(name: str) -> None:
    """What one preset settles and another leaves to a default is settled for both."""
    optional = ("warmup", "floor", "ptx_batch_size")
    shared = {field for field in provenance("ppo-max") if not field.endswith(optional)}
    assert shared <= set(provenance(name))


@names
def test_to_toml_and_back(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(to_dict(preset(name))))
    assert from_dict(PPOConfig, read_toml(tmp_path / "run.toml")) == preset(name)


def test_provenance_is_a_copy() -> None:
    provenance("ppo-max").clear()
    assert provenance("ppo-max")


def test_overrides() -> None:
    config = preset("vanilla", gamma=0.5, **{"rollout.top_p": 1, "policy_optim.schedule.warmup": 7})
    assert (config.gamma, config.rollout.top_p, config.policy_optim.schedule.warmup) == (0.5, 1.0, 7.0)
    assert config.critic_optim.schedule.warmup == 0.1
    assert preset("vanilla").rollout == RolloutConfig()


def test_overrides_of_groups() -> None:
    one = preset("moss-en", policy_optim={"lr": 1e-3, "schedule": {"floor": 0.5}}, rollout={"top_k": 5})
    assert one == preset("moss-en", **{"policy_optim.lr": 1e-3, "policy_optim.schedule.floor": 0.5, "rollout.top_k": 5})
    assert one.policy_optim.schedule.kind == "inverse-sqrt"
    whole = OptimConfig(lr=1e-3, betas=(0.5, 0.6))
    assert preset("moss-en", policy_optim=whole).policy_optim == whole
    assert preset("moss-en", reward=RewardConfig(clip=None)).reward.clip is None


MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "preset": ("ppomax", {}, "unknown preset 'ppomax'; expected one of ppo-max, moss-en, moss-zh, vanilla"),
    "field": ("ppo-max", {"gama": 1.0}, "config: unknown field 'gama'; expected one of iterations,"),
    "nested field": ("ppo-max", {"rollout.top": 1}, "config.rollout: unknown field 'top'; expected one of"),
    "below a value": ("ppo-max", {"gamma.x": 1}, "unknown field 'gamma.x': gamma is a value, no table"),
    "type": ("ppo-max", {"gamma": "a"}, "config.gamma = 'a': expected float"),
    "value": ("ppo-max", {"rollout.top_p": 2.0}, "RolloutConfig.top_p = 2.0: expected a number > 0 and <= 1"),
    "table": ("ppo-max", {"rollout": 3}, "config.rollout = 3: expected a table"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case: str) -> None:
    name, overrides, expected = MISTAKES[case]
    with pytest.raises(InputError) as caught:
        preset(name, **overrides)
    assert str(caught.value).startswith(expected)
