"""Weights from files into models and back: which bytes arrive where, what is read when, what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ppomax.engine import models, sft, stored
from ppomax.engine.batch import pack
from ppomax.engine.builtin import new_model as new_builtin
from ppomax.engine.checkpoint import save_model
from ppomax.engine.config import PPOConfig
from ppomax.engine.errors import InputError
from ppomax.engine.models import (
    CPU,
    CausalModel,
    Placement,
    ScalarModel,
    load_policy,
    load_reward_model,
    scalar_from_causal,
    trainable_copy,
)
from ppomax.engine.parallel import Ranks
from ppomax.engine.stored import StoredWeights
from ppomax.engine.trainer import PPOTrainer
from ppomax.engine.weights import (
    cast,
    copy_of,
    load_pretrained,
    save_weights,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

HALF = Placement(torch.device("cpu"), torch.bfloat16)
INDEX = "model.safetensors.index.json"
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture
def sharded(tmp_path: Path, new_model: Callable[..., Any]) -> Path:
    """The folder of a tiny model in several files."""
    save_weights(new_model(), tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def assert_same(model: Any, weights: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), name


# In


@tied_or_not
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_model_in_several_files(family: str, tied: bool, tmp_path: Path, new_model: Callable[..., Any]) -> None:
    model = new_model(family, tie_word_embeddings=tied)
    model.generation_config.update(do_sample=True, temperature=0.5)
    save_weights(model, tmp_path, max_shard_size="20KB")
    assert len(shards(tmp_path)) > 2
    ours = load_policy(tmp_path).model
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(ours, model.state_dict())
    assert_same(theirs, model.state_dict())
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.config.name_or_path == str(tmp_path)


def test_settings_of_generation_in_an_older_folder(sharded: Path) -> None:
    config = sharded / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_length": 77}))
    (sharded / "generation_config.json").unlink()
    ours, theirs = (
        m.generation_config for m in (load_policy(sharded).model, LlamaForCausalLM.from_pretrained(sharded))
    )
    assert ours.to_dict() == theirs.to_dict()
    assert ours.max_length == 77


def test_a_trunk_under_another_name(tmp_path: Path, new_model: Callable[..., Any]) -> None:
    """As transformers does it, with and without the prefix of the trunk in the files."""
    model = new_model(tie_word_embeddings=True)
    save_weights(model.base_model, tmp_path)
    assert "layers.0.mlp.up_proj.weight" in StoredWeights(tmp_path).entries
    assert_same(load_pretrained(AutoModelForCausalLM, tmp_path, CPU.device, CPU.dtype), model.state_dict())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rotary_frequencies_keep_their_precision(family: str, tmp_path: Path, new_model: Callable[..., Any]) -> None:
    new = new_model(family)
    save_weights(new, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = load_pretrained(AutoModelForCausalLM, tmp_path, CPU.device, torch.bfloat16)
    for model in (loaded, copy_of(loaded)):
        assert_same_buffers(model, dict(plain.named_buffers()))
    half = cast(new_model(family), CPU.device, torch.bfloat16)
    assert_same_buffers(half, dict(new.named_buffers()))
    assert torch.equal(loaded.model.rotary_emb.inv_freq, new.model.rotary_emb.inv_freq)
    for model in (loaded, half):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def assert_same_buffers(model: Any, expected: dict[str, Tensor]) -> None:
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        assert found[name].dtype == buffer.dtype == (torch.float32 if "inv_freq" in name else buffer.dtype), name
        assert torch.equal(found[name], buffer), name


@torch.no_grad()
def test_a_builtin_model_in_half_precision_comes_back_as_it_was(tmp_path: Path, tokenizer: Any) -> None:
    """Or a run on it would go on differently when it is resumed."""
    new = new_builtin("builtin:tiny", tokenizer, HALF, seed=0)
    save_model(new, tokenizer, tmp_path)
    again = load_policy(tmp_path, HALF)
    assert_same(again.model, new.model.state_dict())
    assert_same_buffers(again.model, dict(new.model.named_buffers()))
    tokens = torch.arange(90)
    hidden = (model.trunk(tokens, tokens, model.packed([90])) for model in (new, again))
    assert torch.equal(*hidden)


def test_a_run_in_half_precision_goes_on_bit_for_bit(stop_and_resume: Callable, assert_equal_runs: Callable) -> None:
    changes = {"model": "builtin:tiny", "runtime__dtype": "bfloat16", "max_steps": 4, "vocab_size": 300}
    runs = stop_and_resume("sft", sft._SFT, "step", 4, **changes)
    assert_equal_runs(runs.whole, runs.resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [None, {"norm"}], ids=["all", "all-but-norms"])
def test_no_weight_lies_in_a_file(
    kept: set[str] | None, dtype: torch.dtype, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would stay mapped, whole; some models keep some weights in float32."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", kept)
    model = load_pretrained(AutoModelForCausalLM, sharded, CPU.device, dtype)
    assert model.model.norm.weight.dtype == (torch.float32 if kept else dtype)
    for name, weight in model.state_dict().items():
        assert weight.untyped_storage().nbytes() == weight.nbytes, name
        assert weight.data_ptr() % 64 == 0, name


def test_files_are_read_one_at_a_time(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()
    safe_open = stored.safe_open

    def counted(file: str, **options: Any) -> Any:
        opened[Path(file).name] += 1
        return safe_open(file, **options)

    monkeypatch.setattr(stored, "safe_open", counted)
    folder = StoredWeights(sharded)
    assert set(opened.values()) == {1}  # the headers
    for name in folder.entries:
        folder.read(name)
    assert set(opened.values()) == {2}
    assert len(opened) == len(shards(sharded)) > 3


# Out


@tied_or_not
def test_a_sharded_model_is_saved_whole(
    tied: bool, tmp_path: Path, new_policy: Callable[..., CausalModel], tokenizer: Any
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy, expected = (new_policy(tie_word_embeddings=tied) for _ in range(2))
        fully_shard(policy.model, mesh=init_device_mesh("cpu", (1,)))
        save_model(policy, tokenizer, tmp_path, max_shard_size="20KB")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        save_model(policy, tokenizer, tmp_path, max_shard_size="20KB", write=False)
    finally:
        dist.destroy_process_group()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_model(expected, tokenizer, tmp_path / "plain", max_shard_size="20KB")
    assert sorted(before) == sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), expected.model.state_dict())
    assert json.loads(before["config.json"]) == json.loads((tmp_path / "plain" / "config.json").read_text())
    assert StoredWeights(tmp_path).entries.keys() == StoredWeights(tmp_path / "plain").entries.keys()


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """One process whose frozen models wait in host memory."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, init_device_mesh("cpu", (1,)), offloads=True)
    dist.destroy_process_group()


@tied_or_not
def test_a_trained_model_beside_a_frozen_one_that_is_not_read_yet(
    tied: bool, alone: Ranks, tmp_path: Path, new_model: Callable[..., Any]
) -> None:
    save_weights(new_model(tie_word_embeddings=tied), tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    waiting, trained = alone.placement(HALF, frozen=True), alone.placement(HALF)
    assert (waiting.deferred, trained.deferred) == (True, False)
    frozen = load_policy(tmp_path, waiting)
    policy = trainable_copy(frozen, trained)
    assert_same(policy.model, load_policy(tmp_path, HALF).model.state_dict())
    assert (policy.model.lm_head.weight is policy.model.model.embed_tokens.weight) == tied
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    assert all(parameter.requires_grad for parameter in policy.parameters())
    alone.shard(frozen.requires_grad_(False), frozen=True)
    for name, parameter in frozen.model.named_parameters():
        assert torch.equal(parameter.to_local(), before[name].bfloat16()), name


def test_a_configuration_of_fewer_layers_than_the_files_have(sharded: Path) -> None:
    config = sharded / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"the files hold model.layers.1.\S+, but config.json has no such layer"):
        load_policy(sharded)


def test_two_models_of_the_same_files_part_when_they_arrive(alone: Ranks, sharded: Path) -> None:
    one = load_policy(sharded, alone.placement(CPU, frozen=True))
    other = trainable_copy(one, one.placement)
    stored = {p.data_ptr() for p in one.parameters()}
    assert stored == {p.data_ptr() for p in other.parameters()}
    for model in (one, other):
        alone.shard(model, frozen=True)
    addresses = [p.to_local().data_ptr() for model in (one, other) for p in model.parameters()]
    assert len({*addresses, *stored}) == len(addresses) + len(stored)


@torch.no_grad()
def test_an_offloaded_model_is_brought_in_once_for_many_passes(alone: Ranks, sharded: Path) -> None:
    plain, model = load_policy(sharded), load_policy(sharded, alone.placement(CPU, frozen=True))
    alone.shard(model.requires_grad_(False), frozen=True)
    batches = [pack([list(range(n, n + 9))], [[False] + [True] * 8], CPU.device) for n in (3, 20)]
    assert all(isinstance(p, DTensor) for p in model.parameters())
    addresses = []
    with alone.at_hand(model):
        for batch in batches:
            assert torch.equal(model.logprobs(batch)[0], plain.logprobs(batch)[0])
            assert not any(isinstance(p, DTensor) for p in model.parameters())
            addresses.append([p.data_ptr() for p in model.parameters()])
    assert addresses[0] == addresses[1]
    assert all(isinstance(p, DTensor) for p in model.parameters())


@torch.no_grad()
def test_the_layers_of_a_gathered_model_are_plain_modules(alone: Ranks, sharded: Path) -> None:
    """So that they can be captured in a graph."""
    plain, model = load_policy(sharded), load_policy(sharded, alone.placement(CPU, frozen=True))
    alone.shard(model, frozen=True)
    batch = pack([list(range(9))], [[False] + [True] * 8], CPU.device)
    parts: list[Any] = [part for part in model.modules() if isinstance(part, FSDPModule)]
    before = [(list(part._forward_pre_hooks), list(part._forward_hooks)) for part in parts]
    assert all(hooks for pair in before for hooks in pair)
    with alone.gathered(model):
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in parts)
        assert torch.equal(model.hidden(batch), plain.hidden(batch))
    assert [(list(part._forward_pre_hooks), list(part._forward_hooks)) for part in parts] == before
    assert torch.equal(model.logprobs(batch)[0], plain.logprobs(batch)[0])


def test_buffers_do_not_stay_in_their_files(alone: Ranks, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "glm4_moe", vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, head_dim=8,
        first_k_dense_replace=1,
    )  # fmt: skip
    save_weights(AutoModelForCausalLM.from_config(config), tmp_path)
    model = load_policy(tmp_path, alone.placement(CPU, frozen=True))
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in StoredWeights(tmp_path).entries
    stored = {name: (buffer.data_ptr(), buffer.clone()) for name, buffer in model.named_buffers()}
    alone.shard(model.requires_grad_(False), frozen=True)
    for name, buffer in model.named_buffers():
        address, before = stored[name]
        assert buffer.data_ptr() != address, name
        assert torch.equal(buffer, before), name


def test_a_new_head_is_not_rounded_as_the_files_are(
    alone: Ranks, tmp_path: Path, new_model: Callable[..., Any]
) -> None:
    save_weights(new_model(dtype=torch.bfloat16), tmp_path)
    plain, waiting = (load_policy(tmp_path, place) for place in (CPU, alone.placement(CPU, frozen=True)))
    ours, expected = (scalar_from_causal(each, 0.3, torch.Generator().manual_seed(0)) for each in (waiting, plain))
    alone.shard(ours, frozen=True)
    head: Any = ours.model.score.weight
    assert torch.equal(head.to_local(), expected.model.score.weight)


def test_an_architecture_that_does_not_fit_is_refused_when_it_arrives(alone: Ranks, tmp_path: Path) -> None:
    config = AutoConfig.for_model("granite", logits_scaling=4.0, vocab_size=61, hidden_size=32, num_hidden_layers=1,
                                  num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_policy(tmp_path, alone.placement(CPU, frozen=True))
    with pytest.raises(InputError, match="differ from the model's own"):
        alone.shard(model, frozen=True)


def test_weights_of_two_precisions_cannot_be_shared(alone: Ranks, new_policy: Callable[..., CausalModel]) -> None:
    policy = new_policy()
    policy.model.model.norm.double()
    with pytest.raises(InputError, match=r"model.model.norm.weight is in torch.float64, .* in torch.float32: expected"):
        alone.shard(policy, frozen=True)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_a_model_keeps_in_float32_are_not_rounded(
    stored: torch.dtype, alone: Ranks, tmp_path: Path, new_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither are they shared, whatever the files hold."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"norm"})
    save_weights(cast(new_model(), CPU.device, stored), tmp_path)
    with pytest.raises(InputError, match=r"norm.weight is in torch.float32, .* in torch.bfloat16: expected one prec"):
        load_policy(tmp_path, alone.placement(HALF, frozen=True))


def test_stored_tensors_of_several_precisions_are_read_in_the_one_asked_for(
    alone: Ranks, tmp_path: Path, new_model: Callable[..., Any]
) -> None:
    """Through none of less bits."""
    model = new_model()
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.model.layers.bfloat16()
    save_weights(model, tmp_path)
    assert StoredWeights(tmp_path).dtype is None
    loaded = load_policy(tmp_path, alone.placement(CPU, frozen=True))
    for name, weight in loaded.model.state_dict().items():
        stored = expected[name].bfloat16() if ".layers." in name else expected[name]
        assert torch.equal(weight, stored.float()), name


def test_experts_of_a_sharded_model_are_saved_one_by_one(alone: Ranks, tmp_path: Path) -> None:
    """As their files have them, whatever transformers makes of them in memory."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    save_weights(model, tmp_path / "plain", max_shard_size="20KB")
    fully_shard(model, mesh=alone.mesh)
    save_weights(model, tmp_path / "sharded", max_shard_size="20KB")
    plain, ours = (StoredWeights(tmp_path / name) for name in ("plain", "sharded"))
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in ours.entries
    assert ours.entries.keys() == plain.entries.keys()
    for name in plain.entries:
        assert torch.equal(ours.read(name), plain.read(name)), name


def test_the_weights_of_another_model_do_not_stay(tmp_path: Path, new_policy: Any, tokenizer: Any) -> None:
    """Readers take one file where there is one, however many others an index names."""
    for seed, size in enumerate(["5GB", "20KB", "50KB", "5GB"]):
        policy = new_policy(seed=seed, vocab_size=300)
        save_model(policy, tokenizer, tmp_path, max_shard_size=size)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), policy.model.state_dict())
        assert_same(load_policy(tmp_path).model, policy.model.state_dict())
        assert (tmp_path / INDEX).exists() == (size != "5GB")
        files = {path.name for path in shards(tmp_path)}
        named = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values()) if size != "5GB" else None
        assert files == (named or {"model.safetensors"})
        assert all(path.stat().st_size < 80_000 for path in shards(tmp_path)) == (size != "5GB")


# Memory


def memory(name: str) -> int:
    """A figure of this process in bytes: VmRSS, or its peak VmHWM since the last `forget_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's figures of a process")
def test_host_memory_stays_within_a_few_files(tmp_path: Path) -> None:
    """160 MB in 17 files, read into 80 MB: without the bound all files are mapped at once."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=1408
    )
    model, room = LlamaForCausalLM(config), 50e6
    forget_peak()
    before = memory("VmRSS")
    save_weights(model, tmp_path, max_shard_size="10MB")
    assert memory("VmHWM") < before + room
    size, files = sum(path.stat().st_size for path in shards(tmp_path)), len(shards(tmp_path))
    assert size > 150e6
    assert files > 15
    forget_peak()
    before = memory("VmRSS")
    load_pretrained(AutoModelForCausalLM, tmp_path, CPU.device, torch.bfloat16)
    assert memory("VmHWM") < before + size / 2 + room


# Four models from two folders


@pytest.fixture
def new_trainer(
    policy_folder: Path, world_files: dict[str, Path], small_config: Callable[..., PPOConfig]
) -> Callable[..., PPOTrainer]:
    """A small run from Python; the arguments are the trainer's."""

    def make(**inputs: Any) -> PPOTrainer:
        config = small_config("ppo", critic_pretrain_iterations=0, eval_every=0, ptx_coef=0.0, iterations=1)
        return PPOTrainer(config, policy_folder, prompts=world_files["prompts"], **inputs)

    return make


@pytest.fixture
def read_folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by each folder whose weights are read."""
    folders: list[Path] = []
    load = models.load_pretrained
    monkeypatch.setattr(
        models,
        "load_pretrained",
        lambda auto, folder, *a, **k: folders.append(Path(folder)) or load(auto, folder, *a, **k),
    )
    return folders


def addresses(model: Any) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


def test_no_folder_is_read_twice(
    new_trainer: Callable[..., PPOTrainer], policy_folder: Path, reward_folder: Path, read_folders: list[Path]
) -> None:
    beside = reward_folder / ".." / reward_folder.name
    trainer = new_trainer(reward=reward_folder, judge=str(beside), critic=beside)
    assert read_folders == [policy_folder, reward_folder]
    ppo = trainer.ppo
    reward = trainer.judges["score"]
    assert reward is trainer.judges["judge"]
    for trained, frozen in ((ppo.policy, ppo.reference), (ppo.critic, reward.model)):
        assert_same(trained, frozen.state_dict())
        assert not addresses(trained) & addresses(frozen)
        assert {address % 64 for address in addresses(trained)} == {0}
        assert all(parameter.requires_grad for parameter in trained.parameters())
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    before = {name: weight.clone() for name, weight in ppo.reference.state_dict().items()}
    judged = {name: weight.clone() for name, weight in reward.model.state_dict().items()}
    list(trainer)
    assert_same(ppo.reference, before)
    assert_same(reward.model, judged)
    assert not torch.equal(ppo.policy.model.model.embed_tokens.weight, before["model.model.embed_tokens.weight"])
    assert not torch.equal(ppo.critic.model.score.weight, judged["model.score.weight"])


def test_a_critic_on_a_copy_of_the_references_trunk(
    new_trainer: Callable[..., PPOTrainer], policy_folder: Path, read_folders: list[Path]
) -> None:
    trainer = new_trainer(reward=lambda prompts, responses: [float(len(response)) for response in responses])
    assert read_folders == [policy_folder]
    critic, reference = trainer.ppo.critic, trainer.ppo.reference
    assert isinstance(critic, ScalarModel)
    assert critic.model.score.weight.abs().max() == 0
    assert_same(critic.model.base_model, reference.model.base_model.state_dict())
    assert not addresses(critic) & addresses(reference)
    assert not addresses(critic) & addresses(trainer.ppo.policy)
    assert all(parameter.requires_grad for parameter in critic.parameters())


def test_a_resumed_run_reads_its_checkpoint_and_the_frozen_models(
    new_trainer: Callable[..., PPOTrainer],
    policy_folder: Path,
    reward_folder: Path,
    read_folders: list[Path],
    tmp_path: Path,
) -> None:
    trainer = new_trainer(reward=reward_folder, judge=reward_folder, out=tmp_path / "run")
    list(trainer)
    read_folders.clear()
    again = PPOTrainer.resume(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    assert Counter(read_folders) == Counter(
        [policy_folder, reward_folder, checkpoint / "policy", checkpoint / "critic"]
    )
    assert_same(again.ppo.policy, trainer.ppo.policy.state_dict())
    assert_same(again.ppo.critic, trainer.ppo.critic.state_dict())
    assert_same(again.ppo.reference, trainer.ppo.reference.state_dict())


# What is refused


def name_another_file(folder: Path) -> str:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shards(folder)[0].name
    (folder / INDEX).write_text(json.dumps(index))
    return (
        r"model-00001-of-\d+\.safetensors: model\.norm\.weight is not in it, but model\.safetensors\.index\.json says"
    )


def cut(folder: Path) -> str:
    file = shards(folder)[1]
    file.write_bytes(file.read_bytes()[:-100])
    return rf"{file}: not a whole safetensors file \("


def remove_a_file(folder: Path) -> str:
    file = shards(folder)[1]
    name = min(load_file(file))
    file.unlink()
    return rf"{file}: no such file, but model\.safetensors\.index\.json says that it holds {name}$"


def break_the_index(folder: Path) -> str:
    (folder / INDEX).write_text('{"weight_map": []}')
    return rf"{folder}/{INDEX}: not an index of safetensors \("


def point_nowhere(folder: Path) -> str:
    (folder / INDEX).write_text('{"weight_map": {"a": 3}}')
    return r"weight_map.a = 3: expected the name of a file$"


def reshape(folder: Path) -> str:
    name, file = (
        "model.layers.1.mlp.up_proj.weight",
        StoredWeights(folder).entries["model.layers.1.mlp.up_proj.weight"].file,
    )
    tensors = load_file(file)
    tensors[name] = tensors[name][:40].contiguous()
    save_file(tensors, file, {"format": "pt"})
    return rf"{file}: {name} has the shape \[40, 32\], expected \[48, 32\]"


def empty_the_folder(folder: Path) -> str:
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    return rf"{folder}: holds neither model\.safetensors nor model\.safetensors\.index\.json"


def leave_one_out(folder: Path) -> str:
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"].pop("model.norm.weight")
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))
    return rf"{folder}: 1 weights are missing from the files, the first is model\.norm\.weight"


BROKEN = [
    name_another_file, cut, remove_a_file, break_the_index, point_nowhere, reshape, empty_the_folder, leave_one_out,
]  # fmt: skip


@pytest.mark.parametrize("breaking", BROKEN, ids=lambda function: function.__name__)
def test_broken_folders(breaking: Callable[[Path], str], sharded: Path) -> None:
    match = breaking(sharded)
    with pytest.raises(InputError, match=match) as raised:
        load_policy(sharded)
    assert "\n" not in str(raised.value)


def test_a_file_that_vanishes_while_it_is_read(sharded: Path) -> None:
    folder = StoredWeights(sharded)
    shutil.rmtree(sharded)
    with pytest.raises(InputError, match=r"model\.norm\.weight cannot be read \("):
        folder.read("model.norm.weight")


def test_a_reading_error_is_not_lost_on_the_way_through_transformers(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: StoredWeights, name: str, index: Any = ...) -> Tensor:
        raise InputError(f"{name} cannot be read")

    monkeypatch.setattr(StoredWeights, "read", fail)
    with pytest.raises(InputError, match="cannot be read"):
        load_policy(sharded)


def test_reward_models_come_in_several_files_too(tmp_path: Path, new_scalar: Any, tokenizer: Any) -> None:
    scalar = new_scalar(vocab_size=300)
    save_model(scalar, tokenizer, tmp_path, max_shard_size="20KB")
    assert len(shards(tmp_path)) > 2
    assert_same(load_reward_model(tmp_path).model, scalar.model.state_dict())
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path), scalar.model.state_dict())
