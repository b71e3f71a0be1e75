"""Reward models: the losses, the batches, what is exported, and runs that were stopped."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.engine import reward_model
from ppomax.engine.data import read_pairs, split_by_context
from ppomax.engine.metrics import read_metrics
from ppomax.engine.reward_model import train_reward_model
from ppomax.engine.templates import Encoded, Template
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

EncodedPair = tuple[Encoded, Encoded]


@pytest.fixture
def train(policy_folder: Path, world_files: dict[str, Path], small_config: Callable, tmp_path: Path) -> Callable:
    """A small run on the world's pairs: its folder."""

    def run(out: str = "run", data: Path | None = None, **changes: Any) -> Path:
        files = [data or world_files["pairs"]]
        return train_reward_model(small_config("rm", **changes), model=policy_folder, data=files, out=tmp_path / out)

    return run


@pytest.fixture
def halves(policy_folder: Path, world_files: dict[str, Path]) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """The world's pairs, (learned, held out) as a small run splits them."""
    template = Template(AutoTokenizer.from_pretrained(policy_folder))
    parts = split_by_context(read_pairs(world_files["pairs"]), 0.1, 0)
    seen, held_out = ([template.encode_pair(pair, 128) for pair in part] for part in parts)
    return seen, held_out


@torch.no_grad()
def margins(folder: Path, pairs: list[EncodedPair]) -> torch.Tensor:
    """r(chosen) - r(rejected) by plain transformers, one sequence at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.num_labels == 1
    scores = [[float(model(torch.tensor([side.tokens])).logits) for side in pair] for pair in pairs]
    return torch.tensor(scores) @ torch.tensor([1.0, -1.0])


@torch.no_grad()
def imitation(folder: Path, pairs: list[EncodedPair]) -> float:
    """Mean over pairs of the mean NLL per token of the chosen response, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    means = []
    for chosen, _ in pairs:
        tokens = torch.tensor(chosen.tokens)
        logprobs = model(tokens[None]).logits[0].log_softmax(-1)
        nll = [-float(logprobs[t - 1, tokens[t]]) for t, flag in enumerate(chosen.mask) if flag]
        means.append(sum(nll) / len(nll))
    return sum(means) / len(means)


def records(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


# The losses


def test_the_losses_are_those_of_the_exported_model(train: Callable, policy_folder: Path, halves: Any) -> None:
    seen, held_out = halves
    run = train(max_steps=1, batch_size=len(seen), optim={"lr": 0.0})
    (record,) = records(run)
    margin, held_margin = margins(run, seen), margins(run, held_out)
    assert float(margin.std()) > 0.1
    assert record["rm/ranking_loss"] == pytest.approx(float(-margin.sigmoid().log().mean()), rel=1e-4)
    assert record["rm/accuracy"] == pytest.approx(float((margin > 0).float().mean()))
    assert record["rm/lm_loss"] == pytest.approx(imitation(policy_folder, seen), rel=1e-5)
    assert record["rm/pairs"] == len(seen)
    assert record["rm/held_out_ranking_loss"] == pytest.approx(float(-held_margin.sigmoid().log().mean()), rel=1e-4)
    assert record["rm/held_out_accuracy"] == pytest.approx(float((held_margin > 0).float().mean()))


def test_the_baseline_that_prefers_the_shorter(train: Callable, halves: Any) -> None:
    (record,) = records(train(max_steps=1, optim={"lr": 0.0}))
    shares = [1.0, 0.5, 0.0]
    differences = [len(chosen.tokens) - len(rejected.tokens) for chosen, rejected in halves[1]]
    expected = sum(shares[(d > 0) - (d < 0) + 1] for d in differences) / len(differences)
    assert record["rm/held_out_shorter_wins"] == pytest.approx(expected)


def test_the_head_starts_small_and_from_the_seed(train: Callable, weights_of: Callable) -> None:
    runs = {
        name: train(name, max_steps=1, optim={"lr": 0.0}, runtime={"seed": seed}) for name, seed in (("a", 0), ("b", 1))
    }
    heads = {name: weights_of(run)["model.safetensors:score.weight"] for name, run in runs.items()}
    assert heads["a"].shape == (1, 32)
    assert float(heads["a"].std()) == pytest.approx(33**-0.5, rel=0.4)
    assert not torch.equal(heads["a"], heads["b"])


def test_it_learns(train: Callable, tmp_path: Path, write_jsonl: Callable, halves: Any) -> None:
    rows = [{"prompt": f"question {n}", "chosen": f"{n} yes", "rejected": f"{n} no"} for n in range(60)]
    run = train(data=write_jsonl(tmp_path / "data.jsonl", rows), max_steps=20, eval_every=20, batch_size=16)
    first, last = records(run)[0], records(run)[-1]
    assert last["rm/ranking_loss"] < 0.2 < 0.5 < first["rm/ranking_loss"]
    assert last["rm/held_out_accuracy"] == 1.0
    assert last["rm/lm_loss"] < first["rm/lm_loss"]


def test_without_imitation_the_lm_head_is_not_trained(
    train: Callable, policy_folder: Path, weights_of: Callable
) -> None:
    changed = {}
    for coef in (0.0, 1.0):
        run = train(str(coef), max_steps=2, imitation_coef=coef)
        old, new = weights_of(policy_folder), weights_of(run / "checkpoints" / "step-000002" / "language_model")
        changed[coef] = {name.split(":")[1] for name in old if not torch.equal(old[name], new[name])}
    assert "lm_head.weight" not in changed[0.0]
    assert changed[1.0] == changed[0.0] | {"lm_head.weight"}
    assert "model.layers.0.mlp.up_proj.weight" in changed[0.0]


def test_micro_batches_change_nothing(train: Callable, weights_of: Callable) -> None:
    few, many = (weights_of(train(str(n), max_steps=2, micro_batch_tokens=n)) for n in (1, 10**6))
    assert all(torch.allclose(few[name], many[name], atol=2e-5) for name in few)


# Batches by tokens


@pytest.mark.parametrize(("tokens", "pairs"), [(1, {4}), (10**7, {128})])
def test_dynamic_batches_hold_4_to_128_pairs(train: Callable, tokens: int, pairs: set[int]) -> None:
    run = train(max_steps=1, batch_size="none", batch_tokens=tokens, micro_batch_tokens=10**5)
    assert {record["rm/pairs"] for record in records(run)} == pairs


def test_dynamic_batches_are_as_large_as_reach_the_tokens(train: Callable, halves: Any) -> None:
    lengths = [len(chosen.tokens) + len(rejected.tokens) for chosen, rejected in halves[0]]
    run = train(max_steps=6, batch_size="none", batch_tokens=1500)
    pairs = [record["rm/pairs"] for record in records(run)]
    assert len(set(pairs)) > 1
    assert math.ceil(1500 / max(lengths)) <= min(pairs) <= max(pairs) <= math.ceil(1500 / min(lengths))


# What a run keeps


def test_a_run_is_a_classifier_folder(train: Callable, halves: Any) -> None:
    run = train()
    config = AutoModelForSequenceClassification.from_pretrained(run).config
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert (config.num_labels, config.pad_token_id) == (1, tokenizer.pad_token_id)
    held_out = [record["rm/held_out_accuracy"] for record in records(run) if "rm/held_out_accuracy" in record]
    assert len(held_out) == 2
    assert held_out[-1] == pytest.approx(float((margins(run, halves[1]) > 0).float().mean()))


def test_a_padded_batch_of_another_tool_scores_the_same(train: Callable, halves: Any) -> None:
    """Other tools find a response's end by its padding."""
    run = train()
    model, (chosen, rejected) = AutoModelForSequenceClassification.from_pretrained(run), halves[1][0]
    lengths = [len(chosen.tokens), len(rejected.tokens)]
    padded = torch.zeros(2, max(lengths) + 3, dtype=torch.long)
    for row, side in enumerate((chosen, rejected)):
        padded[row, : lengths[row]] = torch.tensor(side.tokens)
    with torch.no_grad():
        scores = model(padded, attention_mask=(torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None])).logits
    assert float(scores[0] - scores[1]) == pytest.approx(float(margins(run, halves[1][:1])), abs=1e-4)


# Formats


def hh(*texts: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


TEXTS = [
    (("What is red?",), "Blood.", "Snow."),
    (("What is blue?", "The sky.", "And green?"), "Grass.", "I am not going to say."),
    (("Hm?",), "Yes.", "No."),
]
FORMATS: dict[str, bytes] = {
    "hh": "\n".join(json.dumps({"chosen": hh(*p, a), "rejected": hh(*p, b)}) for p, a, b in TEXTS).encode(),
    "moss": json.dumps([{"chosen": [*p, a], "rejected": [*p, b]} for p, a, b in TEXTS]).encode(),
    "prompt and answers": "\n".join(
        json.dumps({"prompt": chat(*p), "chosen": a, "rejected": b}) for p, a, b in TEXTS
    ).encode(),
    "whole dialogues": "\n".join(
        json.dumps({"chosen": chat(*p, a), "rejected": chat(*p, b)}) for p, a, b in TEXTS
    ).encode(),
}
FORMATS["hh, gzip"] = gzip.compress(FORMATS["hh"])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_run(
    name: str, tmp_path: Path, policy_folder: Path, ppomax: Callable, arguments: Callable
) -> None:
    (tmp_path / "data").write_bytes(FORMATS[name])
    changes = {"max_steps": 1, "batch_size": 3, "held_out": 0.0, "optim__lr": 0.0}
    assert ppomax(*arguments("rm", tmp_path / "run", data=tmp_path / "data", **changes)).code == 0
    (tmp_path / "hh").write_bytes(FORMATS["hh"])
    template = Template(AutoTokenizer.from_pretrained(policy_folder))
    pairs = [template.encode_pair(pair, 128) for pair in read_pairs(tmp_path / "hh")]
    (record,) = records(tmp_path / "run")
    assert record["rm/lm_loss"] == pytest.approx(imitation(policy_folder, pairs), rel=1e-5)
    expected = float(-margins(tmp_path / "run", pairs).sigmoid().log().mean())
    assert record["rm/ranking_loss"] == pytest.approx(expected, rel=1e-4)


# Resuming


@pytest.mark.parametrize("batches", [{}, {"batch_size": "None", "batch_tokens": 600}], ids=["fixed", "dynamic"])
def test_a_run_stopped_and_resumed_equals_one_never_stopped(
    batches: dict[str, Any], stop_and_resume: Callable, assert_equal_runs: Callable
) -> None:
    """Stopped in step 6 of 6: the work of step 5, which was logged but not saved, is done again."""
    runs = stop_and_resume("rm", reward_model._RewardModel, "step", 6, **batches)
    assert_equal_runs(runs.whole, runs.resumed)
