"""LoRA: one base under policy, critic and reference; gradients against W + s B A written out; what is kept and how."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.engine import linear, lora
from ppomax.engine.batch import PackedBatch, Prompt, Rollout, pack
from ppomax.engine.config import LoRAConfig, OptimConfig, PPOConfig, RewardConfig, RolloutConfig, RuntimeConfig
from ppomax.engine.errors import InputError
from ppomax.engine.layers import LayerOptions, prepare_layers
from ppomax.engine.lora import add_adapters, load_adapter, merged, save_adapter
from ppomax.engine.models import CausalModel, Model, ScalarModel, load_policy
from ppomax.engine.ppo import PPO
from ppomax.engine.runs import RunFolder
from ppomax.engine.trainer import PPOTrainer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

FAMILIES = ["llama", "qwen2-window", "qwen3", "mistral", "gemma2"]
LORA = LoRAConfig(rank=4, alpha=6)
TRIO = tuple[CausalModel, CausalModel, ScalarModel]
PARTS = ["policy", "critic"]


def draw(length: int, seed: int) -> list[int]:
    return torch.randint(2, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


TOKENS = [draw(9, 0), draw(4, 1), draw(12, 2)]


def packed() -> PackedBatch:
    return pack(TOKENS, [[False] * 2 + [True] * (len(tokens) - 2) for tokens in TOKENS], torch.device("cpu"))


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


@torch.no_grad()
def shake(*models: Model, std: float = 0.1) -> None:
    """Random numbers in everything that is trained, as if it had been trained."""
    generator = torch.Generator().manual_seed(7)
    for model in models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=std)


def bits(parameters: dict[str, Any]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def trio(new_policy: Any) -> Callable[..., TRIO]:
    """trio(family, config=LORA, shaken=True, **model): (policy, reference, critic), trained or new."""

    def make(
        family: str = "llama",
        config: LoRAConfig = LORA,
        shaken: bool = True,
        layers: LayerOptions | None = None,
        **options: Any,
    ) -> TRIO:
        base = new_policy(family, seed=1, **options)
        if layers:
            prepare_layers(base.model, layers)
        policy, critic = add_adapters(base, config, seed=0)
        if shaken:
            shake(policy, critic)
        return policy, base, critic

    return make


# One base


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_base_is_in_memory_once(tied: bool, trio: Callable[..., TRIO]) -> None:
    policy, reference, critic = trio(tie_word_embeddings=tied)
    pointers = {p.data_ptr() for p in reference.parameters()}
    for model in (policy, critic):
        shared = frozen(model)
        assert {p.data_ptr() for p in shared.values()} <= pointers
        assert len(shared) >= len(pointers) - (0 if model is policy or tied else 1)  # a critic has no LM head
    tensors = [t for model in (policy, reference, critic) for t in (*model.parameters(), *model.buffers())]
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    base = sum(t.nbytes for t in (*reference.parameters(), *reference.buffers()))
    trained = sum(p.nbytes for model in (policy, critic) for p in model.parameters() if p.requires_grad)
    assert sum(stored.values()) == base + trained


def test_an_adapter_is_on_every_linear_layer_of_the_decoder_and_each_belongs_to_one_model(
    trio: Callable[..., TRIO],
) -> None:
    policy, reference, critic = trio()
    layers = [n for n, m in reference.model.base_model.named_modules() if isinstance(m, nn.Linear)]
    for model in (policy, critic):
        names = {name.split(".lora_")[0].removeprefix("model.model.") for name in adapters(model)}
        assert names == set(layers)
    assert not {p.data_ptr() for p in adapters(policy).values()} & {p.data_ptr() for p in adapters(critic).values()}
    assert not adapters(reference)


def test_adapters_compute_as_the_engine_s_linear_layers_do(trio: Callable[..., TRIO]) -> None:
    """In fixed tiles in the exact mode, by oneDNN on a CPU: torch's own product has other bits with few rows."""
    for model in trio():
        assert {m.forward.__func__ for m in model.modules() if type(m) is nn.Linear} == {linear._forward}


def test_targets_choose_the_layers(trio: Callable[..., TRIO]) -> None:
    listed: Any = ["q_proj", "v_proj"]  # as a list, which Python users may write, too
    policy, _, critic = trio(config=replace(LORA, targets=listed))
    for model in (policy, critic):
        assert {name.split(".")[-4] for name in adapters(model)} == {"q_proj", "v_proj"}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_both_start_as_the_base(family: str, trio: Callable[..., TRIO]) -> None:
    policy, reference, critic = trio(family, shaken=False)
    assert torch.equal(policy.logprobs(packed())[0], reference.logprobs(packed())[0])
    assert torch.equal(critic.hidden(packed()), reference.hidden(packed()))
    assert not critic.values(packed())[0].any()


def test_the_seed_makes_the_adapters_and_leaves_no_trace(new_policy: Any) -> None:
    torch.manual_seed(5)
    before, base = torch.get_rng_state(), new_policy()
    (one, other), (again, _), (third, _) = (add_adapters(base, LORA, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(adapters(one), adapters(again))
    for model in (third, other):
        assert not any(
            torch.equal(a, b)
            for (name, a), b in zip(adapters(one).items(), adapters(model).values(), strict=True)
            if "lora_A" in name
        )


# Gradients


def policy_loss(policy: CausalModel) -> Tensor:
    rows = policy.hidden(packed()).index_select(0, packed().rows)
    return policy.logits(rows).log_softmax(-1)[:, 3].sum()


def spied(module: nn.Module) -> list[None]:
    """One item for each time that it begins to compute."""
    calls: list[None] = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def gradients(model: Model) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", ["none", "selective", "layer"])
def test_a_backward_pass_after_the_others_have_run_is_its_own(checkpointing: str, trio: Callable[..., TRIO]) -> None:
    alone = trio()[0]
    policy_loss(alone).backward()
    expected = gradients(alone)
    policy, reference, critic = trio(layers=LayerOptions(checkpointing))
    calls = spied(policy.model.model.layers[0].mlp)
    loss = policy_loss(policy)
    value_loss = critic.values(packed())[0].square().sum()
    with torch.no_grad():
        reference.logprobs(packed())
    value_loss.backward()
    loss.backward()
    ours, theirs = gradients(policy), gradients(critic)
    assert len(calls) == (1 if checkpointing == "none" else 2)
    assert same(ours, expected)
    assert ours.keys() == adapters(policy).keys()
    assert theirs.keys() == {*adapters(critic), "model.score.weight"}
    assert all(gradient.any() for gradient in (*ours.values(), *theirs.values()))
    assert not gradients(reference)


def test_a_pass_that_fails_leaves_the_others_as_they_were(
    trio: Callable[..., TRIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, reference, critic = trio()
    with torch.no_grad():
        before = [policy.logprobs(packed())[0], reference.logprobs(packed())[0], critic.values(packed())[0]]
        with monkeypatch.context() as patch:
            patch.setattr(policy.model.model.layers[1], "forward", None)
            with pytest.raises(TypeError):
                policy.hidden(packed())
        after = [policy.logprobs(packed())[0], reference.logprobs(packed())[0], critic.values(packed())[0]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


CONFIG = PPOConfig(
    iterations=2,
    rollouts_per_iteration=8,
    minibatch_size=8,
    micro_batch_tokens=40,
    max_sequence=24,
    clip_eps=0.05,
    value_clip=0.1,
    grad_clip=None,
    policy_optim=OptimConfig(lr=0.02, eps=1e-6),
    critic_optim=OptimConfig(lr=0.02, eps=1e-6),
    rollout=RolloutConfig(max_response=9, temperature=1.0, top_p=1.0, max_running=3, block_size=4),
    reward=RewardConfig("normalize", 0.8),
    runtime=RuntimeConfig(device="cpu"),
)
PROMPTS = [Prompt([{"role": "user", "content": ""}], draw(1 + 3 * i % 11, i)) for i in range(20)]


def count_of_large_ids(prompts: Any, rollouts: Iterable[Rollout]) -> Tensor:
    return torch.tensor([sum(token > 40 for token in rollout.response) for rollout in rollouts]).float()


def new_ppo(trio: TRIO, config: PPOConfig = CONFIG) -> PPO:
    policy, reference, critic = trio
    return PPO(config, policy, reference, critic, count_of_large_ids, PROMPTS, stop_tokens=[1, 2, 3])


class ByHand:
    """A model whose adapted weights are W + s B A, with A and B as leaves; transformers runs it, padding nothing."""

    def __init__(self, base: Any, adapted: Model, scale: float) -> None:
        self.base, self.scale = base, scale
        self.leaves = {n: p.detach().clone().requires_grad_() for n, p in adapted.named_parameters() if p.requires_grad}

    def weights(self) -> dict[str, Tensor]:
        given = {"score.weight": self.leaves["model.score.weight"]} if "model.score.weight" in self.leaves else {}
        for name, a in self.leaves.items():
            if ".lora_A." in name:
                place = name.split(".lora_A.")[0].removeprefix("model.")
                b = self.leaves[name.replace("lora_A", "lora_B")]
                given[f"{place}.weight"] = self.base.get_parameter(f"{place}.weight").detach() + self.scale * (b @ a)
        return given

    def logprobs(self, rollout: Rollout) -> Tensor:
        tokens, start = torch.tensor(rollout.tokens), len(rollout.prompt)
        output = torch.func.functional_call(self.base, self.weights(), (tokens[None],), {"use_cache": False})
        logp = output.logits[0, start - 1 : -1].log_softmax(-1)
        return logp.gather(1, tokens[start:, None])[:, 0]

    def values(self, rollout: Rollout) -> Tensor:
        tokens, weights = torch.tensor(rollout.tokens), self.weights()
        head, prefix = weights.pop("score.weight"), f"{self.base.base_model_prefix}."
        trunk = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        output = torch.func.functional_call(self.base.base_model, trunk, (tokens[None],), {"use_cache": False})
        return (output.last_hidden_state[0, len(rollout.prompt) - 1 : -1] @ head.t())[:, 0]


@pytest.mark.parametrize("config", [LORA, LoRAConfig(4, 6, rslora=True)], ids=["alpha/r", "alpha/sqrt(r)"])
def test_gradients_of_a_ppo_step_against_weights_written_out(
    config: LoRAConfig, trio: Callable[..., TRIO], plain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, in the second of two steps on the same rollouts, where ratios and values are clipped."""
    ppo = new_ppo(trio(config=config, dtype=torch.float64), replace(CONFIG, clip_eps=0.05))
    scale = config.alpha / (2.0 if config.rslora else 4.0)
    prompts, rollouts = ppo.collect()
    (minibatch,) = minibatches = ppo.plan(rollouts, epoch=0)
    experience = ppo.shape(prompts, rollouts, minibatches)
    ppo.update_policy(minibatch, experience)
    ppo.update_critic(minibatch, experience)
    policy = ByHand(plain(ppo.reference, "sdpa"), ppo.policy, scale)
    critic = ByHand(policy.base, ppo.critic, scale)
    for optimizer in (ppo.policy_optimizer, ppo.critic_optimizer):
        monkeypatch.setattr(optimizer, "step", lambda: {})
    stats = ppo.update_policy(minibatch, experience), ppo.update_critic(minibatch, experience)
    assert all(float(each["clipfrac"]) > 0 for each in stats)

    logratio = torch.cat([policy.logprobs(rollout) for rollout in rollouts]) - experience.old_logprobs
    ratio, advantages = logratio.exp(), experience.advantages
    clipped = ratio.clamp(1 - ppo.config.clip_eps, 1 + ppo.config.clip_eps)
    torch.maximum(-advantages * ratio, -advantages * clipped).mean().backward()
    values, old = torch.cat([critic.values(rollout) for rollout in rollouts]), experience.scored.values
    near, returns = old + (values - old).clamp(-0.1, 0.1), experience.shaped.returns
    (0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()).backward()

    for ours, theirs in ((ppo.policy, policy), (ppo.critic, critic)):
        found = gradients(ours)
        assert found.keys() == theirs.leaves.keys()
        for name, leaf in theirs.leaves.items():
            assert leaf.grad is not None
            assert float((found[name] - leaf.grad).abs().max()) < 1e-6 * float(leaf.grad.abs().max()), name


def test_optimizers_hold_their_own_adapter_and_the_critic_s_head(trio: Callable[..., TRIO]) -> None:
    ppo = new_ppo(trio())
    ours, theirs = ({id(p) for p in o.parameters} for o in (ppo.policy_optimizer, ppo.critic_optimizer))
    assert ours == {id(p) for p in adapters(ppo.policy).values()}
    assert theirs == {id(p) for p in (*adapters(ppo.critic).values(), ppo.critic.model.score.weight)}


# Precision


def test_on_a_bfloat16_base_activations_stay_bfloat16_and_the_update_is_float32(trio: Callable[..., TRIO]) -> None:
    """Steps far below a bfloat16 weight's spacing add up, in the low bits that the optimizer keeps."""
    small = replace(CONFIG, policy_optim=OptimConfig(lr=2e-6, eps=1e-12))
    models = trio(dtype=torch.bfloat16)
    policy, ppo = models[0], new_ppo(models, small)
    seen: set[torch.dtype] = set()
    for module in policy.modules():
        module.register_forward_hook(lambda m, i, o: seen.add(o.dtype) if isinstance(o, Tensor) else None)
    start = bits(adapters(policy))
    for _ in range(2):
        metrics = ppo.iterate()
    assert seen == {torch.bfloat16}
    assert ppo.policy_optimizer.form == "float32 moments of bfloat16 weights"
    assert 0 < metrics["policy/grad_norm"] < torch.inf
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    low = [state["low"] for state in ppo.policy_optimizer.adamw.state.values()]
    assert len(low) == len(start)
    assert sum(int((bits_ != 0).sum()) for bits_ in low) > 0.9 * sum(bits_.numel() for bits_ in low)
    unmoved = [float((p == start[name]).float().mean()) for name, p in adapters(policy).items()]
    assert min(unmoved) > 0.5


@torch.no_grad()
def test_gradients_on_a_bfloat16_base_are_near_those_in_float32(trio: Callable[..., TRIO]) -> None:
    half, _, _ = trio(dtype=torch.bfloat16)
    whole = copy.deepcopy(half).float()
    found = []
    for policy in (half, whole):
        with torch.enable_grad():
            policy_loss(policy).backward()
        found.append(gradients(policy))
    for name, exact in found[1].items():
        assert float((found[0][name].float() - exact).norm()) < 0.1 * float(exact.norm()), name


# A run


@pytest.fixture
def new_trainer(policy_folder: Path, world_files: dict[str, Path], small_config: Callable) -> Callable[..., PPOTrainer]:
    """A small run of three iterations with adapters and a function reward."""
    settings = {"iterations": 3, "critic_pretrain_iterations": 0, "eval_every": 0, "lora": {"rank": 4, "alpha": 8}}

    def make(inputs: dict[str, Any] | None = None, **changes: Any) -> PPOTrainer:
        given = {"policy": policy_folder, "reward": small_letters, "prompts": world_files["prompts"], **(inputs or {})}
        return PPOTrainer(small_config("ppo", **{**settings, **changes}), **given)

    return make


def small_letters(prompts: Any, responses: list[str]) -> list[float]:
    """The share of a to z."""
    return [sum("a" <= c <= "z" for c in text) / max(len(text), 1) for text in responses]


def test_a_run_learns_and_leaves_the_base_alone(new_trainer: Callable) -> None:
    trainer = new_trainer(
        iterations=10, rollouts_per_iteration=32, minibatch_size=16, micro_batch_tokens=1024, kl_coef=0.0,
        gae_lambda=1.0, critic_pretrain_iterations=1, lora={"rank": 8, "alpha": 16}, policy_optim={"lr": 3e-2},
        critic_optim={"lr": 1e-2}, rollout={"max_running": 32}, runtime={"seed": 2},
    )  # fmt: skip
    reference, batch = trainer.ppo.reference, packed()
    base, logprobs = bits(dict(reference.named_parameters())), reference.logprobs(batch)[0]
    steps = list(trainer)[1:]
    scores = [step.metrics["reward/score_mean"] for step in steps]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.1
    assert same(base, bits(dict(reference.named_parameters())))
    assert torch.equal(reference.logprobs(batch)[0], logprobs)
    assert steps[0].metrics["kl/ref"] == 0.0
    assert steps[-1].metrics["kl/ref"] > 0.01
    assert all(step.metrics["policy/first_logratio_max"] == 0.0 for step in steps)
    assert max(step.metrics["rollout/logprob_gap_max"] for step in steps) < 1e-4


def test_recorded_logprobs_are_recomputed_ones_in_the_exact_mode(new_trainer: Callable) -> None:
    for step in new_trainer(iterations=2, rollouts_per_iteration=4, policy_optim={"lr": 1e-2}, runtime={"exact": True}):
        assert step.metrics["rollout/logprob_gap_max"] == 0.0
    assert step.metrics["kl/ref"] != 0.0


def test_a_run_stopped_and_resumed_equals_one_never_stopped(
    stop_and_resume: Callable, assert_equal_runs: Callable, policy_folder: Path
) -> None:
    """With critic pre-training, ptx, a reward model, a judge and evaluations in play, by the command line."""
    flags = {"lora__rank": 4, "lora__alpha": 8, "lora__targets": ("q_proj", "v_proj", "down_proj")}
    runs = stop_and_resume("ppo", PPO, "iterate", 3, preset="ppo-max", **flags)
    assert_equal_runs(runs.whole, runs.resumed)
    assert RunFolder.open(runs.whole).config(PPOConfig).lora == LoRAConfig(4, 8, targets=flags["lora__targets"])
    (checkpoint,) = (runs.resumed / "checkpoints").iterdir()
    for part in PARTS:
        assert {path.name for path in (checkpoint / part).iterdir()} == {
            "adapter_model.safetensors", "adapter_config.json",
        }  # fmt: skip
        finished = runs.resumed / ("adapter" if part == "policy" else "critic/adapter") / "adapter_model.safetensors"
        assert finished.read_bytes() == (checkpoint / part / "adapter_model.safetensors").read_bytes()
    assert (runs.resumed / "metrics.jsonl").read_text().count("eval/score_mean") > 0


# What is kept


def outputs(model: Any) -> Tensor:
    """Of a transformers or peft model: logits of each sequence, one after another."""
    model = model.eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([tokens]), use_cache=False).logits.flatten() for tokens in TOKENS])


def test_a_saved_run_is_what_transformers_and_peft_load(
    new_trainer: Callable, policy_folder: Path, tmp_path: Path, plain: Callable
) -> None:
    from peft import PeftModel

    trainer = new_trainer(iterations=1, policy_optim={"lr": 1e-2}, critic_optim={"lr": 1e-2})
    list(trainer)
    models = {"policy": trainer.ppo.policy, "critic": trainer.ppo.critic}
    shake(*models.values())
    before = {name: bits(dict(model.named_parameters())) for name, model in models.items()}
    trainer.save(tmp_path / "run")
    assert all(same(before[name], bits(dict(model.named_parameters()))) for name, model in models.items())

    places = {"policy": (tmp_path / "run", AutoModelForCausalLM),
              "critic": (tmp_path / "run" / "critic", AutoModelForSequenceClassification)}  # fmt: skip
    for name, (folder, auto) in places.items():
        assert not (folder / "adapter_config.json").exists()  # transformers would add the adapter once more
        alone = auto.from_pretrained(folder)
        assert not any("lora" in key for key in alone.state_dict())
        base = auto.from_pretrained(policy_folder, **({"num_labels": 1} if name == "critic" else {}))
        adapted = PeftModel.from_pretrained(base, folder / "adapter")
        expected = outputs(plain(models[name], "sdpa"))
        start = outputs(auto.from_pretrained(policy_folder)) if name == "policy" else torch.zeros_like(expected)
        for found in (outputs(alone), outputs(adapted)):
            assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
            assert float((start - expected).abs().max()) > 1e-2 * float(expected.abs().max())
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(policy_folder)
    assert not any(re.search("adapter|lora", path.name) for path in (tmp_path / "run").glob("*.*"))


@torch.no_grad()
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_computes_the_same_and_leaves_the_live_one(
    family: str, part: str, trio: Callable[..., TRIO]
) -> None:
    policy, reference, critic = trio(family)
    model: Any = policy if part == "policy" else critic
    before, live = bits(dict(model.named_parameters())), model.hidden(packed())
    plain = merged(model)
    gap = float((plain.hidden(packed()) - live).abs().max())
    assert gap < 1e-5 * float(live.abs().max()) < 1e-2 * float((reference.hidden(packed()) - live).abs().max()) * 1e3
    assert not adapters(plain)
    assert same(before, bits(dict(model.named_parameters())))
    assert torch.equal(model.hidden(packed()), live)


def test_merging_rounds_once(trio: Callable[..., TRIO]) -> None:
    policy, reference, _ = trio(dtype=torch.bfloat16)
    layer, plain = policy.model.model.layers[0].mlp.up_proj, merged(policy).model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A.default.weight.float(), layer.lora_B.default.weight.float()
    expected = reference.model.model.layers[0].mlp.up_proj.weight.float() + 6 / 4 * (b @ a)
    assert plain.weight.dtype == torch.bfloat16
    assert torch.equal(plain.weight, expected.bfloat16())


def test_gpt2_whose_linear_layers_are_transposed(tmp_path: Path) -> None:
    from transformers import AutoConfig

    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("gpt2", **sizes, eos_token_id=1)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = load_policy(tmp_path)
    policy, _ = add_adapters(base, LORA, seed=0)
    shake(policy)
    with torch.no_grad():
        live, alone = policy.hidden(packed()), merged(policy).hidden(packed())
        assert float((live - alone).abs().max()) < 1e-5 * float(live.abs().max())
        assert float((live - base.hidden(packed())).abs().max()) > 1e-2 * float(live.abs().max())


@pytest.mark.parametrize("part", PARTS)
def test_an_adapter_saved_and_loaded(part: str, trio: Callable[..., TRIO], tmp_path: Path) -> None:
    trained, new = ((models[0] if part == "policy" else models[2]) for models in (trio(), trio(shaken=False)))
    save_adapter(trained, tmp_path)
    assert not same(dict(trained.named_parameters()), dict(new.named_parameters()))
    load_adapter(new, tmp_path)
    assert same(dict(trained.named_parameters()), dict(new.named_parameters()))


# What is refused


def test_an_adapter_that_does_not_fit(trio: Callable[..., TRIO], tmp_path: Path) -> None:
    policy, _, critic = trio()
    with pytest.raises(InputError, match=f"{tmp_path}: holds no adapter"):
        load_adapter(policy, tmp_path)
    save_adapter(policy, tmp_path)
    other = trio(config=replace(LORA, rank=3))[0]
    for model in (other, critic):
        with pytest.raises(InputError, match=f"{tmp_path}: the adapter there is of other layers, or of another rank"):
            load_adapter(model, tmp_path)


@pytest.mark.parametrize("target", ["lm_head", "score", "embed_tokens", "w_proj"])
def test_targets_that_are_no_linear_layers_of_the_decoder(target: str, new_policy: Any) -> None:
    expected = (
        f"LoRAConfig.targets: LlamaForCausalLM has no linear layer '{target}' in its decoder, "
        "expected some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or all-linear"
    )
    with pytest.raises(InputError) as caught:
        add_adapters(new_policy(), replace(LORA, targets=("q_proj", target)), seed=0)
    assert str(caught.value) == expected


def test_a_critic_of_its_own(new_trainer: Callable, reward_folder: Path, tmp_path: Path) -> None:
    expected = f"critic = '{reward_folder}' cannot be used with LoRAConfig.rank = 4"
    with pytest.raises(InputError, match=expected):
        new_trainer({"critic": reward_folder, "out": tmp_path / "run"})
    assert not any(tmp_path.iterdir())
    assert not new_trainer({"reward": reward_folder}).ppo.critic.model.score.weight.any()


def test_without_peft(new_trainer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"LoRAConfig.rank = 4 needs the package peft: pip install 'ppomax\[lora\]'"):
        new_trainer()
    assert new_trainer(lora={"rank": 0}).ppo.critic is not None


def test_rank_0_is_full_training(new_trainer: Callable) -> None:
    trainer = new_trainer(lora={"rank": 0, "alpha": 4})
    assert all(p.requires_grad for p in trainer.ppo.policy.parameters())
    assert not adapters(trainer.ppo.policy)
