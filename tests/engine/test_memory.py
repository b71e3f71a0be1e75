"""The plan's memory against the live tensor bytes of real runs, which the profiler's record of allocations gives."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from ppomax.engine.attention import ATTENTION
from ppomax.engine.batch import Prompt
from ppomax.engine.config import PPOConfig, from_dict
from ppomax.engine.errors import InputError
from ppomax.engine.fake_models import Shapes
from ppomax.engine.footprint import Lengths
from ppomax.engine.hardware import Chip, chip
from ppomax.engine.layers import LayerOptions
from ppomax.engine.live_bytes import LiveBytes
from ppomax.engine.lora import adapt
from ppomax.engine.memory import CUDA_RESERVE, PHASES, Plan, plan
from ppomax.engine.models import CausalModel, Model, Placement, ScalarModel
from ppomax.engine.ppo import PPO
from ppomax.engine.rewards import ModelReward
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

LENGTHS = Lengths(64, 32)
SMALL: dict[str, Any] = {
    "rollouts_per_iteration": 8, "minibatch_size": 4, "max_sequence": 96, "micro_batch_tokens": 192, "ptx_coef": 0.0,
    "rollout": {"max_response": 32, "max_running": 8}, "runtime": {"device": "cpu"},
}  # fmt: skip
EIGHT_BIT = {"moments": "8bit"}


def shape(vocab: int = 1000, **changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    values = {"intermediate_size": 192, "tie_word_embeddings": False, "pad_token_id": 0, **sizes, **changes}
    return LlamaConfig(vocab_size=vocab, **values)


def small(**changes: Any) -> PPOConfig:
    return from_dict(PPOConfig, {**SMALL, **changes})


class Run:
    """A PPO run in memory, past its first iteration, which makes the optimizers' state."""

    def __init__(self, config: PPOConfig, vocab: int, place: Placement | None = None) -> None:
        torch.manual_seed(0)
        layers = LayerOptions(config.runtime.checkpointing)
        self.place = place or Placement(torch.device("cpu"), torch.float32, layers=layers)
        policy, critic, reference, reward = self._causal(vocab), self._scalar(vocab), None, self._scalar(vocab)
        if config.lora.rank:
            policy, reference, critic = adapt(policy, config.lora, seed=0)
        reference = reference or self._causal(vocab)
        self.models: tuple[Model, ...] = (policy, critic, reference, reward)
        prompts = [Prompt([], torch.randint(1, vocab, (LENGTHS.prompt,)).tolist()) for _ in range(16)]
        judge = ModelReward(reward, config.micro_batch_tokens)
        self.ppo = PPO(config, policy, reference, critic, judge, prompts, stop_tokens=[])
        self.ppo.iterate()

    def _causal(self, vocab: int) -> CausalModel:
        model = LlamaForCausalLM._from_config(shape(vocab), attn_implementation=ATTENTION)
        return CausalModel(model.to(self.place.device, self.place.dtype), self.place)

    def _scalar(self, vocab: int) -> ScalarModel:
        config = shape(vocab, num_labels=1)
        model = LlamaForSequenceClassification._from_config(config, attn_implementation=ATTENTION)
        return ScalarModel(model.to(self.place.device, self.place.dtype), self.place)

    def standing(self) -> int:
        """Bytes of what is there between two iterations."""
        drawn, cache = self.ppo.engine.drawn, self.ppo.engine.cache
        optimizers = (self.ppo.policy_optimizer, self.ppo.critic_optimizer)
        states = [x for o in optimizers for state in o.adamw.state.values() for x in state.values()]
        parameters = [p for model in self.models for p in model.parameters()]
        tensors = (*parameters, *states, *cache.k_pools, *cache.v_pools, *vars(drawn).values())
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors if isinstance(x, Tensor)}
        return sum(storage.nbytes() for storage in storages.values())

    def peaks(self) -> dict[str, int]:
        """Most live bytes in each phase of an iteration."""
        ppo, standing = self.ppo, self.standing()
        gc.collect()  # what an earlier test left would be freed, and counted, somewhere below
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as record:
            with record_function("rollout"):
                prompts, rollouts = ppo.collect()
            with record_function("score"):
                minibatches = ppo.plan(rollouts, epoch=0)
                experience = ppo.shape(prompts, rollouts, minibatches)
            for minibatch in minibatches:
                with record_function("update policy"):
                    ppo.update_policy(minibatch, experience)
                with record_function("update critic"):
                    ppo.update_critic(minibatch, experience)
        events = record.profiler.kineto_results.events()
        allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        spans = [(e.name(), e.start_ns(), e.end_ns()) for e in events if e.name() in PHASES]
        live, peaks = standing, dict.fromkeys(PHASES, 0)
        for time, size in allocations:
            live += size
            for name, start, end in spans:
                if start <= time <= end:
                    peaks[name] = max(peaks[name], live)
        return peaks


RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1000, {}),
    "large vocabulary, layers computed again": (4000, {"runtime": {"device": "cpu", "checkpointing": "layer"}}),
    "8-bit moments, selective, entropy bonus, sleep": (
        1000,
        {
            "policy_optim": EIGHT_BIT, "critic_optim": EIGHT_BIT, "entropy_coef": 0.01, "minibatch_size": 2,
            "rollout": {"max_response": 32, "max_running": 4, "top_p": 1.0, "sleep": True},
            "runtime": {"device": "cpu", "checkpointing": "selective"},
        },
    ),
    "recorded log-probs": (
        1000, {"old_logprobs": "recorded", "rollout": {"max_response": 32, "repetition_penalty": 1.0}}
    ),
    "LoRA": (1000, {"lora": {"rank": 8}}),
}  # fmt: skip


@pytest.mark.parametrize(("vocab", "changes"), RUNS.values(), ids=RUNS)
def test_peaks_are_those_of_a_real_run(vocab: int, changes: dict[str, Any]) -> None:
    config = small(**changes)
    run = Run(config, vocab)
    standing, peaks = run.standing(), run.peaks()
    made = plan(config, Shapes.of(shape(vocab), None, shape(vocab)), chip("cpu"), lengths=LENGTHS)
    assert {phase.name: phase.peak for phase in made.phases} == pytest.approx(peaks, rel=0.1)
    for name in ("update policy", "update critic"):
        assert made.phase(name).peak - standing == pytest.approx(peaks[name] - standing, rel=0.1), name


def test_components_are_those_of_a_real_run() -> None:
    run, config = Run(small(), 1000), small()
    held = {c.name: c.bytes for c in planned(config).components}
    for name, model in zip(("policy", "critic", "reference", "reward"), run.models, strict=True):
        weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
        assert held[f"weights {name}"] == weights
    for name, optimizer in (("policy", run.ppo.policy_optimizer), ("critic", run.ppo.critic_optimizer)):
        state = sum(x.nbytes for state in optimizer.adamw.state.values() for x in state.values())
        assert held[f"moments {name}"] == state
    assert held["KV cache"] == run.ppo.engine.cache.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_is_what_a_gpu_allocates() -> None:  # unmeasured: no GPU has run it
    changes = {"runtime": {"device": "cuda", "dtype": "bfloat16"}, "rollout": {"max_response": 32, "kv_blocks": 64}}
    config, device = small(**changes), torch.device("cuda")
    run = Run(config, 32000, Placement(device, torch.bfloat16, attention="torch"))
    torch.cuda.reset_peak_memory_stats()
    run.ppo.iterate()
    made = plan(config, Shapes.of(shape(32000), None, shape(32000)), chip("h200"), lengths=LENGTHS)
    assert made.peak - CUDA_RESERVE == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def planned(config: PPOConfig, device: Chip | None = None, *, gpus: int = 1, lengths: Lengths = LENGTHS) -> Plan:
    return plan(config, Shapes.of(shape(), None, shape()), device or chip("cpu"), lengths=lengths, gpus=gpus)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Chip:
    """A GPU to plan for; its kernels' modules are imported as the interpreter's, like in the tests of these."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return chip("h200")


ON_GPU = {"runtime": {"device": "auto"}, "rollout": {"max_response": 32, "max_running": 8, "kv_blocks": 64}}


def test_a_gpu_keeps_halves_with_low_bits(h200: Chip) -> None:
    made = planned(small(**ON_GPU), h200)
    parameters = made.parameters["policy"]
    held = {c.name: c.bytes for c in made.components}
    assert made.dtype == "bfloat16"
    assert held["low bits policy"] == 2 * parameters
    assert held["moments policy"] == 8 * parameters
    assert held["weights policy"] == pytest.approx(2 * parameters, rel=0.01)
    assert held["CUDA reserve"] == CUDA_RESERVE


def test_the_update_of_a_gpu_allocates_the_workspace_of_its_kernels(h200: Chip) -> None:
    made = planned(small(**ON_GPU), h200)
    rows, vocab = 2 * LENGTHS.response, 1000
    pitch = -(-vocab // 64) * 64
    logits_and_gradient = (4 + 2) * rows * pitch
    assert made.phase("update policy").resident["workspaces"] >= logits_and_gradient
    assert "workspaces" not in made.phase("update critic").resident


def test_offloaded_state_is_on_the_gpu_in_its_own_update_alone(h200: Chip) -> None:
    plain = planned(small(**ON_GPU), h200)
    offload = {"offload": True}
    made = planned(small(**ON_GPU, policy_optim=offload, critic_optim=offload), h200)
    waiting = [c for c in made.components if c.on_host]
    assert {c.name for c in waiting} == {f"{k} {m}" for k in ("low bits", "moments") for m in ("policy", "critic")}
    assert made.host == sum(c.bytes for c in waiting)
    for name, other in (("policy", "critic"), ("critic", "policy")):
        phase, before = made.phase(f"update {name}"), plain.phase(f"update {name}")
        assert before.peak - phase.peak == sum(c.bytes for c in waiting if c.name.endswith(other))
    assert plain.phase("score").peak - made.phase("score").peak == made.host


def test_frozen_models_may_wait_on_the_host(h200: Chip) -> None:
    plain = planned(small(**ON_GPU), h200)
    made = planned(small(**{**ON_GPU, "runtime": {"device": "auto", "offload_frozen": True}}), h200)
    frozen = sum(c.bytes for c in made.components if c.name in ("weights reference", "weights reward"))
    assert plain.phase("update policy").peak - made.phase("update policy").peak == frozen
    assert made.host == frozen


def test_the_base_of_adapters_stays_on_the_gpu(h200: Chip) -> None:
    offload = {"device": "auto", "offload_frozen": True}
    made = planned(small(**{**ON_GPU, "runtime": offload}, lora={"rank": 4}), h200)
    held = {c.name: c for c in made.components}
    assert [c.name for c in made.components if c.on_host] == ["weights reward"]
    for phase in made.phases:
        assert phase.resident["weights reference"] == held["weights reference"].bytes


@pytest.mark.parametrize(
    "rollout", [{"stop": ["###"]}, {"attention": "torch", "block_size": 256}, {"attention": "triton"}], ids=str
)
def test_settings_of_the_rollout_that_need_a_run(rollout: dict[str, Any], h200: Chip) -> None:
    made = planned(small(**{**ON_GPU, "rollout": {**ON_GPU["rollout"], "kv_blocks": 8, **rollout}}), h200)
    assert made.phase("rollout").peak > CUDA_RESERVE


def test_a_sleeping_cache_is_there_in_rollouts_alone(h200: Chip) -> None:
    sleeping = {**ON_GPU, "rollout": {**ON_GPU["rollout"], "sleep": True}}
    plain, made = planned(small(**ON_GPU), h200), planned(small(**sleeping), h200)
    (cache,) = (c.bytes for c in plain.components if c.name == "KV cache")
    assert made.phase("rollout").peak == plain.phase("rollout").peak
    assert plain.phase("score").peak - made.phase("score").peak == cache


def test_a_share_of_free_memory_sizes_the_cache(h200: Chip) -> None:
    share = {"max_response": 32, "kv_memory": 0.25}
    made = planned(small(**{**ON_GPU, "rollout": share}), h200)
    held = {c.name: c.bytes for c in made.components}
    weights = sum(size for name, size in held.items() if name.startswith("weights"))
    assert held["KV cache"] == pytest.approx((h200.memory - CUDA_RESERVE - weights) / 4, rel=1e-3)


def test_several_gpus_share_weights_states_and_gradients(h200: Chip) -> None:
    one, four = planned(small(**ON_GPU), h200), planned(small(**ON_GPU), h200, gpus=4)
    whole, parts = ({c.name: c.bytes for c in made.components} for made in (one, four))
    for name in ("weights policy", "weights reward", "low bits critic", "moments policy"):
        assert parts[name] == -(-whole[name] // 4)
    assert four.phase("rollout").resident["gathered"] == whole["weights policy"] - parts["weights policy"]
    assert four.batches.process_rollouts == 2
    assert four.batches.process_minibatch == 1
    assert four.batches.rollouts == 8
    assert one.phase("update policy").communication == 0
    weights, parameters, micros = whole["weights policy"], four.parameters["policy"], 2  # one in each of two steps
    assert four.phase("update policy").communication == 0.75 * (2 * weights + 4 * parameters) * micros


def test_copies_of_the_weights_are_sharded_each_by_itself(h200: Chip) -> None:
    pairs = {**ON_GPU, "runtime": {"device": "auto", "shard_size": 2}}
    two, four = planned(small(**ON_GPU), h200, gpus=2), planned(small(**pairs), h200, gpus=4)
    halves, held = ({c.name: c.bytes for c in made.components} for made in (two, four))
    for name in ("weights policy", "moments critic"):
        assert held[name] == halves[name]
    assert four.batches.process_rollouts == 2
    gradients = 4 * four.parameters["policy"]
    weights = 2 * halves["weights policy"]
    between_copies = 2 * 0.5 * gradients / 2
    expected = 2 * (0.5 * (2 * weights + gradients) + between_copies)  # two steps
    assert four.phase("update policy").communication == pytest.approx(expected, rel=1e-3)
    with pytest.raises(InputError, match=r"RuntimeConfig\.shard_size = 2: expected a divisor of the 3 GPUs"):
        planned(small(**pairs), h200, gpus=3)


def test_every_process_loads_all_models_whole(h200: Chip) -> None:
    one, four = planned(small(**ON_GPU), h200), planned(small(**ON_GPU), h200, gpus=4)
    whole = sum(c.bytes for c in one.components if c.name.startswith("weights"))
    assert one.loading == four.loading == whole + CUDA_RESERVE
    assert one.loading < one.peak
    tight = replace(h200, memory=four.loading - 1)
    assert not planned(small(**ON_GPU), tight, gpus=4).fits


@pytest.mark.parametrize(
    ("lengths", "gpus", "changes", "message"),
    [
        (Lengths(64, 33), 1, {}, "response tokens = 33: expected 1 to rollout.max_response = 32"),
        (Lengths(0, 32), 1, {}, "prompt tokens = 0: expected 1 to 64"),
        (Lengths(65, 32), 1, {}, "prompt tokens = 65: expected 1 to 64"),
        (LENGTHS, 0, {}, "GPUs = 0: expected 1 to minibatch_size = 4"),
        (LENGTHS, 5, {}, "GPUs = 5: expected 1 to minibatch_size = 4"),
        (LENGTHS, 2, {"lora": {"rank": 4}}, "GPUs = 2: expected 1 with LoRA"),
    ],
)
def test_impossible_numbers_are_refused(lengths: Lengths, gpus: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(small(**changes), lengths=lengths, gpus=gpus)


def test_float32_is_not_planned_for_a_gpu() -> None:
    with pytest.raises(InputError, match=r"RuntimeConfig\.dtype = 'float32'"):
        planned(small(runtime={"dtype": "float32"}), chip("h200"))


def test_the_exact_mode_is_not_planned() -> None:
    with pytest.raises(InputError, match=r"RuntimeConfig\.exact = True: the exact mode is not planned"):
        planned(small(runtime={"exact": True}))


def test_a_plan_leaves_torch_as_it_was() -> None:
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
    planned(small(lora={"rank": 4}, entropy_coef=0.011))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before[1:]
    assert not isinstance(torch.empty(1), FakeTensor)


def test_live_bytes_see_what_is_freed_and_what_is_shared() -> None:
    with LiveBytes() as live:
        with live.measured() as usage:
            x = torch.zeros(256)
            view = x[:8]
            y = x * 2
            del y, x
            live.tag = "kept"
            kept = torch.zeros(128)
        assert usage.parts == {"activations": 2048}
        assert live.live == 1024 + 512
        del view, kept
        assert live.live == 0
