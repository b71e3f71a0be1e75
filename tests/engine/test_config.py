"""Configurations: what is impossible is refused with field, value and range; dicts and TOML and back."""

import ast
import dataclasses
import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from ppomax.engine import config
from ppomax.engine.config import (
    EvalConfig,
    GenerateConfig,
    LoRAConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    RuntimeConfig,
    ScheduleConfig,
    SFTConfig,
    from_dict,
    to_dict,
)
from ppomax.engine.errors import InputError
from ppomax.engine.runs import read_toml

FROM_0, ABOVE_0, FROM_1 = "a number >= 0", "a number > 0", "a whole number >= 1"
SHARE, HALF = "a number >= 0 and <= 1", "a number >= 0 and <= 0.5"
WHOLE_FROM_0 = "a whole number >= 0"
FLAG = "one of False, True"
NOT_POSITIVE, NEGATIVE = (0, -1), (-1, -0.5)
NOT_A_SHARE = (-0.1, 1.1)

# class -> field -> what is expected, and values beside those that no number may be
RANGES: dict[Any, dict[str, tuple[str, tuple[Any, ...]]]] = {
    ScheduleConfig: {
        "kind": ("one of 'constant', 'cosine', 'inverse-sqrt'", ("linear", None)),
        "warmup": (FROM_0, NEGATIVE),
        "floor": (SHARE, NOT_A_SHARE),
    },
    OptimConfig: {
        "lr": (FROM_0, NEGATIVE),
        "betas": ("two numbers in [0, 1)", ((0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), 0.9, "ab", None)),
        "eps": (ABOVE_0, NOT_POSITIVE),
        "weight_decay": (FROM_0, NEGATIVE),
        "moments": ("one of 'float32', '8bit'", ("int8", "32bit", None)),
        "offload": (FLAG, ("yes", None)),
    },
    RuntimeConfig: {
        "device": ("'auto', 'cpu', 'cuda' or 'cuda:N'", ("tpu", "cuda:", "cuda:-1", "meta", "", None)),
        "dtype": ("one of 'auto', 'float32', 'bfloat16'", ("float16", "int8", None)),
        **dict.fromkeys(("exact", "deterministic", "compile", "liger", "offload_frozen"), (FLAG, ("yes", None))),
        "attention": ("one of 'auto', 'flash-attn', 'torch', 'sdpa'", ("flash", None)),
        "checkpointing": ("one of 'none', 'selective', 'layer'", ("full", True, None)),
        "seed": ("a whole number >= 0 and <= 2147483647", (-1, 2**31, 0.5)),
        "shard_size": (FROM_1, NOT_POSITIVE),
        "save_every": (FROM_1, NOT_POSITIVE),
        "keep_checkpoints": (FROM_1, NOT_POSITIVE),
    },
    LoRAConfig: {
        "rank": (WHOLE_FROM_0, NEGATIVE),
        "alpha": (FROM_1, NOT_POSITIVE),
        "rslora": (FLAG, ("yes", None)),
        "targets": (
            "names of linear layers, or all-linear alone",
            ((), ("",), "q_proj", ("all-linear", "q_proj"), None),
        ),
    },
    RolloutConfig: {
        "max_response": (FROM_1, NOT_POSITIVE),
        "temperature": (FROM_0, NEGATIVE),
        "top_p": ("a number > 0 and <= 1", (0, -0.1, 1.1)),
        "top_k": (WHOLE_FROM_0, NEGATIVE),
        "repetition_penalty": (ABOVE_0, NOT_POSITIVE),
        "max_running": (FROM_1, NOT_POSITIVE),
        "prefill_tokens": (FROM_1, NOT_POSITIVE),
        "block_size": (FROM_1, NOT_POSITIVE),
        "kv_memory": ("a number > 0 and <= 1", (0, -0.1, 1.1)),
        "kv_blocks": ("a whole number >= 2", (1, 0)),
        "sleep": (FLAG, ("yes", None)),
        "cuda_graphs": (FLAG, ("yes", None)),
        "attention": ("one of 'auto', 'triton', 'torch', 'flash-attn'", ("sdpa", None)),
        "stop": ("texts, none empty", (("",), ("a", 3), "a", None)),
    },
    RewardConfig: {
        "transform": ("one of 'normalize', 'scale', 'none'", ("normalise", None)),
        "clip": (ABOVE_0, NOT_POSITIVE),
    },
    SFTConfig: {
        **dict.fromkeys(
            ("epochs", "max_steps", "batch_size", "micro_batch_tokens", "eval_every"), (FROM_1, NOT_POSITIVE)
        ),
        "max_sequence": ("a whole number >= 2", (1, 0)),
        "held_out": (HALF, (-0.1, 0.6)),
        "grad_clip": (ABOVE_0, NOT_POSITIVE),
        "vocab_size": ("a whole number >= 300", (299,)),
    },
    RewardModelConfig: {
        **dict.fromkeys(
            ("max_steps", "batch_size", "batch_tokens", "micro_batch_tokens", "eval_every"), (FROM_1, NOT_POSITIVE)
        ),
        "max_sequence": ("a whole number >= 2", (1, 0)),
        "imitation_coef": (FROM_0, NEGATIVE),
        "held_out": (HALF, (-0.1, 0.6)),
        "grad_clip": (ABOVE_0, NOT_POSITIVE),
    },
    PPOConfig: {
        **dict.fromkeys(
            ("iterations", "rollouts_per_iteration", "minibatch_size", "ppo_epochs", "micro_batch_tokens",
             "ptx_batch_size", "critic_pretrain_epochs", "samples_per_prompt"),
            (FROM_1, NOT_POSITIVE),
        ),
        "max_sequence": ("a whole number >= 2", (1, 0)),
        **dict.fromkeys(("gamma", "gae_lambda", "critic_pretrain_tolerance"), (SHARE, NOT_A_SHARE)),
        **dict.fromkeys(("kl_coef", "entropy_coef", "ptx_coef"), (FROM_0, NEGATIVE)),
        **dict.fromkeys(("critic_pretrain_iterations", "eval_every", "extra_in_flight"), (WHOLE_FROM_0, NEGATIVE)),
        **dict.fromkeys(
            ("importance_clip", "value_clip", "entropy_bound", "advantage_clip", "logprob_temperature", "grad_clip"),
            (ABOVE_0, NOT_POSITIVE),
        ),
        "clip_eps": ("a number > 0 and <= 1", (0, -0.1, 1.1)),
        "dual_clip": ("a number > 1.2", (1.2, 1, 0.5)),
        "held_out": (HALF, (-0.1, 0.6)),
        "ratio_base": ("one of 'rollout', 'reference'", ("sft", None)),
        "old_logprobs": ("one of 'recomputed', 'recorded'", ("guessed", None)),
        "bootstrap_truncated": (FLAG, ("yes", None)),
        "normalize_advantages": (FLAG, ("yes", None)),
    },
    GenerateConfig: {"max_sequence": ("a whole number >= 2", (1, 0))},
    EvalConfig: {
        "max_sequence": ("a whole number >= 2", (1, 0)),
        "max_prompts": (FROM_1, NOT_POSITIVE),
        "micro_batch_tokens": (FROM_1, NOT_POSITIVE),
        "held_out": (HALF, (-0.1, 0.6)),
        "tie_margin": (FROM_0, NEGATIVE),
    },
}  # fmt: skip
OPTIONAL = {
    (SFTConfig, "max_steps"), (SFTConfig, "grad_clip"), (RewardModelConfig, "batch_size"), (RewardConfig, "clip"),
    (RewardModelConfig, "grad_clip"),
    *((PPOConfig, name) for name in ("importance_clip", "value_clip", "dual_clip", "entropy_bound", "advantage_clip")),
    (PPOConfig, "grad_clip"), (RolloutConfig, "kv_blocks"), (RuntimeConfig, "shard_size"),
}  # fmt: skip
FIELDS = [(cls, name) for cls, fields in RANGES.items() for name in fields]
fields = pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[f"{cls.__name__}.{name}" for cls, name in FIELDS])


def impossible(cls: Any, name: str) -> list[Any]:
    """Values that the field cannot have, those included that no number can be."""
    expected, values = RANGES[cls][name]
    bad = list(values)
    if "number " in expected and name != "betas":
        bad += [math.nan, math.inf, -math.inf, "3", True]
        bad += [1.5] if "whole" in expected else []
        bad += [] if (cls, name) in OPTIONAL else [None]
    return bad


@fields
def test_impossible_values_are_refused_with_field_value_and_range(cls: Any, name: str) -> None:
    for value in impossible(cls, name):
        with pytest.raises(InputError) as caught:
            cls(**{name: value})
        assert str(caught.value) == f"{cls.__name__}.{name} = {value!r}: expected {RANGES[cls][name][0]}"


@pytest.mark.parametrize(
    ("cls", "name"), sorted(OPTIONAL, key=str), ids=lambda value: getattr(value, "__name__", value)
)
def test_nothing_is_possible_where_it_has_a_meaning(cls: Any, name: str) -> None:
    assert getattr(cls(**{name: None}), name) is None


@pytest.mark.parametrize("cls", RANGES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_range_or_is_a_config(cls: Any) -> None:
    plain = {f.name for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(getattr(cls(), f.name))}
    assert plain == set(RANGES[cls])


def test_ends_of_the_ranges_are_possible() -> None:
    assert ScheduleConfig(floor=1.0).floor == 1
    assert OptimConfig(lr=0.0, betas=(0.0, 0.999)).lr == 0
    assert RuntimeConfig(device="cuda:1", seed=2**31 - 1).device == "cuda:1"
    assert RolloutConfig(temperature=0, top_p=1, max_response=1).top_p == 1
    assert RewardConfig("none", None).clip is None
    assert SFTConfig(max_steps=None, grad_clip=None, held_out=0.5, vocab_size=300).max_steps is None
    assert PPOConfig(gamma=0, gae_lambda=1, clip_eps=1, dual_clip=2.01, value_clip=None, eval_every=0).gamma == 0
    assert EvalConfig(tie_margin=0, max_prompts=1).tie_margin == 0


CROSS = {
    "no room for a prompt": (
        lambda: PPOConfig(max_sequence=512),
        "PPOConfig.max_sequence = 512: expected more than rollout.max_response = 512, or no prompt fits",
    ),
    "no room for a prompt, by the response": (
        lambda: EvalConfig(rollout=RolloutConfig(max_response=4096)),
        "EvalConfig.max_sequence = 2048: expected more than rollout.max_response = 4096, or no prompt fits",
    ),
    "no room for a prompt, generate": (
        lambda: GenerateConfig(max_sequence=100, rollout=RolloutConfig(max_response=100)),
        "GenerateConfig.max_sequence = 100: expected more than rollout.max_response = 100, or no prompt fits",
    ),
    "broken minibatches": (
        lambda: PPOConfig(rollouts_per_iteration=100),
        "PPOConfig.minibatch_size = 32: expected a divisor of rollouts_per_iteration = 100",
    ),
    "minibatch above the batch": (
        lambda: PPOConfig(minibatch_size=256),
        "PPOConfig.minibatch_size = 256: expected a divisor of rollouts_per_iteration = 128",
    ),
}


@pytest.mark.parametrize("case", CROSS)
def test_fields_that_contradict_each_other_are_refused(case: str) -> None:
    make, expected = CROSS[case]
    with pytest.raises(InputError) as caught:
        make()
    assert str(caught.value) == expected


def test_derived_values() -> None:
    config = PPOConfig(iterations=10, rollouts_per_iteration=128, minibatch_size=32, ppo_epochs=2)
    assert config.optimizer_steps == 80
    assert config.max_prompt == 2048 - 512
    assert EvalConfig(max_sequence=600).max_prompt == 88


def test_configs_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig().gamma = 0.5  # type: ignore[misc]


# Dicts and TOML


FULL = [
    SFTConfig(epochs=3, max_steps=7, grad_clip=None, runtime=RuntimeConfig(device="cpu", seed=5)),
    RewardModelConfig(batch_tokens=512, imitation_coef=0.0, optim=OptimConfig(betas=(0.5, 0.6))),
    PPOConfig(dual_clip=3.0, value_clip=None, bootstrap_truncated=True, reward=RewardConfig("scale", None)),
    EvalConfig(rollout=RolloutConfig(top_k=5), tie_margin=0.0),
    GenerateConfig(),
]


@pytest.mark.parametrize("config", FULL, ids=lambda config: type(config).__name__)
def test_to_toml_and_back(config: Any, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(to_dict(config)))
    assert from_dict(type(config), read_toml(tmp_path / "run.toml")) == config


def test_fields_left_out_keep_their_defaults() -> None:
    config = from_dict(PPOConfig, {"gamma": 0.5, "rollout": {"top_p": 1}})
    assert config == PPOConfig(gamma=0.5, rollout=RolloutConfig(top_p=1.0))
    assert isinstance(config.rollout.top_p, float)


MISTAKES: dict[str, tuple[Any, dict[str, Any] | Any, str]] = {
    "unknown": (SFTConfig, {"epoch": 3}, "run.toml: unknown field 'epoch'; expected one of epochs, max_steps, batch"),
    "unknown, nested": (
        PPOConfig,
        {"rollout": {"top": 1}},
        "run.toml.rollout: unknown field 'top'; expected one of max_response, temperature",
    ),
    "of another command": (SFTConfig, {"gamma": 1.0}, "run.toml: unknown field 'gamma'"),
    "text for a number": (PPOConfig, {"gamma": "1"}, "run.toml.gamma = '1': expected float"),
    "float for a whole number": (PPOConfig, {"iterations": 3.0}, "run.toml.iterations = 3.0: expected int"),
    "flag for a whole number": (PPOConfig, {"iterations": True}, "run.toml.iterations = True: expected int"),
    "flag for a number": (PPOConfig, {"gamma": True}, "run.toml.gamma = True: expected float"),
    "number for a flag": (PPOConfig, {"bootstrap_truncated": 1}, "run.toml.bootstrap_truncated = 1: expected bool"),
    "number for text": (PPOConfig, {"runtime": {"device": 1}}, "run.toml.runtime.device = 1: expected str"),
    "list for an optional number": (PPOConfig, {"value_clip": [1]}, "run.toml.value_clip = [1]: expected float"),
    "none where it is not allowed": (PPOConfig, {"gamma": "none"}, "run.toml.gamma = 'none': expected float"),
    "choice": (
        RewardConfig,
        {"transform": "whiten"},
        "run.toml.transform = 'whiten': expected one of 'normalize', 'scale', 'none'",
    ),
    "value for a table": (PPOConfig, {"rollout": 3}, "run.toml.rollout = 3: expected a table"),
    "no table at all": (PPOConfig, 3, "run.toml = 3: expected a table"),
    "number for a list": (OptimConfig, {"betas": 0.9}, "run.toml.betas = 0.9: expected a list"),
    "text in a list": (OptimConfig, {"betas": ["a", 0.9]}, "run.toml.betas = 'a': expected float"),
    "impossible value": (PPOConfig, {"gamma": 2.0}, "PPOConfig.gamma = 2.0: expected a number >= 0 and <= 1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_a_file_are_named(case: str) -> None:
    cls, values, expected = MISTAKES[case]
    with pytest.raises(InputError) as caught:
        from_dict(cls, values, "run.toml")
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


# The paper's training settings


def test_defaults_of_the_stages_before_ppo() -> None:
    sft, rm = SFTConfig(), RewardModelConfig()
    assert (sft.epochs, sft.optim.lr) == (2, 9.5e-6)
    assert (sft.optim.schedule.kind, sft.optim.schedule.floor) == ("cosine", 0.1)
    assert (rm.max_steps, rm.optim.lr, rm.imitation_coef) == (1000, 5e-6, 1.0)
    assert (rm.optim.schedule.kind, rm.optim.schedule.warmup) == ("constant", 0.1)


def test_every_setting_says_what_it_is() -> None:
    """In the text that `--help` shows, below the field."""
    for cls in ast.parse(inspect.getsource(config)).body:
        if isinstance(cls, ast.ClassDef):
            for field, below in itertools.pairwise([*cls.body, ast.Pass()]):
                if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config"):
                    said = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                    assert said, f"{cls.name}.{ast.unparse(field.target)}"
