"""Reward functions and models, what is refused of them, and the reparameterisation of their scores."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ppomax.engine.batch import Prompt, Rollout
from ppomax.engine.checkpoint import save_model
from ppomax.engine.config import RewardConfig
from ppomax.engine.errors import InputError
from ppomax.engine.models import CPU
from ppomax.engine.rewards import (
    FunctionReward,
    ModelReward,
    RunningMoments,
    call_reward,
    is_function,
    load_function,
    make_reward,
    reparameterise,
)
from ppomax.engine.templates import Template

# Functions


def returning(value: Any) -> Callable:
    def score(prompts: list, responses: list) -> Any:
        return value

    return score


@pytest.mark.parametrize(
    "scores",
    [[1, -2.5], (1.0, -2.5), np.array([1.0, -2.5]), torch.tensor([1.0, -2.5]), [np.float32(1), torch.tensor(-2.5)]],
    ids=["list", "tuple", "numpy", "torch", "mixed"],
)
def test_scores_of_any_kind_of_number(scores: Any) -> None:
    result = call_reward(returning(scores), [[], []], ["a", "b"])
    assert result.dtype == torch.float32
    assert result.tolist() == [1.0, -2.5]


@pytest.mark.parametrize(
    ("scores", "match"),
    [
        ([1.0], "expected 2 scores, got 1"),
        ([1.0, 2.0, 3.0], "expected 2 scores, got 3"),
        ([], "expected 2 scores, got 0"),
        ([1.0, math.nan], "score 1 is nan, expected a finite"),
        ([math.inf, 1.0], "score 0 is inf, expected a finite"),
        ([1.0, -math.inf], "score 1 is -inf, expected a finite"),
        ([1.0, 1e39], r"score 1 is 1e\+39, expected a finite"),
        ([10**400, 1.0], "expected 2 numbers, got "),
        (["good", "bad"], r"expected 2 numbers, got \['good', 'bad'\]"),
        ([1.0, None], "expected 2 numbers"),
        ([[1.0, 2.0], [3.0, 4.0]], "expected 2 numbers"),
        (None, "expected 2 numbers, got None"),
        (1.0, r"expected 2 numbers, got 1\.0"),
        (torch.ones(2, 2), "expected 2 numbers"),
        ("12", "expected 2 numbers, got '12'"),
        ({0: 0.5, 1: 1.5}, r"expected 2 numbers, got \{0: 0\.5, 1: 1\.5\}"),
    ],
    ids=["few", "many", "none", "nan", "inf", "-inf", "float32-inf", "huge", "text", "hole", "nested", "None", "number",
         "matrix", "digits", "dict"],
)  # fmt: skip
def test_unusable_scores(scores: Any, match: str) -> None:
    with pytest.raises(InputError, match=match) as raised:
        call_reward(returning(scores), [[], []], ["a", "b"])
    assert "reward function returning.<locals>.score: " in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_function_that_fails() -> None:
    def score(prompts: list, responses: list) -> list[float]:
        return [1 / len(response) for response in responses]

    def one_by_one(prompts: list, responses: list) -> Iterator[float]:
        yield from score(prompts, responses)

    for function in (score, one_by_one):
        with pytest.raises(InputError, match=r"ZeroDivisionError: division by zero \(.*test_rewards\.py:\d+\)$"):
            call_reward(function, [[], []], ["a", ""])
    assert call_reward(one_by_one, [[], []], ["a", "bb"]).tolist() == [1.0, 0.5]


class Judge:
    def __call__(self, prompts: list, responses: list) -> list[float]:
        return [json.loads(response) for response in responses]


def test_a_failing_library_is_named_by_the_line_that_called_it() -> None:
    with pytest.raises(InputError, match=r"^reward function <Judge>: JSONDecodeError: .*test_rewards\.py:\d+\)$"):
        call_reward(Judge(), [[], []], ["1", "{"])
    assert call_reward(Judge(), [[], []], ["1", "2"]).tolist() == [1.0, 2.0]


def test_a_function_with_other_parameters() -> None:
    def score(completions: list, **columns: list) -> list[float]:
        return [0.0 for _ in completions]

    with pytest.raises(InputError, match=r"TypeError: .*takes 1 positional.*called as function\(prompts, responses\)"):
        call_reward(score, [[]], ["a"])


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module of reward functions to the current folder; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"rewards_{tmp_path.name}"

    def write(text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    sys.modules.pop(name, None)


def test_a_function_by_its_name(module: Callable[[str], str]) -> None:
    name = module("def length(prompts, responses):\n    return list(map(len, responses))\n")
    assert load_function(f"{name}:length")([], ["abc"]) == [3]


@pytest.mark.parametrize(
    ("text", "function", "match"),
    [
        ("", "score", "has no attribute 'score'"),
        ("score = 3", "score", "expected a function, found int"),
        ("import nowhere_to_be_found", "score", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("def score(:", "score", "SyntaxError"),
        ("raise KeyError('one\\ntwo')", "score", "KeyError"),
        ("raise ValueError('one\\ntwo')", "score", "ValueError: one$"),
        ("1 / 0", "score", "ZeroDivisionError: division by zero"),
    ],
    ids=["missing", "no-function", "import", "syntax", "quoted", "two-lines", "failing"],
)
def test_functions_that_cannot_be_imported(text: str, function: str, match: str, module: Callable[[str], str]) -> None:
    name = f"{module(text)}:{function}"
    with pytest.raises(InputError, match=match) as raised:
        load_function(name)
    assert repr(name) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["score", ":score", "module:", ":", ""])
def test_names_that_name_no_function(name: str) -> None:
    with pytest.raises(InputError, match="expected module:function"):
        load_function(name)


def test_a_missing_module() -> None:
    with pytest.raises(InputError, match=r"'nowhere_at_all:score'.*No module named 'nowhere_at_all'"):
        load_function("nowhere_at_all:score")


def test_what_names_a_function(reward_folder: Path, tmp_path: Path) -> None:
    assert is_function(returning([]))
    assert is_function("module:function")
    assert not is_function(reward_folder)
    assert not is_function(str(tmp_path / "later"))
    (tmp_path / "a:b").mkdir()
    assert not is_function(tmp_path / "a:b")


def prompt(*tokens: int) -> Prompt:
    return Prompt([{"role": "user", "content": f"question {tokens}"}], list(tokens))


def rollout(tokens: list[int], response: list[int]) -> Rollout:
    return Rollout(
        tokens, response, torch.zeros(len(response)), finished=response[-1] == 1, versions=[0] * len(response)
    )


def test_a_function_sees_messages_and_text(tokenizer: Any) -> None:
    seen: list[Any] = []

    def score(prompts: list, responses: list) -> list[float]:
        seen.extend([prompts, responses])
        return [float(len(response)) for response in responses]

    prompts = [prompt(5), prompt(6, 7)]
    answers = ["red doors", "a river sings"]
    rollouts = [
        rollout(p.tokens, [*tokenizer.encode(f" {answer}"), 1]) for p, answer in zip(prompts, answers, strict=True)
    ]
    scores = FunctionReward(score, Template(tokenizer, "en"))(prompts, rollouts)
    assert seen == [[p.messages for p in prompts], answers]
    assert scores.tolist() == [9.0, 13.0]


def test_a_function_may_change_what_it_is_given(tokenizer: Any) -> None:
    """Often the answer is appended to the chat; the next iteration shows the prompt as it was."""

    def score(prompts: list, responses: list) -> list[float]:
        for chat, response in zip(prompts, responses, strict=True):
            chat[0]["content"] += "!"
            chat.append({"role": "assistant", "content": response})
        return [float(len(chat)) for chat in prompts]

    given = prompt(5)
    reward = FunctionReward(score, Template(tokenizer, "en"))
    for _ in range(2):
        assert reward([given], [rollout([5], [7, 1])]).tolist() == [2.0]
    assert given.messages == prompt(5).messages


# Models


def draw_rollouts(seed: int = 0) -> list[Rollout]:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(2, 61, (count,), generator=generator).tolist()

    return [rollout(draw(p), draw(r)) for p, r in ((3, 5), (9, 1), (1, 12), (4, 4), (2, 7))]


@torch.no_grad()
def test_a_models_scores_do_not_depend_on_the_micro_batches(new_scalar: Any, plain: Any) -> None:
    scalar, rollouts = new_scalar(dtype=torch.float64), draw_rollouts()
    model = plain(scalar)
    hidden = [model.base_model(torch.tensor([r.tokens])).last_hidden_state[0, -1] for r in rollouts]
    expected = model.score(torch.stack(hidden))[:, 0]
    for budget in (1, 10, 20, 1000):
        scores = ModelReward(scalar, budget)([], rollouts)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
        assert not scores.requires_grad
    assert not any(parameter.requires_grad for parameter in scalar.parameters())


def test_a_reward_from_a_folder_or_a_function(reward_folder: Path, tokenizer: Any) -> None:
    template = Template(tokenizer, "en")
    rollouts = draw_rollouts()
    prompts = [prompt(1)] * len(rollouts)
    scores = make_reward(reward_folder, template, CPU, 64)(prompts, rollouts)
    assert scores.shape == (5,)
    assert scores.dtype == torch.float32
    assert scores.unique().numel() == 5
    assert make_reward(returning([1] * 5), template, CPU, 64)(prompts, rollouts).tolist() == [1.0] * 5
    judge = make_reward("ppomax.engine.world:gold_rewards", template, CPU, 64)
    assert isinstance(judge, FunctionReward)


def test_a_reward_model_with_other_tokens(
    reward_folder: Path, tokenizer: Any, texts: list[str], new_scalar: Any, tmp_path: Path
) -> None:
    from ppomax.engine.builtin import train_tokenizer

    foreign = train_tokenizer([text[::-1] for text in texts], 300)
    with pytest.raises(InputError, match=r"the policy and the reward model in .* use different tokenizers"):
        make_reward(reward_folder, Template(foreign, "en"), CPU, 64)
    save_model(new_scalar(vocab_size=299), tokenizer, tmp_path)
    with pytest.raises(InputError, match="token id 299, but the model only ids below 299"):
        make_reward(tmp_path, Template(tokenizer, "en"), CPU, 64)


# Reparameterisation


def scores_of(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


batches = st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8), min_size=1, max_size=6)


@given(batches)
def test_moments_of_any_split_are_numpys(parts: list[list[float]]) -> None:
    moments, seen = RunningMoments(), np.zeros(0)
    for part in parts:
        moments.update(scores_of(part))
        seen = np.concatenate([seen, part])
        assert moments.count == len(seen)
        assert moments.mean == pytest.approx(seen.mean(), rel=1e-9, abs=1e-9)
        spread = seen.std(ddof=1) if len(seen) > 1 else 0.0
        # of values that nearly agree rounding leaves a trace of about 1e-16 of their size
        assert moments.std == pytest.approx(spread if spread > 0 else 1.0, rel=1e-6) or spread < 1e-9


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_equal_scores_are_left_unscaled(value: float, sizes: list[int]) -> None:
    moments = RunningMoments()
    for size in sizes:
        shaped = reparameterise(scores_of([value] * size), moments, RewardConfig("scale", clip=None))
        assert moments.std == 1.0
        assert shaped.tolist() == scores_of([value] * size).tolist()


def test_moments_come_back() -> None:
    moments, again = RunningMoments(), RunningMoments()
    moments.update(scores_of([1.0, 4.0]))
    again.load_state_dict(moments.state_dict())
    for each in (moments, again):
        each.update(scores_of([-3.0]))
    assert again.state_dict() == moments.state_dict()
    assert moments.state_dict() is not vars(moments)


@pytest.mark.parametrize("transform", ["normalize", "scale", "none"])
@pytest.mark.parametrize("clip", [None, 0.8])
@given(parts=batches)
def test_scores_are_transformed_by_their_history(transform: Any, clip: float | None, parts: list[list[float]]) -> None:
    """The moments include the batch itself; the clip comes last."""
    moments, history = RunningMoments(), []
    for part in parts:
        shaped = reparameterise(scores_of(part), moments, RewardConfig(transform, clip))
        history += part
        mean = sum(history) / len(history)
        variance = sum((x - mean) ** 2 for x in history) / max(len(history) - 1, 1)
        std = math.sqrt(variance) if variance > 1e-12 else None
        for ours, score in zip(shaped.tolist(), part, strict=True):
            shifted = score - mean if transform == "normalize" else score
            if transform != "none":
                if std is None:
                    continue  # what rounding leaves of equal scores decides
                shifted /= std
            expected = shifted if clip is None else min(max(shifted, -clip), clip)
            assert ours == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_single_score_is_not_scaled() -> None:
    assert reparameterise(scores_of([7.0]), RunningMoments(), RewardConfig("normalize", None)).tolist() == [0.0]
    assert reparameterise(scores_of([7.0]), RunningMoments(), RewardConfig("scale", None)).tolist() == [7.0]
    assert reparameterise(scores_of([7.0]), RunningMoments(), RewardConfig("scale", 5.0)).tolist() == [5.0]
