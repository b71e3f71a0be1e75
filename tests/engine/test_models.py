"""Model folders out and in again, heads against transformers' own, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ppomax.engine.batch import PackedBatch, pack
from ppomax.engine.builtin import train_tokenizer
from ppomax.engine.checkpoint import save_model
from ppomax.engine.config import RuntimeConfig
from ppomax.engine.errors import InputError
from ppomax.engine.models import (
    CPU,
    CausalModel,
    Placement,
    check_same_tokenizer,
    check_vocabulary,
    load_critic,
    load_policy,
    load_reward_model,
    load_tokenizer,
    scalar_from_causal,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

FAMILIES = ["llama", "qwen2", "qwen2-window", "qwen3", "mistral", "gemma2"]
families = pytest.mark.parametrize("family", FAMILIES)
EOS, PAD = 1, 0


def answered(lengths: tuple[int, ...] = (9, 4, 13), seed: int = 0) -> list[list[int]]:
    """Sequences that end with EOS."""
    generator = torch.Generator().manual_seed(seed)
    return [[*torch.randint(2, 61, (n - 1,), generator=generator).tolist(), EOS] for n in lengths]


def pack_answers(sequences: list[list[int]], prompt: int = 2) -> PackedBatch:
    """All but the first `prompt` tokens are learned."""
    masks = [[i >= prompt for i in range(len(sequence))] for sequence in sequences]
    return pack(sequences, masks, CPU.device)


def padded(sequences: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, sequences))
    rows = [[*sequence, *[PAD] * (longest - len(sequence))] for sequence in sequences]
    tokens = torch.tensor(rows)
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}


def causal_rows(model: Any, sequences: list[list[int]], prompt: int = 2) -> Tensor:
    """Logits `[N, V]` that predict the learned tokens, from a plain model, sequence by sequence."""
    return torch.cat([model(torch.tensor([s]), use_cache=False).logits[0, prompt - 1 : -1] for s in sequences])


# Folders out and in


@torch.no_grad()
@families
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_policy_is_the_same_model_elsewhere(
    family: str, tied: bool, tmp_path: Path, new_policy: Any, tokenizer: Any
) -> None:
    policy = new_policy(family, tie_word_embeddings=tied)
    save_model(policy, tokenizer, tmp_path)
    sequences = answered()
    batch = pack_answers(sequences)
    ours = policy.logits(policy.hidden(batch)[batch.rows])
    theirs = causal_rows(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"), sequences)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    again = load_policy(tmp_path)
    assert (again.head["weight"] is again.model.get_input_embeddings().weight) == tied
    assert torch.equal(again.logits(again.hidden(batch)[batch.rows]), ours)


def test_a_loaded_model_lies_where_a_new_one_would(policy_folder: Path) -> None:
    """Or a resumed run would differ in the last bit: products depend on how their operands are aligned."""
    policy = load_policy(policy_folder)
    assert {p.data_ptr() % 64 for p in policy.parameters()} == {0}


def test_the_tokenizer_comes_back(policy_folder: Path, tokenizer: Any) -> None:
    again = load_tokenizer(policy_folder)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.eos_token_id == EOS
    assert again.encode("red doors") == tokenizer.encode("red doors")


@torch.no_grad()
@families
def test_a_saved_reward_model_is_the_same_classifier_elsewhere(
    family: str, tmp_path: Path, new_scalar: Any, tokenizer: Any
) -> None:
    scalar, sequences = new_scalar(family), answered()
    ours = scalar.scores(pack_answers(sequences))
    save_model(scalar, tokenizer, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.config.num_labels == 1
    torch.testing.assert_close(ours, model(**padded(sequences)).logits[:, 0], rtol=1e-4, atol=1e-4)
    assert ours.unique().numel() == len(sequences)
    assert torch.equal(load_reward_model(tmp_path).scores(pack_answers(sequences)), ours)
    assert torch.equal(load_critic(tmp_path).scores(pack_answers(sequences)), ours)


@torch.no_grad()
def test_a_reward_model_learns_its_padding_from_the_tokenizer(tmp_path: Path, new_scalar: Any, tokenizer: Any) -> None:
    """Without it transformers cannot score a batch."""
    save_model(new_scalar(pad_token_id=None), tokenizer, tmp_path)
    assert load_reward_model(tmp_path).config.pad_token_id == tokenizer.pad_token_id == PAD


def test_the_dtype_is_the_one_asked_for(policy_folder: Path) -> None:
    policy = load_policy(policy_folder, Placement(torch.device("cpu"), torch.bfloat16))
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert policy.logits(torch.zeros(1, 32, dtype=torch.bfloat16)).dtype == torch.float32
    critic = load_critic(policy_folder, Placement(torch.device("cpu"), torch.bfloat16))
    values, _ = critic.values(pack_answers(answered()))
    assert {p.dtype for p in critic.parameters()} == {torch.bfloat16}
    assert values.dtype == torch.float32


# Heads


@torch.no_grad()
@families
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies(family: str, temperature: float, new_policy: Any, plain: Callable[..., Any]) -> None:
    policy, sequences = new_policy(family, dtype=torch.float64), answered()
    batch = pack_answers(sequences)
    logprobs, entropy = policy.logprobs(batch, temperature)
    logp = torch.log_softmax(causal_rows(plain(policy), sequences) / temperature, -1)
    chosen = logp.gather(1, batch.labels[:, None])[:, 0]
    torch.testing.assert_close(logprobs, chosen, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_head_with_a_bias(plain: Callable[..., Any]) -> None:
    config = transformers.PhiConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    policy = CausalModel(AutoModelForCausalLM.from_config(config, attn_implementation="ppomax"))
    policy.model.lm_head.bias.normal_()
    sequences = answered()
    batch = pack_answers(sequences)
    logp = torch.log_softmax(causal_rows(plain(policy), sequences), -1)
    expected = logp.gather(1, batch.labels[:, None])[:, 0]
    torch.testing.assert_close(policy.logprobs(batch)[0], expected, rtol=0, atol=1e-4)
    sampled = torch.log_softmax(policy.logits(policy.hidden(batch)[batch.rows]), -1)
    torch.testing.assert_close(sampled, logp, rtol=0, atol=1e-4)


@torch.no_grad()
@families
def test_values_stand_before_each_token_and_after_the_last(
    family: str, new_scalar: Any, plain: Callable[..., Any]
) -> None:
    critic, sequences = new_scalar(family, dtype=torch.float64), answered()
    model = plain(critic)
    expected, after = [], []
    for sequence in sequences:
        hidden = model.base_model(torch.tensor([sequence]), use_cache=False).last_hidden_state[0]
        scalars = model.score(hidden)[:, 0]
        expected.append(scalars[1:-1])
        after.append(scalars[-1])
    values, last = critic.values(pack_answers(sequences))
    torch.testing.assert_close(values, torch.cat(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(last, torch.stack(after), rtol=0, atol=1e-6)
    assert torch.equal(last, critic.scores(pack_answers(sequences)))


@families
def test_a_critic_from_a_language_model_starts_at_zero(
    family: str, tmp_path: Path, new_policy: Any, tokenizer: Any
) -> None:
    policy = new_policy(family)
    save_model(policy, tokenizer, tmp_path)
    critic, batch = load_critic(tmp_path), pack_answers(answered())
    values, last = critic.values(batch)
    assert values.abs().max() == last.abs().max() == 0
    assert torch.equal(critic.hidden(batch), policy.hidden(batch))
    (critic.read(critic.hidden(batch), batch.rows) - 1).square().sum().backward()
    assert critic.model.score.weight.grad.abs().max() > 0


def test_a_head_on_a_shared_trunk(new_policy: Any) -> None:
    policy = new_policy()

    def head(seed: int, std: float) -> Tensor:
        scalar = scalar_from_causal(policy, std, torch.Generator().manual_seed(seed))
        assert scalar.model.base_model is policy.model.base_model
        assert scalar.model.score.bias is None
        return scalar.model.score.weight

    assert torch.equal(head(0, 0.5), head(0, 0.5))
    assert not torch.equal(head(0, 0.5), head(1, 0.5))
    torch.testing.assert_close(head(0, 0.5) / 0.5, head(0, 1.0))
    assert head(0, 0.0).abs().max() == 0
    assert policy.config.num_labels == 2, "the policy's own configuration stays as it was"


# What is refused


def edited(folder: Path, copy: Path, **changes: Any) -> Path:
    """A copy of a model folder with other fields in config.json."""
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return copy


def test_folders_that_are_none(tmp_path: Path) -> None:
    for load in (load_policy, load_critic, load_reward_model, load_tokenizer):
        with pytest.raises(InputError, match="no such folder, expected a Hugging Face model folder"):
            load(tmp_path / "nowhere")
        with pytest.raises(InputError, match=r"holds no config\.json"):
            load(tmp_path)
    with pytest.raises(InputError, match=r"; one of the Hub: `hf download org/model-0\.6B --local-dir FOLDER` first$"):
        load_policy("org/model-0.6B")


def test_the_wrong_kind_of_model(policy_folder: Path, reward_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a sequence classifier, expected a causal language model"):
        load_policy(reward_folder)
    with pytest.raises(InputError, match="holds no scalar head"):
        load_reward_model(policy_folder)
    three = edited(reward_folder, tmp_path / "three", id2label={"0": "a", "1": "b", "2": "c"})
    for load in (load_reward_model, load_critic):
        with pytest.raises(InputError, match="a classifier with 3 labels"):
            load(three)


def test_folders_that_are_no_models(tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.toml").touch()
    with pytest.raises(InputError, match=f"a run that has not finished; --resume {tmp_path} goes on with it"):
        load_policy(tmp_path)
    monkeypatch.chdir(policy_folder)  # which "" would stand for
    with pytest.raises(InputError, match=r"^'': no such folder"):
        load_policy("")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"])
def test_missing_weights(name: str, policy_folder: Path, tmp_path: Path) -> None:
    folder = edited(policy_folder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"weights are missing from the files"):
        load_policy(folder)


def test_a_classifier_without_its_head(reward_folder: Path, tmp_path: Path) -> None:
    folder = edited(reward_folder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing from the files, the first is score\.weight"):
        load_reward_model(folder)


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("model.safetensors", "no weights", "model.safetensors: not a whole safetensors file"),
        ("config.json", "{", "config.json: "),
        ("config.json", '{"model_type": "unheard-of"}', "config.json: "),
    ],
    ids=["weights", "json", "model-type"],
)
def test_broken_files(file: str, content: str, match: str, policy_folder: Path, tmp_path: Path) -> None:
    folder = edited(policy_folder, tmp_path / "broken")
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=match) as raised:
        load_policy(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def tiny_config(kind: str, **options: Any) -> Any:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 48, "bos_token_id": None, "eos_token_id": 1}  # fmt: skip
    return transformers.AutoConfig.for_model(kind, **{**sizes, **options})


# Logits scaled in two ways, a state-space model, convolutions, attention sinks, position biases.
@pytest.mark.parametrize(
    "config",
    [
        tiny_config("granite", logits_scaling=4.0),
        tiny_config("cohere"),
        transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4),
        tiny_config("lfm2", layer_types=["conv", "full_attention"]),
        tiny_config("gpt_oss", head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4),
    ],
    ids=["granite", "cohere", "mamba", "lfm2", "gpt-oss", "bloom"],
)
def test_architectures_that_the_engine_would_compute_wrongly(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"not support|does not take packed attention"):
        load_policy(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox", "phi", "olmo2", "gemma3_text"])
def test_other_architectures_that_it_computes_rightly(kind: str, tmp_path: Path) -> None:
    own = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "gemma3_text": {"head_dim": 16, "sliding_window": 5}}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(kind, **own.get(kind, {}))).save_pretrained(tmp_path)
    assert isinstance(load_policy(tmp_path), CausalModel)


def test_classifiers_that_are_no_reward_models(tmp_path: Path) -> None:
    bert = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, num_labels=1
    )
    AutoModelForSequenceClassification.from_config(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="BertForSequenceClassification has no bias-free linear head `score`"):
        load_reward_model(tmp_path / "bert")
    sinks = tiny_config("gpt_oss", head_dim=8, num_local_experts=2, num_experts_per_tok=1, num_labels=1)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(sinks).save_pretrained(tmp_path / "sinks")
    with pytest.raises(InputError, match="does not support"):
        load_critic(tmp_path / "sinks")


# Tokenizers


def test_no_tokenizer(policy_folder: Path, tmp_path: Path) -> None:
    folder = edited(policy_folder, tmp_path / "bare")
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(InputError, match="no tokenizer that transformers can load"):
        load_tokenizer(folder)


def test_token_ids_outside_the_vocabulary(new_policy: Any, tokenizer: Any) -> None:
    check_vocabulary(tokenizer, new_policy(vocab_size=300), "here")
    check_vocabulary(tokenizer, new_policy(vocab_size=320), "here")
    with pytest.raises(InputError, match="here: the tokenizer has token id 299, but the model only ids below 299"):
        check_vocabulary(tokenizer, new_policy(vocab_size=299), "here")


def test_different_tokenizers(tokenizer: Any, texts: list[str]) -> None:
    check_same_tokenizer(tokenizer, train_tokenizer(texts, 300), "policy and reward model")
    smaller = train_tokenizer(texts, 290)
    with pytest.raises(InputError, match=r"policy and x use different tokenizers \(300 and 290 entries, 10 differ"):
        check_same_tokenizer(tokenizer, smaller, "policy and x")
    other_end = train_tokenizer(texts, 300)
    other_end.eos_token = "<pad>"
    with pytest.raises(InputError, match="0 differ, end tokens '</s>' and '<pad>'"):
        check_same_tokenizer(tokenizer, other_end, "policy and x")


# Placement


def test_placement() -> None:
    assert Placement.of(RuntimeConfig(device="cpu")) == CPU
    assert Placement.of(RuntimeConfig(device="cpu", dtype="bfloat16")).dtype == torch.bfloat16
    automatic = Placement.of(RuntimeConfig())
    assert automatic.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (automatic.dtype == torch.bfloat16) == torch.cuda.is_available()
    with pytest.raises(InputError, match=r"RuntimeConfig\.device = 'cuda:77'"):
        Placement.of(RuntimeConfig(device="cuda:77"))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_of_a_bfloat16_model_are_not_rounded(family: str, new_policy: Any) -> None:
    policy = new_policy(family, dtype=torch.bfloat16)
    hidden = 8 * torch.randn(5, policy.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = hidden.double() @ policy.head["weight"].double().t()
    if (cap := policy.head["softcap"]) is not None:
        exact = cap * torch.tanh(exact / cap)
    logits = policy.logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    assert (logits.bfloat16().double() - exact).abs().max() > 1e-2, "rounded logits would show"
