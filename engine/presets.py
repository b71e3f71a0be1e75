"""The named PPO presets: every value beside the place that it comes from.

Sources: "paper" is "Secrets of RLHF in Large Language Models Part I: PPO" (arXiv 2307.04964); "scripts" are the
released training scripts of OpenLMLab/MOSS-RLHF; "chosen" marks what neither states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from .config import PPOConfig, from_dict, to_dict
from .errors import InputError

Row = tuple[Any, str]

_COMMON: dict[str, Row] = {
    "ppo_epochs": (1, "paper section 5.4: each sample is used once"),
    "gamma": (1.0, "paper, training settings"),
    "bootstrap_truncated": (False, "scripts: the value after the last token is 0"),
    "clip_eps": (0.2, "paper, training settings"),
    "entropy_coef": (0.0, "paper section 5.4: not part of PPO-max"),
    "normalize_advantages": (False, "paper section 5.4: not part of PPO-max"),
    "ratio_base": ("rollout", "paper section 5.4: no importance sampling against the reference"),
    "logprob_temperature": (1.0, "scripts: log-probs on unprocessed logits"),
    "max_sequence": (2048, "paper, training settings"),
    "rollout.max_response": (512, "paper, training settings"),
    "rollout.temperature": (0.8, "paper, training settings"),
    "rollout.top_p": (0.9, "paper, training settings"),
    "rollout.repetition_penalty": (1.1, "paper, training settings"),
    "policy_optim.betas": ((0.9, 0.95), "scripts"),
    "policy_optim.eps": (1e-6, "scripts"),
    "policy_optim.weight_decay": (0.0, "scripts"),
    "critic_optim.betas": ((0.9, 0.95), "scripts"),
    "critic_optim.eps": (1e-8, "scripts"),
    "critic_optim.weight_decay": (0.0, "scripts"),
    "runtime.checkpointing": ("layer", "chosen: of 16,384 tokens, a 7B model keeps 4 GB then, and 50 GB if selective"),
}

_PAPER: dict[str, Row] = {
    "policy_optim.lr": (5e-7, "paper, training settings"),
    "critic_optim.lr": (1.65e-6, "paper, training settings"),
    "rollouts_per_iteration": (128, "paper, training settings"),
    "minibatch_size": (32, "paper, training settings"),
    "gae_lambda": (0.9, "paper, training settings"),
}

_PPO_MAX: dict[str, Row] = {
    "kl_coef": (0.05, "paper section 5.4"),
    "reward.transform": ("normalize", "paper Fig. 5 and section 5.4"),
    "reward.clip": (5.0, "chosen: the paper clips but does not state the bound"),
    "value_clip": (0.2, "paper, training settings"),
    "grad_clip": (1.0, "paper section 5.4"),
    "ptx_coef": (0.05, "chosen: the paper uses PPO-ptx but does not state the weight"),
    "ptx_batch_size": (32, "chosen: as many dialogues as rollouts in a minibatch"),
    "critic_pretrain_iterations": (8, "chosen: the paper trains the critic until its loss levels off"),
    "policy_optim.schedule.kind": ("constant", "paper section 5.4: critic pre-training instead of a warm-up"),
    "critic_optim.schedule.kind": ("constant", "paper section 5.4: critic pre-training instead of a warm-up"),
}

_MOSS: dict[str, Row] = {
    "policy_optim.lr": (5e-7, "scripts"),
    "critic_optim.lr": (1.5e-6, "scripts"),
    "rollouts_per_iteration": (14, "scripts: 2 per process on 7 processes"),
    "minibatch_size": (14, "scripts: 2 per process on 7 processes"),
    "gae_lambda": (0.95, "scripts"),
    "reward.transform": ("scale", "scripts"),
    "reward.clip": (None, "scripts"),
    "value_clip": (0.2, "scripts"),
    "grad_clip": (1.0, "scripts"),
    "ptx_coef": (0.0, "scripts"),
    "critic_pretrain_iterations": (0, "scripts"),
    **{
        f"{model}_optim.schedule.{name}": (value, "scripts")
        for model in ("policy", "critic")
        for name, value in (("kind", "inverse-sqrt"), ("warmup", 100.0), ("floor", 0.1))
    },
}

_VANILLA: dict[str, Row] = {
    "kl_coef": (0.0, "paper Fig. 4: PPO without its constraints"),
    "reward.transform": ("none", "paper Fig. 4: PPO without its constraints"),
    "reward.clip": (None, "paper Fig. 4: PPO without its constraints"),
    "value_clip": (None, "paper Fig. 4: PPO without its constraints"),
    "grad_clip": (None, "paper Fig. 4: PPO without its constraints"),
    "ptx_coef": (0.0, "paper Fig. 4: PPO without its constraints"),
    "critic_pretrain_iterations": (0, "paper Fig. 4: PPO without its constraints"),
    **{
        f"{model}_optim.schedule.{name}": (value, "paper, training settings: 10 % warm-up")
        for model in ("policy", "critic")
        for name, value in (("kind", "constant"), ("warmup", 0.1))
    },
}

PRESETS: dict[str, dict[str, Row]] = {
    "ppo-max": {**_COMMON, **_PAPER, **_PPO_MAX},
    "moss-en": {**_COMMON, **_MOSS, "kl_coef": (0.01, "scripts, English")},
    "moss-zh": {**_COMMON, **_MOSS, "kl_coef": (0.1, "scripts, Chinese")},
    "vanilla": {**_COMMON, **_PAPER, **_VANILLA},
}


def preset(name: str, **overrides: Any) -> PPOConfig:
    """The named preset with `overrides`: fields by dotted name (`**{"rollout.top_p": 1.0}`), some of a group as a dict
    (`rollout={"top_p": 1.0}`), or a whole group, of which nothing stays (`rollout=RolloutConfig(top_p=1.0)`).

    Presets hold the settings of 7B models. Raises InputError for an unknown preset or field.
    """
    values = {field: value for field, (value, _) in _rows(name).items()}
    return from_dict(PPOConfig, _nest({**values, **dict(_flat(overrides))}))


def provenance(name: str) -> dict[str, Row]:
    """Dotted field name -> (value, where it comes from), for every field that the preset sets."""
    return dict(_rows(name))


def _rows(name: str) -> dict[str, Row]:
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _flat(nested: dict[str, Any], group: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of what tables and configurations hold."""
    for name, value in nested.items():
        table = to_dict(value) if dataclasses.is_dataclass(value) else value
        if isinstance(table, dict):
            yield from _flat(table, f"{group}{name}.")
        else:
            yield f"{group}{name}", value


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        *groups, leaf = dotted.split(".")
        table = nested
        for group in groups:
            table = table.setdefault(group, {})
            if not isinstance(table, dict):
                raise InputError(f"unknown field {dotted!r}: {group} is a value, no table")
        table[leaf] = value
    return nested
