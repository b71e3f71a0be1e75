"""Answers to prompts: as they finish on the terminal, in the order of the prompts in a file."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ppomax.engine.batch import Rollout
from ppomax.engine.config import GenerateConfig
from ppomax.engine.errors import InputError
from ppomax.engine.generate import generate
from ppomax.engine.rollout import RolloutEngine
from ppomax.engine.templates import Template
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["What is red?", "What is blue?", "Hm?", "Who sings?", "Which door?", "Why seven?", "Slowly?", "A river?"]


@pytest.fixture
def new_config(small_config: Callable) -> Callable[..., GenerateConfig]:
    def make(**rollout: Any) -> GenerateConfig:
        ppo = small_config("ppo", rollout=rollout)
        return GenerateConfig(max_sequence=128, rollout=ppo.rollout, runtime=ppo.runtime)

    return make


@pytest.fixture
def config(new_config: Callable) -> GenerateConfig:
    return new_config(max_response=24, max_running=3)


@pytest.fixture
def long_config(new_config: Callable) -> GenerateConfig:
    """So long answers that some end by themselves."""
    return new_config(max_response=90, max_running=3)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Rollout]]:
    """(index, rollout) as they finish, while something is generated."""
    finished: list[tuple[int, Rollout]] = []
    whole = RolloutEngine.stream

    def record(engine: RolloutEngine, *arguments: Any) -> Iterator[tuple[int, Rollout]]:
        for item in whole(engine, *arguments):
            finished.append(item)
            yield item

    monkeypatch.setattr(RolloutEngine, "stream", record)
    return finished


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_holds_the_answers_in_the_order_of_the_prompts(
    tmp_path: Path, policy_folder: Path, long_config: GenerateConfig, stream: list, capsys: pytest.CaptureFixture
) -> None:
    generate(long_config, model=policy_folder, texts=TEXTS, out=tmp_path / "deep" / "answers.jsonl")
    assert [index for index, _ in stream] != sorted(index for index, _ in stream)
    template = Template(AutoTokenizer.from_pretrained(policy_folder))
    rollouts = dict(stream)
    for index, line in enumerate(lines(tmp_path / "deep" / "answers.jsonl")):
        answer = {"role": "assistant", "content": template.decode(rollouts[index].response)}
        assert line["messages"] == [{"role": "user", "content": TEXTS[index]}, answer]
        assert line["finished"] is rollouts[index].finished
    assert {rollout.finished for rollout in rollouts.values()} == {True, False}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["answers.jsonl"]
    assert capsys.readouterr().out == ""


def test_the_terminal_shows_each_answer_as_it_finishes(
    policy_folder: Path, long_config: GenerateConfig, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, shown = RolloutEngine.stream, []
    template = Template(AutoTokenizer.from_pretrained(policy_folder))

    def watch(engine: RolloutEngine, *arguments: Any) -> Iterator[tuple[int, Rollout]]:
        for index, rollout in whole(engine, *arguments):
            yield index, rollout
            # The next one is asked for: this one stands on the terminal already.
            assert capsys.readouterr().out == f"> {TEXTS[index]}\n{template.decode(rollout.response)}\n\n"
            shown.append(index)

    monkeypatch.setattr(RolloutEngine, "stream", watch)
    generate(long_config, model=policy_folder, texts=TEXTS)
    assert sorted(shown) == list(range(len(TEXTS)))
    assert shown != sorted(shown)


def test_texts_come_before_files_and_dialogues_keep_their_turns(
    tmp_path: Path, policy_folder: Path, config: GenerateConfig, write_jsonl: Callable
) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": turns}, {"prompt": "d"}])
    generate(config, model=policy_folder, texts=["first"], data=[data], out=tmp_path / "answers.jsonl")
    prompts = [line["messages"][:-1] for line in lines(tmp_path / "answers.jsonl")]
    assert prompts == [[{"role": "user", "content": "first"}], turns, [{"role": "user", "content": "d"}]]


def test_greedy_answers_are_those_of_transformers(tmp_path: Path, policy_folder: Path, new_config: Callable) -> None:
    config = new_config(temperature=0.0, max_response=12)
    generate(config, model=policy_folder, texts=TEXTS[:3], out=tmp_path / "answers.jsonl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy_folder), AutoTokenizer.from_pretrained(policy_folder)
    template = Template(tokenizer)
    for text, line in zip(TEXTS, lines(tmp_path / "answers.jsonl"), strict=False):
        prompt = tokenizer("Human:" + f" {text}", add_special_tokens=False, return_tensors="pt").input_ids[0].tolist()
        prompt += [tokenizer.eos_token_id, *tokenizer.encode("Assistant:", add_special_tokens=False)]
        tokens = model.generate(
            model.dummy_inputs["input_ids"].new_tensor([prompt]), max_new_tokens=12, do_sample=False
        )
        assert line["messages"][-1]["content"] == template.decode(tokens[0, len(prompt) :])


def test_the_same_seed_gives_the_same_answers(tmp_path: Path, policy_folder: Path, config: GenerateConfig) -> None:
    for name in ("a", "b"):
        generate(config, model=policy_folder, texts=TEXTS, out=tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_other_prompts_beside_it_do_not_change_an_answer(
    tmp_path: Path, policy_folder: Path, config: GenerateConfig
) -> None:
    for name, texts in (("all", TEXTS), ("some", TEXTS[:3])):
        generate(config, model=policy_folder, texts=texts, out=tmp_path / name)
    assert lines(tmp_path / "all")[:3] == lines(tmp_path / "some")


# What is refused


def test_nothing_to_answer(policy_folder: Path, config: GenerateConfig) -> None:
    with pytest.raises(InputError, match="nothing to answer: give --prompt or --data"):
        generate(config, model=policy_folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "expected a user turn with text"), (" \n", "expected a user turn with text"), ("\udcff", "expected Unicode")],
    ids=["empty", "blank", "surrogate"],
)
def test_a_prompt_without_text(text: str, expected: str, policy_folder: Path, config: GenerateConfig) -> None:
    with pytest.raises(InputError, match=f"^--prompt 2: prompt: {expected}"):
        generate(config, model=policy_folder, texts=["a", text])


def test_a_prompt_that_is_too_long_is_named(tmp_path: Path, policy_folder: Path, config: GenerateConfig) -> None:
    with pytest.raises(InputError, match=r"^--prompt 2: last turn: expected at most 104 tokens, found \d+ that cannot"):
        generate(config, model=policy_folder, texts=["short", "long " * 100], out=tmp_path / "answers.jsonl")
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path: Path, narrow_folders: Path, config: GenerateConfig) -> None:
    with pytest.raises(InputError, match="the tokenizer has token id 299, but the model only ids below 280"):
        generate(config, model=narrow_folders / "policy", texts=TEXTS, out=tmp_path / "answers.jsonl")
    assert not any(tmp_path.iterdir())


def test_an_interrupted_file_is_not_there(
    tmp_path: Path, policy_folder: Path, config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(engine: RolloutEngine, *arguments: Any) -> Iterator[tuple[int, Rollout]]:
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(RolloutEngine, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(config, model=policy_folder, texts=TEXTS, out=tmp_path / "answers.jsonl")
    assert not any(tmp_path.iterdir())
