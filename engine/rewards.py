"""Rewards: a reward model or a Python function, and the reparameterisation of their scores."""

from __future__ import annotations

import importlib
import math
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import Prompt, Rollout, pack_rollouts
from .config import RewardConfig
from .errors import InputError, first_line
from .models import (
    Placement,
    ScalarModel,
    check_same_tokenizer,
    check_vocabulary,
    load_reward_model,
    load_tokenizer,
)
from .parallel import ALONE, Ranks
from .templates import Template

RewardFunction = Callable[[list[list[dict[str, str]]], list[str]], Sequence[float]]
"""(prompts as chat messages, response texts) -> one finite score a response."""

Source = str | Path | RewardFunction
"""Of rewards: a reward-model folder, `module:function`, or a function."""

_LARGEST = torch.finfo(torch.float32).max
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def load_function(name: str) -> RewardFunction:
    """Import `module:function`; the current folder is searched too. InputError where that fails."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InputError(f"reward function {name!r}: expected module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the module's own code runs here and may fail in any way
        # Recorded by a run that was given it in Python: a script's own, a lambda, an object, a method.
        unnamed = module_name == "__main__" or not function_name.isidentifier()
        advice = "; from Python, PPOTrainer.resume(folder, reward=..., judge=...) takes it" if unnamed else ""
        raise InputError(f"reward function {name!r}: {type(error).__name__}: {first_line(error)}{advice}") from error
    if not callable(function):
        raise InputError(f"reward function {name!r}: expected a function, found {type(function).__name__}")
    return function


def qualified_name(function: RewardFunction) -> str:
    """`module:function`; `module:<Class>` of an object that is called, which no import finds."""
    named = function if hasattr(function, "__qualname__") else type(function)
    name = named.__qualname__
    return f"{named.__module__}:{name if named is function else f'<{name}>'}"


def call_reward(function: RewardFunction, prompts: list[list[dict[str, str]]], responses: list[str]) -> Tensor:
    """The function's scores `[S]` float32; InputError unless they are S finite numbers."""
    name = qualified_name(function).partition(":")[2]
    try:
        scores = function(prompts, responses)
        scores = list(scores) if isinstance(scores, Iterator) else scores
    except Exception as error:
        raise InputError(
            f"reward function {name}: {type(error).__name__}: {first_line(error)} ({_place(error)})"
        ) from error
    try:
        if isinstance(scores, (str, bytes, Mapping)):  # a list could be made of them, but not of what they say
            raise TypeError
        values = [float(score) for score in scores]
    except (TypeError, ValueError, OverflowError):
        found = " ".join(repr(scores).split())
        raise InputError(f"reward function {name}: expected {len(responses)} numbers, got {found:.80}") from None
    if len(values) != len(responses):
        raise InputError(f"reward function {name}: expected {len(responses)} scores, got {len(values)}")
    for index, value in enumerate(values):
        if not abs(value) <= _LARGEST:
            raise InputError(f"reward function {name}: score {index} is {value}, expected a finite float32")
    return torch.tensor(values, dtype=torch.float32)


def _place(error: BaseException) -> str:
    """Where a reward function failed: the last line of its own, not of a library that it called."""
    _, *frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "called as function(prompts, responses)"
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    place = (own or frames)[-1]
    return f"{place.filename}:{place.lineno}"


class RunningMoments:
    """Mean and standard deviation of everything seen so far, merged batch by batch (Chan, Golub, LeVeque 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """Merge `[S]` values."""
        values = values.double()
        count = values.numel()
        mean = float(values.mean())
        m2 = float(((values - mean) ** 2).sum())
        total = self.count + count
        delta = mean - self.mean
        self.m2 += m2 + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Unbiased; 1 while there is nothing to tell it from (fewer than two values, or all of them equal)."""
        std = math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0
        return std if std > 0 else 1.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def reparameterise(scores: Tensor, moments: RunningMoments, config: RewardConfig) -> Tensor:
    """Merge the scores `[S]` into the history, then shift, scale and clip them by it (paper Fig. 5, star 5)."""
    moments.update(scores)
    if config.transform == "normalize":
        scores = (scores - moments.mean) / moments.std
    elif config.transform == "scale":
        scores = scores / moments.std
    return scores if config.clip is None else scores.clamp(-config.clip, config.clip)


class Reward(Protocol):
    """Scores one iteration's rollouts. Each process scores a part of them and gets the scores of all."""

    def __call__(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Tensor:
        """`[S]` float32 on the CPU."""


class ModelReward:
    """The reward model's scalar at each response's last token."""

    def __init__(self, model: ScalarModel, micro_batch_tokens: int, ranks: Ranks = ALONE) -> None:
        self.model, self.micro_batch_tokens, self.ranks = model.requires_grad_(False), micro_batch_tokens, ranks

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Tensor:
        groups = self.ranks.micro_batches([len(r.tokens) for r in rollouts], self.micro_batch_tokens)
        batches = (pack_rollouts([rollouts[i] for i in group], self.model.device) for group in groups)
        with self.ranks.at_hand(self.model):
            own = torch.cat([self.model.scores(batch) for batch in batches])
        scores = own.new_zeros(len(rollouts))
        scores[torch.tensor([i for group in groups for i in group], dtype=torch.int64)] = own
        return self.ranks.sum(scores).cpu()


class FunctionReward:
    """A Python function over texts."""

    def __init__(self, function: RewardFunction, template: Template, ranks: Ranks = ALONE) -> None:
        self.function, self.template, self.ranks = function, template, ranks

    def __call__(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Tensor:
        own = self.ranks.share([1] * len(rollouts))

        def score() -> list[tuple[int, float]]:
            texts = [self.template.decode(rollouts[i].response) for i in own]
            chats = [[{**message} for message in prompts[i].messages] for i in own]  # the function may change its own
            scores = call_reward(self.function, chats, texts) if own else torch.empty(0)
            return list(zip(own, scores.tolist(), strict=True))

        return torch.tensor([score for _, score in sorted(self.ranks.gather_from(score))], dtype=torch.float32)


def is_function(source: Source) -> bool:
    """True for a function or `module:function`, False for a folder."""
    return callable(source) or (not Path(source).exists() and ":" in str(source))


def make_reward(
    source: Source, template: Template, placement: Placement, micro_batch_tokens: int, ranks: Ranks = ALONE
) -> Reward:
    """The reward that `source` names. Raises InputError where a reward model's tokenizer is not the template's."""
    if is_function(source):
        function = source if callable(source) else load_function(str(source))
        return FunctionReward(function, template, ranks)
    folder = str(source)
    model = load_reward_model(folder, ranks.placement(placement, frozen=True))
    check_same_tokenizer(template.tokenizer, load_tokenizer(folder), f"the policy and the reward model in {folder}")
    check_vocabulary(template.tokenizer, model, folder)
    return ModelReward(model, micro_batch_tokens, ranks)
