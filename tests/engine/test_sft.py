"""Supervised fine-tuning: the loss, what is learned, what is kept, and runs that were stopped."""

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.engine import sft
from ppomax.engine.data import Dialogue, Turn, read_dialogues, split_by_context
from ppomax.engine.errors import InputError
from ppomax.engine.metrics import read_metrics
from ppomax.engine.models import Placement, load_policy
from ppomax.engine.parallel import Ranks
from ppomax.engine.sft import train_sft
from ppomax.engine.templates import Encoded, Template
from transformers import AutoModelForCausalLM, AutoTokenizer


def mean_nll(folder: Path, dialogues: list[Encoded]) -> float:
    """Nats per learned token, by plain transformers, dialogue by dialogue."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for dialogue in dialogues:
        tokens = torch.tensor(dialogue.tokens)
        with torch.no_grad():
            logprobs = model(tokens[None]).logits[0].log_softmax(-1)
        learned = [t for t, flag in enumerate(dialogue.mask) if flag]
        total -= sum(float(logprobs[t - 1, tokens[t]]) for t in learned)
        count += len(learned)
    return total / count


def records(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


@pytest.fixture
def halves(policy_folder: Path, world_files: dict[str, Path]) -> tuple[list[Encoded], list[Encoded]]:
    """The world's dialogues, (learned, held out) as a small run splits them."""
    template = Template(AutoTokenizer.from_pretrained(policy_folder))
    parts = split_by_context(read_dialogues(world_files["sft"]), 0.1, 0)
    seen, held_out = ([template.encode_dialogue(dialogue, 128) for dialogue in part] for part in parts)
    return seen, held_out


@pytest.mark.parametrize("part", ["dialogues", "held-out dialogues"])
def test_processes_with_different_dialogues(
    part: str, policy_folder: Path, world_files: dict, small_config: Callable, two_processes: Any
) -> None:
    config, tokenizer = small_config("sft"), AutoTokenizer.from_pretrained(policy_folder)
    dialogues = read_dialogues(world_files["sft"])
    seen, held_out = split_by_context(dialogues, config.held_out, config.runtime.seed)
    altered = (seen if part == "dialogues" else held_out)[-1]
    others = [replace(d, turns=(d.turns[0], Turn("assistant", "No."))) if d is altered else d for d in dialogues]

    def read(dialogues: list[Dialogue], ranks: Ranks) -> None:
        policy = load_policy(policy_folder, Placement.of(config.runtime))
        sft._SFT(config, policy, tokenizer, "auto", "raise", dialogues, ranks)

    first, second = two_processes
    read(dialogues, first)
    with pytest.raises(InputError, match=f"^{part}: the processes have read different ones; all need the same files"):
        read(others, second)


# The loss


def test_the_loss_is_the_mean_over_assistant_tokens(
    tmp_path: Path, policy_folder: Path, world_files: dict, small_config: Callable, halves: Any
) -> None:
    seen, held_out = halves
    config = small_config("sft", max_steps=1, batch_size=len(seen), optim={"lr": 0.0})
    train_sft(config, model=policy_folder, data=[world_files["sft"]], out=tmp_path / "run")
    (record,) = records(tmp_path / "run")
    assert record["sft/loss"] == pytest.approx(mean_nll(policy_folder, seen), rel=1e-5)
    expected = mean_nll(policy_folder, held_out)
    assert record["sft/held_out_loss"] == pytest.approx(expected, rel=1e-5)
    assert record["sft/held_out_ppl"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_the_held_out_loss_is_that_of_the_finished_model(
    tmp_path: Path, policy_folder: Path, world_files: dict, small_config: Callable, halves: Any
) -> None:
    train_sft(small_config("sft"), model=policy_folder, data=[world_files["sft"]], out=tmp_path / "run")
    held = [record["sft/held_out_loss"] for record in records(tmp_path / "run") if "sft/held_out_loss" in record]
    assert len(held) == 2
    assert held[1] == pytest.approx(mean_nll(tmp_path / "run", halves[1]), rel=1e-5)
    assert held[1] < held[0] < mean_nll(policy_folder, halves[1])


def test_micro_batches_change_nothing(
    tmp_path: Path, policy_folder: Path, world_files: dict, small_config: Callable, weights_of: Callable
) -> None:
    for tokens in (1, 10**6):
        config = small_config("sft", max_steps=2, micro_batch_tokens=tokens)
        train_sft(config, model=policy_folder, data=[world_files["sft"]], out=tmp_path / str(tokens))
    few, many = (weights_of(tmp_path / name) for name in ("1", str(10**6)))
    start = weights_of(policy_folder)
    assert all(torch.allclose(few[name], many[name], atol=2e-5) for name in few)
    assert max(float((few[name] - start[name]).abs().max()) for name in few) > 1e-3


# What a run keeps


def test_a_run_is_a_model_folder_with_its_figures(
    tmp_path: Path, policy_folder: Path, world_files: dict, small_config: Callable
) -> None:
    config = small_config("sft", held_out=0.0)
    folder = train_sft(config, model=policy_folder, data=[world_files["sft"]], out=tmp_path / "run")
    assert folder == tmp_path / "run"
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 300
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    assert [record["step"] for record in records(folder)] == [1, 2, 3, 4, 5, 6]
    assert not any("sft/held_out_loss" in record for record in records(folder))
    assert {record["sft/lr"] for record in records(folder)} == {3e-3}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000006"]


@pytest.mark.parametrize(("epochs", "max_steps", "steps"), [(1, None, 2), (3, None, 6), (3, 4, 4), (1, 9, 2)])
def test_steps(
    tmp_path: Path,
    policy_folder: Path,
    world_files: dict,
    small_config: Callable,
    epochs: int,
    max_steps: int,
    steps: int,
) -> None:
    config = small_config("sft", epochs=epochs, max_steps=max_steps, batch_size=32, held_out=0.0)
    train_sft(config, model=policy_folder, data=[world_files["sft"]], out=tmp_path / "run")
    assert len(records(tmp_path / "run")) == steps


def test_a_built_in_model_gets_a_tokenizer_of_the_data(
    tmp_path: Path, world_files: dict, small_config: Callable
) -> None:
    config = small_config("sft", max_steps=1, vocab_size=400)
    folder = train_sft(config, model="builtin:tiny", data=[world_files["sft"]], out=tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 400
    text = json.loads(world_files["sft"].read_text().splitlines()[0])["messages"][1]["content"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_unknown_built_in_model(tmp_path: Path, world_files: dict, small_config: Callable) -> None:
    with pytest.raises(
        InputError, match="unknown built-in model 'builtin:huge'; expected one of builtin:tiny, builtin"
    ):
        train_sft(small_config("sft"), model="builtin:huge", data=[world_files["sft"]], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_records_stop_the_run_or_are_skipped(
    tmp_path: Path, policy_folder: Path, small_config: Callable, write_jsonl: Callable
) -> None:
    good = [{"prompt": f"question {n}", "chosen": "yes", "rejected": "no"} for n in range(4)]
    data = write_jsonl(tmp_path / "data.jsonl", [*good, {"prompt": "a question without an answer"}])
    config = small_config("sft", max_steps=1, batch_size=4, held_out=0.0)
    with pytest.raises(InputError, match=r"data\.jsonl:5: turns: expected at least one assistant turn"):
        train_sft(config, model=policy_folder, data=[data], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train_sft(config, model=policy_folder, data=[data], out=tmp_path / "run", on_bad="skip")
    assert len(records(tmp_path / "run")) == 1


# Formats


def hh(*texts: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


TEXTS = [("What is red?", "Blood."), ("What is blue?", "The sky.", "And green?", "Grass."), ("Hm?", "Yes.")]
FORMATS: dict[str, bytes] = {
    "hh": "\n".join(json.dumps({"chosen": hh(*t), "rejected": hh(*t[:-1], "No.")}) for t in TEXTS).encode(),
    "moss dialogues": json.dumps(TEXTS).encode(),
    "moss pairs": json.dumps([{"chosen": t, "rejected": [*t[:-1], "No."]} for t in TEXTS]).encode(),
    "messages": "\n".join(json.dumps({"messages": chat(*t)}) for t in TEXTS).encode(),
    "prompt and answers": "\n".join(
        json.dumps({"prompt": chat(*t[:-1]), "chosen": t[-1], "rejected": "No."}) for t in TEXTS
    ).encode(),
}
FORMATS["hh, gzip"] = gzip.compress(FORMATS["hh"])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_run(
    name: str, tmp_path: Path, policy_folder: Path, ppomax: Callable, arguments: Callable, figures_of: Callable
) -> None:
    (tmp_path / "data").write_bytes(FORMATS[name])
    changes = {"max_steps": 1, "batch_size": 3, "held_out": 0.0, "micro_batch_tokens": 4096, "optim__lr": 0.0}
    assert ppomax(*arguments("sft", tmp_path / "run", data=tmp_path / "data", **changes)).code == 0
    template = Template(AutoTokenizer.from_pretrained(policy_folder))
    (tmp_path / "messages").write_bytes(FORMATS["messages"])
    dialogues = [template.encode_dialogue(d, 128) for d in read_dialogues(tmp_path / "messages")]
    (record,) = records(tmp_path / "run")
    assert record["sft/loss"] == pytest.approx(mean_nll(policy_folder, dialogues), rel=1e-5)


# Resuming


def test_a_run_stopped_and_resumed_equals_one_never_stopped(
    stop_and_resume: Callable, assert_equal_runs: Callable, policy_folder: Path, weights_of: Callable
) -> None:
    """Stopped in step 6 of 6: the work of step 5, which was logged but not saved, is done again."""
    runs = stop_and_resume("sft", sft._SFT, "step", 6)
    assert_equal_runs(runs.whole, runs.resumed)
    start = weights_of(policy_folder)
    assert not any(torch.equal(weight, start[name]) for name, weight in weights_of(runs.resumed).items())


def test_a_finished_run_stays_as_it_is(
    tmp_path: Path, ppomax: Callable, arguments: Callable, weights_of: Callable, figures_of: Callable
) -> None:
    assert ppomax(*arguments("sft", tmp_path / "run")).code == 0
    weights, figures = weights_of(tmp_path / "run"), figures_of(tmp_path / "run")
    assert ppomax("sft", "--resume", tmp_path / "run").code == 0
    assert figures_of(tmp_path / "run") == figures
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(tmp_path / "run").items())
