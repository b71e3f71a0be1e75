"""One policy beside another: who wins, by how much, and how far apart they are."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.engine.batch import Prompt, Rollout
from ppomax.engine.config import EvalConfig
from ppomax.engine.data import read_prompts, split_by_context
from ppomax.engine.errors import InputError
from ppomax.engine.evaluation import Answers, Evaluation, WinRate, evaluate
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

GOLD = "ppomax.engine.world:gold_rewards"


def answers(*scores: float, logprobs: list[float] | None = None, ref_logprobs: list[float] | None = None) -> Answers:
    """A response of two tokens to each prompt, every second one cut off."""
    rollouts = [
        Rollout([5, 6], [7, 1], torch.zeros(2), finished=i % 2 == 0, versions=[0, 0]) for i in range(len(scores))
    ]
    zeros = [-1.0] * 2 * len(scores)
    return Answers(
        prompts=[Prompt([{"role": "user", "content": str(i)}], [5, 6]) for i in range(len(scores))],
        rollouts=rollouts,
        scores={"judge": torch.tensor(scores)},
        logprobs=torch.tensor(logprobs or zeros),
        ref_logprobs=torch.tensor(ref_logprobs or zeros),
    )


def compare(policy: list[float], baseline: list[float], margin: float = 0.0) -> Evaluation:
    return Evaluation(answers(*policy), answers(*baseline), tie_margin=margin)


# Against hand-made scores


def test_win_tie_lose() -> None:
    evaluation = compare([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 3.9])
    assert evaluation.win_rate("judge") == WinRate(win=0.5, tie=0.25, lose=0.25)


def test_the_margin_is_a_share_of_the_baselines_deviation() -> None:
    """The baseline's scores 0, 2, 4, 6 deviate by sqrt(5): a margin of 0.5 makes 1.11 a tie, and 1.12 none."""
    baseline = [0.0, 2.0, 4.0, 6.0]
    for difference, expected in ((1.11, WinRate(0.0, 1.0, 0.0)), (1.13, WinRate(1.0, 0.0, 0.0))):
        policy = [score + difference for score in baseline]
        assert compare(policy, baseline, 0.5).win_rate("judge") == expected
        assert compare([score - difference for score in baseline], baseline, 0.5).win_rate("judge") == WinRate(
            expected.lose, expected.tie, expected.win
        )


def test_without_a_margin_equal_scores_are_ties() -> None:
    assert compare([1.0, 1.0], [1.0, 1.0]).win_rate("judge") == WinRate(0.0, 1.0, 0.0)


@pytest.mark.parametrize("count", [3, 7, 48])
def test_the_shares_are_shares(count: int) -> None:
    """No rounding leaves a share of ties where there is none, or one below zero."""
    generator = torch.Generator().manual_seed(count)
    for _ in range(20):
        differences = torch.randn(count, generator=generator).sign().tolist()
        rate = compare(differences, [0.0] * count).win_rate("judge")
        assert rate.tie == 0.0
        assert rate.win == pytest.approx(differences.count(1.0) / count)
        assert rate.win + rate.lose == pytest.approx(1.0)


def test_gain_and_its_interval() -> None:
    gain, half = compare([1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 0.0]).gain("judge")
    deviation = math.sqrt((4 + 1 + 0 + 9) / 3)
    assert gain == pytest.approx(3.0)
    assert half == pytest.approx(1.96 * deviation / 2)


def test_one_prompt_has_a_gain_without_an_interval(recwarn: pytest.WarningsRecorder) -> None:
    gain, half = compare([3.0], [1.0]).gain("judge")
    assert gain == 2.0
    assert math.isnan(half)
    assert not recwarn.list


def test_the_gain_is_paired() -> None:
    """The same difference on every prompt is certain, however much the prompts differ."""
    gain, half = compare([1.5, 101.5, -98.5], [1.0, 101.0, -99.0]).gain("judge")
    assert (gain, half) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-4))


def test_summary() -> None:
    side = answers(1.0, 3.0, logprobs=[-1.0, -1.0, -2.0, -4.0], ref_logprobs=[-1.5, -1.5, -4.0, -5.0])
    summary = side.summary()
    assert summary["judge_mean"] == 2.0
    assert summary["kl/ref_per_response"] == pytest.approx(2.0)
    assert summary["kl/ref"] == pytest.approx(1.0)
    assert summary["ppl/policy"] == pytest.approx(math.exp(2.0))
    assert summary["ppl/reference"] == pytest.approx(math.exp(3.0))
    assert (summary["response/length_mean"], summary["response/cut_off"]) == (2.0, 0.5)


# From folders and files


@pytest.fixture
def small(small_config: Callable) -> Callable[..., EvalConfig]:
    """An evaluation of short answers."""

    def make(**changes: Any) -> EvalConfig:
        ppo = small_config("ppo")
        return EvalConfig(max_sequence=128, rollout=ppo.rollout, runtime=ppo.runtime, **changes)

    return make


@pytest.fixture
def other_folder(tmp_path: Path, new_policy: Any, tokenizer: Any) -> Path:
    """Another policy with the same tokenizer."""
    from ppomax.engine.checkpoint import save_model

    (tmp_path / "other").mkdir()
    save_model(new_policy(vocab_size=len(tokenizer), seed=7), tokenizer, tmp_path / "other")
    return tmp_path / "other"


def test_a_policy_ties_with_itself(policy_folder: Path, world_files: dict, small: Callable) -> None:
    result = evaluate(policy_folder, policy_folder, world_files["held_out"], {"gold": GOLD}, small(tie_margin=0.0))
    assert result.win_rate("gold") == WinRate(0.0, 1.0, 0.0)
    assert result.gain("gold") == (0.0, 0.0)
    assert [r.response for r in result.policy.rollouts] == [r.response for r in result.baseline.rollouts]
    assert result.policy.summary()["kl/ref"] == 0.0
    assert len({tuple(r.response) for r in result.policy.rollouts}) > 1


def test_two_policies(
    policy_folder: Path, other_folder: Path, reward_folder: Path, world_files: dict, small: Callable
) -> None:
    judges = {"learned": reward_folder, "length": lambda prompts, texts: [float(len(text)) for text in texts]}
    result = evaluate(other_folder, policy_folder, world_files["held_out"], judges, small())
    assert set(result.policy.scores) == {"learned", "length"}
    for side, folder in ((result.policy, other_folder), (result.baseline, policy_folder)):
        assert_scored(side, folder, policy_folder, reward_folder)
    assert result.baseline.summary()["kl/ref"] == 0.0
    assert result.policy.summary()["kl/ref_k3"] > 0.1
    rate = result.win_rate("length")
    assert rate.win + rate.tie + rate.lose == pytest.approx(1.0)


@torch.no_grad()
def assert_scored(side: Answers, folder: Path, baseline: Path, reward: Path) -> None:
    """Log-probs and scores are those that plain transformers gives, one sequence at a time."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, baseline))
    judge = AutoModelForSequenceClassification.from_pretrained(reward)
    start = 0
    for rollout, score in zip(side.rollouts, side.scores["learned"], strict=True):
        tokens = torch.tensor([rollout.tokens])
        end, first = start + len(rollout.response), len(rollout.prompt)
        for model, logprobs in ((policy, side.logprobs), (reference, side.ref_logprobs)):
            rows = model(tokens).logits[0].log_softmax(-1)[first - 1 : -1]
            expected = rows.gather(1, tokens[0, first:, None])[:, 0]
            torch.testing.assert_close(logprobs[start:end], expected, atol=1e-4, rtol=1e-4)
        assert float(judge(tokens).logits) == pytest.approx(float(score), abs=1e-4)
        start = end
    assert start == len(side.logprobs)


def test_the_seed_decides_what_is_drawn(policy_folder: Path, world_files: dict, small: Callable) -> None:
    def responses(seed: int) -> list[list[int]]:
        config = small()
        config = EvalConfig(**{**vars(config), "runtime": type(config.runtime)(device="cpu", seed=seed)})
        result = evaluate(policy_folder, policy_folder, world_files["held_out"], {"gold": GOLD}, config)
        return [rollout.response for rollout in result.policy.rollouts]

    assert responses(0) == responses(0) != responses(1)


def test_the_first_prompts_of_the_held_out_share(policy_folder: Path, world_files: dict, small: Callable) -> None:
    config = small(max_prompts=3, held_out=0.4)
    result = evaluate(policy_folder, policy_folder, world_files["prompts"], {"gold": GOLD}, config)
    _, held_out = split_by_context(read_prompts(world_files["prompts"]), 0.4, 0)
    expected = [dialogue.turns[-1].content for dialogue in held_out[:3]]
    assert [prompt.messages[-1]["content"] for prompt in result.policy.prompts] == expected
    assert len(held_out) > 3


# What is refused


@pytest.mark.parametrize("place", ["policy", "baseline", "judge"])
def test_what_does_not_fit(
    place: str, policy_folder: Path, foreign_folder: Path, narrow_folders: Path, world_files: dict, small: Callable
) -> None:
    narrow = narrow_folders / ("reward" if place == "judge" else "policy")
    for folder, expected in ((foreign_folder, "use different tokenizers"), (narrow, "has token id 299, but the model")):
        given = {"policy": policy_folder, "baseline": policy_folder, "judge": GOLD, place: folder}
        with pytest.raises(InputError, match=f"{folder}.*{expected}"):
            evaluate(given["policy"], given["baseline"], world_files["held_out"], {"judge": given["judge"]}, small())
