"""PPO runs from folders and files: what they do in which order, keep, refuse; stopped and resumed."""

import gzip
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.engine.data import read_prompts, split_by_context
from ppomax.engine.errors import InputError
from ppomax.engine.metrics import RunLog, read_metrics
from ppomax.engine.parallel import Ranks
from ppomax.engine.ppo import PPO
from ppomax.engine.rewards import RunningMoments
from ppomax.engine.templates import Template
from ppomax.engine.trainer import PPOTrainer, Step
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

GOLD = "ppomax.engine.world:gold_rewards"


@pytest.fixture
def new_trainer(
    policy_folder: Path, reward_folder: Path, world_files: dict[str, Path], small_config: Callable
) -> Callable[..., PPOTrainer]:
    """A small run of three iterations without extras; `inputs` are the trainer's, `changes` the configuration's."""
    plain = {"iterations": 3, "critic_pretrain_iterations": 0, "eval_every": 0}

    def make(inputs: dict[str, Any] | None = None, **changes: Any) -> PPOTrainer:
        given = {"policy": policy_folder, "reward": reward_folder, "prompts": world_files["prompts"], **(inputs or {})}
        return PPOTrainer(small_config("ppo", **{**plain, **changes}), **given)

    return make


def records(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


def by_length(prompts: list[list[dict[str, str]]], responses: list[str]) -> list[float]:
    return [len(response) - 0.1 * len(chat[-1]["content"]) for chat, response in zip(prompts, responses, strict=True)]


def untimed(steps: list[Step]) -> list[dict[str, float]]:
    return [{k: v for k, v in step.metrics.items() if not k.startswith("time/")} for step in steps]


# From Python


def test_iterating_trains_and_saving_keeps(new_trainer: Callable, tmp_path: Path, weights_of: Callable) -> None:
    trainer = new_trainer()
    start = {name: weight.clone() for name, weight in trainer.ppo.policy.model.state_dict().items()}
    steps = list(trainer)
    assert [(step.stage, step.number) for step in steps] == [("ppo", 1), ("ppo", 2), ("ppo", 3)]
    assert not any(tmp_path.iterdir())
    trainer.save(tmp_path / "run")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(policy[name], weight) for name, weight in trainer.ppo.policy.model.state_dict().items())
    assert not any(torch.equal(policy[name], weight) for name, weight in start.items())
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "critic")
    assert torch.equal(critic.score.weight, trainer.ppo.critic.model.score.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token == "</s>"
    assert list(trainer) == []


def test_critic_pretraining_comes_first_and_leaves_the_policy(new_trainer: Callable) -> None:
    trainer = new_trainer(critic_pretrain_iterations=2)
    start = {name: weight.clone() for name, weight in trainer.ppo.policy.model.state_dict().items()}
    steps = iter(trainer)
    first = [next(steps), next(steps)]
    assert [(step.stage, step.number) for step in first] == [("critic", 1), ("critic", 2)]
    assert all(step.metrics["kl/ref"] == 0.0 for step in first)
    assert all(torch.equal(weight, start[name]) for name, weight in trainer.ppo.policy.model.state_dict().items())
    assert [(step.stage, step.number) for step in steps] == [("ppo", 1), ("ppo", 2), ("ppo", 3)]


def test_critic_pretraining_ends_when_the_loss_levels_off(new_trainer: Callable) -> None:
    trainer = new_trainer(critic_pretrain_iterations=9, critic_pretrain_tolerance=1.0)
    stages = [step.stage for step in trainer]
    assert stages == ["critic"] * 2 + ["ppo"] * 3


def test_the_same_seed_gives_the_same_run_and_another_another(new_trainer: Callable) -> None:
    runs = [untimed(list(new_trainer(iterations=2, runtime={"seed": seed}))) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_the_first_ratio_of_an_iteration_is_exactly_1(new_trainer: Callable) -> None:
    for step in new_trainer(ppo_epochs=2):
        assert step.metrics["policy/first_logratio_max"] == 0.0
        assert step.metrics["policy/logratio_max"] > 0.0


def test_a_judge_is_measured_and_never_optimised(new_trainer: Callable) -> None:
    without, judged = new_trainer(), new_trainer({"judge": by_length})
    steps = [untimed(list(trainer)) for trainer in (without, judged)]
    for alone, beside in zip(*steps, strict=True):
        assert beside.pop("reward/judge_mean") != beside["reward/score_mean"]
        assert alone == beside


def test_a_function_is_a_reward_and_the_critic_starts_at_zero(new_trainer: Callable) -> None:
    seen: list[tuple[int, int]] = []

    def reward(prompts: list[list[dict[str, str]]], responses: list[str]) -> list[float]:
        seen.append((len(prompts), len(responses)))
        assert all(chat[-1]["role"] == "user" for chat in prompts)
        return by_length(prompts, responses)

    first, second, _ = new_trainer({"reward": reward})
    assert seen == [(8, 8)] * 3
    assert first.metrics["critic/value_mean"] == 0.0
    assert second.metrics["critic/value_mean"] != 0.0


def test_a_function_and_its_name_are_the_same_reward(new_trainer: Callable) -> None:
    from ppomax.engine.world import gold_rewards

    by_name, by_function = (untimed(list(new_trainer({"reward": reward}))) for reward in (GOLD, gold_rewards))
    assert by_name == by_function


def test_the_critic_starts_from_the_reward_model_or_as_told(
    new_trainer: Callable, reward_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    (first, *_), (zero, *_) = (list(new_trainer({"critic": folder})) for folder in (None, policy_folder))
    assert first.metrics["critic/value_mean"] != 0.0
    assert zero.metrics["critic/value_mean"] == 0.0
    critic = new_trainer().ppo.critic.model.score.weight
    assert torch.equal(critic, AutoModelForSequenceClassification.from_pretrained(reward_folder).score.weight)


def test_scores_are_reparameterised_over_the_whole_history(new_trainer: Callable) -> None:
    scores: list[torch.Tensor] = []

    def reward(prompts: Any, responses: list[str]) -> list[float]:
        scores.append(torch.tensor(by_length(prompts, responses), dtype=torch.float64))
        return scores[-1].tolist()

    steps = list(new_trainer({"reward": reward}, reward={"transform": "normalize", "clip": 0.7}))
    for count, step in enumerate(steps, 1):
        history = torch.cat(scores[:count])
        shaped = ((scores[count - 1] - history.mean()) / history.std()).clamp(-0.7, 0.7)
        assert step.metrics["reward/shaped_score_mean"] == pytest.approx(float(shaped.mean()), abs=1e-6)


def test_ptx_trains_on_the_dialogues(new_trainer: Callable, world_files: dict[str, Path]) -> None:
    inputs = {"ptx": world_files["sft"], "reward": lambda prompts, responses: [0.0] * len(responses)}
    settings = {"kl_coef": 0.0, "iterations": 6, "policy_optim": {"lr": 3e-3}}
    steps = list(new_trainer(inputs, ptx_coef=1.0, **settings))
    assert steps[-1].metrics["policy/ptx_loss"] < steps[0].metrics["policy/ptx_loss"] - 0.2
    assert "policy/ptx_loss" not in next(iter(new_trainer(inputs, ptx_coef=0.0, **settings))).metrics


# Evaluation during a run


def test_held_out_prompts_are_answered_now_and_then(new_trainer: Callable, world_files: dict[str, Path]) -> None:
    inputs = {"eval_prompts": world_files["held_out"], "judge": GOLD}
    steps = list(new_trainer(inputs, iterations=5, eval_every=2, policy_optim={"lr": 0.0}))
    assert [step.number for step in steps if "eval/score_mean" in step.metrics] == [2, 4, 5]
    measured = [{k: v for k, v in step.metrics.items() if k.startswith("eval/")} for step in steps[1::2]]
    assert measured[0] == measured[1]  # the same policy, the same seeds
    assert measured[0]["eval/kl/ref"] == 0.0
    assert {"eval/judge_mean", "eval/response/length_mean", "eval/ppl/reference"} <= measured[0].keys()
    training = [untimed(list(new_trainer({}, iterations=5, eval_every=0, policy_optim={"lr": 0.0})))]
    for plain, step in zip(training[0], untimed(steps), strict=True):
        assert plain == {k: step[k] for k in plain}  # being watched changes nothing


def test_processes_with_different_held_out_prompts(
    new_trainer: Callable, world_files: dict[str, Path], two_processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two_processes
    first.check_same("held-out prompts", [[5, 6], [5, 6]])
    monkeypatch.setattr(Ranks, "of", lambda runtime: second)
    with pytest.raises(InputError, match=r"^held-out prompts: the processes have read different ones; all need the"):
        new_trainer({"eval_prompts": world_files["held_out"]})


def test_a_share_of_the_prompts_is_held_out(new_trainer: Callable, world_files: dict[str, Path]) -> None:
    trainer = new_trainer(held_out=0.3, eval_every=2)
    texts = [prompt.messages[-1]["content"] for prompt in trainer.ppo.prompts]
    held_out = [prompt.messages[-1]["content"] for prompt in trainer.eval_prompts]
    expected = split_by_context(read_prompts(world_files["prompts"]), 0.3, 0)
    assert (texts, held_out) == tuple([d.turns[-1].content for d in part] for part in expected)
    assert not set(texts) & set(held_out)


# Run folders


@pytest.mark.parametrize("run_all", [PPOTrainer.train, list], ids=["train", "iterate"])
def test_a_run_folder_is_a_model_folder_with_its_figures(
    new_trainer: Callable, tmp_path: Path, run_all: Callable
) -> None:
    run_all(new_trainer({"out": tmp_path / "run"}, iterations=5, critic_pretrain_iterations=1))
    run = tmp_path / "run"
    assert [(r["stage"], r["step"]) for r in records(run)] == [("critic", 1), *(("ppo", n) for n in range(1, 6))]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000005"]
    checkpoint = run / "checkpoints" / "step-000005"
    for finished, kept in ((run, checkpoint / "policy"), (run / "critic", checkpoint / "critic")):
        name = "model.safetensors"
        assert (finished / name).read_bytes() == (kept / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(run).config.vocab_size == 300
    assert AutoModelForSequenceClassification.from_pretrained(run / "critic").num_labels == 1
    assert AutoModelForCausalLM.from_pretrained(checkpoint / "policy").config.vocab_size == 300


def test_progress_names_its_figures(new_trainer: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    new_trainer({"reward": by_length}, iterations=1).train()
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("ppo 1/1"))
    assert re.search(r"  score mean \S+  kl ref per response \S+  length mean \S+  ppl reference \S+$", line)


def test_checkpoints_come_when_they_are_due(new_trainer: Callable, tmp_path: Path) -> None:
    names = []
    settings = {"iterations": 5, "critic_pretrain_iterations": 1, "runtime": {"save_every": 2, "keep_checkpoints": 2}}
    for step in new_trainer({"out": tmp_path / "run"}, **settings):
        folder = tmp_path / "run" / "checkpoints"
        names.append((step.number, sorted(p.name[-1] for p in folder.iterdir()) if folder.exists() else []))
    assert names == [(1, []), (1, ["0"]), (2, ["0", "2"]), (3, ["0", "2"]), (4, ["2", "4"]), (5, ["4", "5"])]


# Formats


def hh(*texts: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


PROMPTS = [("What is red?",), ("What is blue?", "The sky.", "And green?"), ("Hm?",)]
FORMATS: dict[str, bytes] = {
    "hh": "\n".join(json.dumps({"chosen": hh(*p, "Yes."), "rejected": hh(*p, "No.")}) for p in PROMPTS).encode(),
    "moss prompts": json.dumps(PROMPTS).encode(),
    "moss pairs": json.dumps([{"chosen": [*p, "Yes."], "rejected": [*p, "No."]} for p in PROMPTS]).encode(),
    "messages": "\n".join(json.dumps({"messages": chat(*p)}) for p in PROMPTS).encode(),
    "dialogues": "\n".join(json.dumps({"messages": chat(*p, "Yes.")}) for p in PROMPTS).encode(),
    "prompt": "\n".join(json.dumps({"prompt": chat(*p)}) for p in PROMPTS).encode(),
}
FORMATS["hh, gzip"] = gzip.compress(FORMATS["hh"])
EXTRAS_OFF = {
    "judge": None, "ptx_data": None, "eval_data": None, "ptx_coef": 0, "eval_every": 0, "critic_pretrain_iterations": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_run(
    name: str, tmp_path: Path, ppomax: Callable, arguments: Callable, figures_of: Callable
) -> None:
    runs = []
    for part in (name, "messages"):
        (tmp_path / part).write_bytes(FORMATS[part])
        changes = {**EXTRAS_OFF, "iterations": 1, "data": tmp_path / part}
        runs.append(tmp_path / f"run {part} {len(runs)}")
        assert ppomax(*arguments("ppo", runs[-1], **changes)).code == 0
    assert figures_of(runs[0]) == figures_of(runs[1])


# Resuming


def test_a_run_stopped_and_resumed_equals_one_never_stopped(
    stop_and_resume: Callable, assert_equal_runs: Callable, policy_folder: Path, weights_of: Callable
) -> None:
    """With critic pre-training, ptx, reward moments, a judge and evaluations in play."""
    runs = stop_and_resume("ppo", PPO, "iterate", 4, ppo_epochs=2, preset="ppo-max", rollout__repetition_penalty=1.1)
    assert_equal_runs(runs.whole, runs.resumed)
    last = records(runs.resumed)[-1]
    assert {"policy/ptx_loss", "reward/judge_mean", "eval/judge_mean", "eval/score_mean"} <= last.keys()
    assert [r["stage"] for r in records(runs.resumed)] == ["critic"] * 2 + ["ppo"] * 4
    start, weights = weights_of(policy_folder), weights_of(runs.resumed)
    assert not any(torch.equal(weights[name], start[name]) for name in start)
    assert sum(name.startswith("critic/") for name in weights) > 10


def test_a_run_stopped_after_critic_pretraining(stop_and_resume: Callable, assert_equal_runs: Callable) -> None:
    """It ended before its time, and does not begin anew."""
    runs = stop_and_resume("ppo", PPO, "iterate", 1, critic_pretrain_iterations=9, critic_pretrain_tolerance=1.0)
    assert_equal_runs(runs.whole, runs.resumed)
    assert [r["stage"] for r in records(runs.resumed)] == ["critic"] * 2 + ["ppo"] * 4


@pytest.mark.parametrize("stop_at", [4, 5])
def test_a_run_stopped_while_it_writes_its_log(
    stop_at: int, stop_and_resume: Callable, assert_equal_runs: Callable
) -> None:
    """Two records of critic pre-training, then iterations; the first checkpoint of those belongs to record 4."""
    runs = stop_and_resume("ppo", RunLog, "write", stop_at)
    assert_equal_runs(runs.whole, runs.resumed)


def test_resuming_from_python_with_functions(
    new_trainer: Callable, tmp_path: Path, figures_of: Callable, weights_of: Callable
) -> None:
    def judge(prompts: Any, responses: list[str]) -> list[float]:
        return [float(len(response)) for response in responses]

    settings = {"iterations": 5, "reward": {"transform": "scale"}}
    inputs = {"reward": by_length, "judge": judge}
    new_trainer({**inputs, "out": tmp_path / "whole"}, **settings).train()
    for step in new_trainer({**inputs, "out": tmp_path / "resumed"}, **settings):
        if step.number == 3:
            break
    PPOTrainer.resume(tmp_path / "resumed", reward=by_length, judge=judge).train()
    assert figures_of(tmp_path / "whole") == figures_of(tmp_path / "resumed")
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


class ByLength:
    def __call__(self, prompts: list[list[dict[str, str]]], responses: list[str]) -> list[float]:
        return by_length(prompts, responses)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda prompts, responses: by_length(prompts, responses), r"test_trainer:<lambda>'"),
        (ByLength(), r"test_trainer:<ByLength>'"),
        (partial(by_length), r"functools:<partial>'"),
    ],
    ids=["lambda", "object", "partial"],
)
def test_resuming_needs_the_function_again(new_trainer: Callable, tmp_path: Path, function: Any, name: str) -> None:
    list(new_trainer({"reward": function, "out": tmp_path / "run"}, iterations=1))
    with pytest.raises(InputError, match=rf"reward function '.*{name}.*PPOTrainer\.resume\(folder, reward=\.\.\."):
        PPOTrainer.resume(tmp_path / "run")
    assert list(PPOTrainer.resume(tmp_path / "run", reward=function)) == []


def test_a_run_that_saved_nothing_cannot_be_resumed(new_trainer: Callable, tmp_path: Path) -> None:
    next(iter(new_trainer({"out": tmp_path / "run"})))
    with pytest.raises(InputError, match="holds no checkpoint yet, start it anew with --overwrite"):
        PPOTrainer.resume(tmp_path / "run")


def test_the_moments_of_a_checkpoint_are_those_of_all_scores(new_trainer: Callable, tmp_path: Path) -> None:
    trainer = new_trainer({"out": tmp_path / "run"}, critic_pretrain_iterations=1)
    trainer.train()
    moments = PPOTrainer.resume(tmp_path / "run").ppo.moments
    assert moments.count == 8 * 4
    assert vars(moments) == vars(trainer.ppo.moments) != vars(RunningMoments())


# What is refused before anything is written


def test_what_a_configuration_needs(new_trainer: Callable, tmp_path: Path) -> None:
    for changes, expected in (
        ({"eval_every": 2}, "PPOConfig.eval_every > 0 needs held-out prompts"),
        ({"ptx_coef": 0.1}, "PPOConfig.ptx_coef = 0.1 needs files of dialogues"),
    ):
        with pytest.raises(InputError, match=expected):
            new_trainer({"out": tmp_path / "run"}, **changes)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"config": "ppo-max"}, r"^config: expected a PPOConfig, .*; found str$"),
        ({"policy": torch.nn.Linear(1, 1)}, "^policy: expected the path of a Hugging Face folder; found Linear$"),
        ({"reward": None}, "^reward: expected .*; found NoneType$"),
    ],
    ids=["preset-name", "loaded-policy", "no-reward"],
)
def test_what_a_trainer_is_made_of(small_config: Callable, given: dict[str, Any], match: str) -> None:
    plain = {"config": small_config("ppo"), "policy": "sft", "reward": by_length, "prompts": "prompts.jsonl"}
    with pytest.raises(InputError, match=match):
        PPOTrainer(**{**plain, **given})


def test_nothing_to_evaluate_on(new_trainer: Callable) -> None:
    with pytest.raises(InputError, match=r"nothing to evaluate on: set PPOConfig\.held_out"):
        new_trainer().evaluate()


@pytest.mark.parametrize("place", ["reward", "judge", "critic"])
def test_another_tokenizer(new_trainer: Callable, tmp_path: Path, place: str, foreign_folder: Path) -> None:
    name = "critic" if place == "critic" else "reward model"
    expected = f"the policy and the {name} in {foreign_folder} use different tokenizers"
    with pytest.raises(InputError, match=expected):
        new_trainer({place: foreign_folder, "out": tmp_path / "run"})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("place", "folder"), [("policy", "policy"), ("reward", "reward"), ("critic", "policy")])
def test_too_few_embeddings(
    new_trainer: Callable, tmp_path: Path, place: str, folder: str, narrow_folders: Path
) -> None:
    expected = f"{narrow_folders / folder}: the tokenizer has token id 299, but the model only ids below 280"
    with pytest.raises(InputError, match=expected):
        new_trainer({place: narrow_folders / folder, "out": tmp_path / "run"})
    assert not any(tmp_path.iterdir())


def test_prompts_that_are_too_long(new_trainer: Callable, tmp_path: Path, write_jsonl: Callable) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "short"}, {"prompt": "long " * 100}])
    with pytest.raises(InputError, match=r"data\.jsonl:2: last turn: expected at most 120 tokens, found \d+ that"):
        new_trainer({"prompts": data, "out": tmp_path / "run"})
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_prompts_lose_their_oldest_rounds(
    new_trainer: Callable, tmp_path: Path, write_jsonl: Callable, policy_folder: Path
) -> None:
    turns = chat(*["long question", "long answer"] * 6, "the last one")
    trainer = new_trainer({"prompts": write_jsonl(tmp_path / "data.jsonl", [{"messages": turns}])})
    (prompt,) = trainer.ppo.prompts
    text = Template(AutoTokenizer.from_pretrained(policy_folder)).decode(prompt.tokens)
    assert len(prompt.tokens) <= 120
    assert text.startswith("Human: long question")
    assert text.endswith("Human: the last oneAssistant:")
    assert prompt.messages == turns
