"""The plan's memory against the live tensor bytes of real runs, which the profiler's record of allocations gives."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from ppomax.engine.attention import ATTENTION
from ppomax.engine.batch import Prompt
from ppomax.engine.communication import Machines
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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
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

    def __init__(
        self, config: PPOConfig, vocab: int, place: Placement | None = None, judge: LlamaConfig | None = None
    ) -> None:
        torch.manual_seed(0)
        layers = LayerOptions(config.runtime.checkpointing)
        self.place = place or Placement(torch.device("cpu"), torch.float32, layers=layers)
        policy, critic, reference = self._causal(vocab), self._scalar(shape(vocab)), None
        judges = [self._scalar(config) for config in (shape(vocab), judge) if config is not None]
        if config.lora.rank:
            policy, reference, critic = adapt(policy, config.lora, seed=0)
        reference = reference or self._causal(vocab)
        self.models: tuple[Model, ...] = (policy, critic, reference, *judges)
        prompts = [Prompt([], torch.randint(1, vocab, (LENGTHS.prompt,)).tolist()) for _ in range(16)]
        reward, *others = (ModelReward(model, config.micro_batch_tokens) for model in judges)
        judged: Any = {"judge": others[0]} if others else {}
        self.ppo = PPO(config, policy, reference, critic, reward, prompts, stop_tokens=[], **judged)
        self.ppo.iterate()

    def _causal(self, vocab: int) -> CausalModel:
        model = LlamaForCausalLM._from_config(shape(vocab), attn_implementation=ATTENTION)
        return CausalModel(model.to(self.place.device, self.place.dtype), self.place)

    def _scalar(self, config: LlamaConfig) -> ScalarModel:
        config = LlamaConfig(**{**config.to_dict(), "num_labels": 1})
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


JUDGE: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 3}
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
    "recorded log-probs, a judge": (
        1000, {"old_logprobs": "recorded", "rollout": {"max_response": 32, "repetition_penalty": 1.0}}
    ),
    "LoRA": (1000, {"lora": {"rank": 8}}),
}  # fmt: skip


@pytest.mark.parametrize(("vocab", "changes"), RUNS.values(), ids=RUNS)
def test_peaks_are_those_of_a_real_run(vocab: int, changes: dict[str, Any], request: pytest.FixtureRequest) -> None:
    config = small(**changes)
    judge = shape(vocab, **JUDGE) if "a judge" in request.node.name else None
    run = Run(config, vocab, judge=judge)
    standing, peaks = run.standing(), run.peaks()
    made = plan(config, Shapes.of(shape(vocab), None, shape(vocab), judge), chip("cpu"), lengths=LENGTHS)
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


def planned(
    config: PPOConfig, device: Chip | None = None, *, gpus: int = 1, lengths: Lengths = LENGTHS,
    judge: LlamaConfig | None = None, **options: Any,
) -> Plan:  # fmt: skip
    shapes = Shapes.of(shape(), None, shape(), judge)
    return plan(config, shapes, device or chip("cpu"), lengths=lengths, gpus=gpus, **options)


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


def test_attention_of_a_gpu_needs_room_for_its_backward_pass(h200: Chip) -> None:
    """What `mha_varlen_bwd` allocates: there is no other workspace of the critic."""
    wide = shape(num_attention_heads=16, head_dim=40, intermediate_size=64)
    config = small(**ON_GPU)
    made = plan(config, Shapes.of(wide, wide, wide), h200, lengths=LENGTHS)
    sequences, heads = 2, 16
    tokens = sequences * LENGTHS.sequence
    summed, rows = 4 * heads * 64, 4 * heads  # float32; heads of 40 are rounded up to 64
    expanded = 2 * 2 * tokens * heads * 40
    expected = (tokens + 128 * sequences) * (summed + rows) + expanded
    assert made.phase("update critic").resident["workspaces"] == expected
    fixed = plan(
        replace(config, runtime=replace(config.runtime, deterministic=True)), Shapes.of(wide, wide, wide), h200,
        lengths=LENGTHS,
    )  # fmt: skip
    copies = 5  # 148 processors over 2 x 16
    more = (tokens + 128 * sequences) * summed * (copies - 1)
    assert fixed.phase("update critic").resident["workspaces"] == expected + more


def test_a_judge_is_one_more_frozen_model(h200: Chip) -> None:
    offload = {**ON_GPU, "runtime": {"device": "auto", "offload_frozen": True}}
    without, made = planned(small(**ON_GPU), h200), planned(small(**ON_GPU), h200, judge=shape(**JUDGE))
    waiting = planned(small(**offload), h200, judge=shape(**JUDGE))
    held = {c.name: c for c in made.components}
    size = held["weights judge"].bytes
    assert size > held["weights reward"].bytes
    for phase in PHASES:
        assert made.phase(phase).resident["weights judge"] == size
    assert made.loading - without.loading == size
    assert made.phase("score").work.needed > without.phase("score").work.needed
    assert made.phase("score").work.tokens == without.phase("score").work.tokens * 5 / 4
    assert {c.name for c in waiting.components if c.on_host} == {
        f"weights {m}" for m in ("reference", "reward", "judge")
    }


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
    assert made.phase("score").resident["gathered"] == max(c.bytes for c in made.components if c.on_host)


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
    parameters, micros = four.parameters["policy"], 2  # one in each of two steps
    weights, kept = 2 * parameters, 2 * (2 * 1000 + 1) * 64  # embeddings, norm and head stay for the backward pass
    expected = 0.75 * (2 * weights - kept + 4 * parameters) * micros
    assert four.phase("update policy").communication == expected
    assert four.phase("update policy").network == 0
    critic = 2 * four.parameters["critic"]
    asked = 2 * (weights + weights + critic) + critic  # the reward model takes both minibatches at once
    assert four.phase("score").communication == 0.75 * asked
    rollout, score = four.phase("rollout"), four.phase("score")
    assert rollout.seconds == pytest.approx((rollout.work.seconds or 0) + rollout.communication / 450e9)
    assert score.seconds == score.work.seconds  # which hides what comes in


def test_copies_of_the_weights_are_sharded_each_by_itself(h200: Chip) -> None:
    pairs = {**ON_GPU, "runtime": {"device": "auto", "shard_size": 2}}
    two, four = planned(small(**ON_GPU), h200, gpus=2), planned(small(**pairs), h200, gpus=4)
    halves, held = ({c.name: c.bytes for c in made.components} for made in (two, four))
    for name in ("weights policy", "moments critic"):
        assert held[name] == halves[name]
    assert four.batches.process_rollouts == 2
    parameters = four.parameters["policy"]
    gradients, gathered = 4 * parameters, 2 * (2 * parameters - (2 * 1000 + 1) * 64)
    between_copies = 2 * 0.5 * gradients / 2
    assert four.phase("update policy").communication == 2 * (0.5 * (gathered + gradients) + between_copies)  # two steps
    with pytest.raises(InputError, match=r"RuntimeConfig\.shard_size = 2: expected a divisor of the 3 GPUs"):
        planned(small(**pairs), h200, gpus=3)


def test_what_is_sharded_or_offloaded_is_loaded_piece_by_piece(h200: Chip) -> None:
    one, four = planned(small(**ON_GPU), h200), planned(small(**ON_GPU), h200, gpus=4)
    whole, parts = (sum(c.bytes for c in made.components if c.name.startswith("weights")) for made in (one, four))
    outside = 2 * (2 * 1000 + 1) * 64  # more than a layer; the policy's, the critic has no head to the vocabulary
    assert one.loading == whole + CUDA_RESERVE
    assert four.loading == parts + outside + outside // 4 + CUDA_RESERVE
    offload = planned(small(**{**ON_GPU, "runtime": {"device": "auto", "offload_frozen": True}}), h200)
    trained = sum(c.bytes for c in offload.components if c.name in ("weights policy", "weights critic"))
    assert offload.loading == trained + 2 * outside + CUDA_RESERVE
    for made in (one, four, offload):
        assert made.loading < made.peak


def test_adapters_load_their_base_whole(h200: Chip) -> None:
    lora = {**ON_GPU, "lora": {"rank": 4}}
    made = planned(small(**{**lora, "runtime": {"device": "auto", "offload_frozen": True}}), h200)
    there = sum(c.bytes for c in made.components if c.name.startswith("weights") and not c.on_host)
    outside = 2 * (1000 + 1 + 1) * 64  # of the reward model: embeddings, norm, head of one row
    assert made.loading == there + 2 * outside + CUDA_RESERVE


@pytest.mark.parametrize(("network", "bound"), [(50e9, "links"), (1e9, "network")], ids=["fast", "slow"])
def test_the_slower_link_between_gpus_bounds_a_phase(network: float, bound: str, h200: Chip) -> None:
    fast = replace(h200, rate=1e18, bandwidth=1e18, link=50e9)  # computes in no time
    made = planned(small(**ON_GPU), fast, gpus=4, machines=Machines(2, network))
    for phase in made.phases:
        assert phase.bound == bound
        slower = max(phase.communication / 50e9, phase.network / network)
        assert phase.seconds == pytest.approx(slower, rel=1e-3)
        assert phase.network == pytest.approx(phase.communication * (2 / 3) / 2)
    pairs = {**ON_GPU, "runtime": {"device": "auto", "shard_size": 2}}
    halves = planned(small(**pairs), fast, gpus=4, machines=Machines(2, network))
    assert halves.phase("score").network == halves.phase("rollout").network == 0
    gradients = 4 * halves.parameters["critic"] / 2
    assert halves.phase("update critic").network == 2 * gradients  # of two steps, once to the other and once back


def test_the_host_bounds_a_phase_that_waits_for_it(h200: Chip) -> None:
    offload = {**ON_GPU, "runtime": {"device": "auto", "offload_frozen": True}}
    made = planned(small(**offload), replace(h200, host_link=1e6))
    waiting = {c.name: c.bytes for c in made.components if c.on_host}
    assert made.phase("score").bound == "host"
    copied = sum(waiting.values()) / 1e6  # once
    assert made.phase("score").seconds == pytest.approx(copied + made.phase("score").work.seconds)
    assert {made.phase(name).bound for name in PHASES if name != "score"} == {"GPU"}


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


@pytest.mark.parametrize(
    ("machines", "message"),
    [
        (Machines(0), "GPUs of a machine = 0: expected at least 1"),
        (Machines(8, 0.0), "network = 0 GB/s: expected more than 0"),
    ],
    ids=["no GPUs", "no network"],
)
def test_impossible_machines_are_refused(machines: Machines, message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(small(), machines=machines)


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


def test_live_bytes_count_a_product_that_is_added_in_float32() -> None:
    """Torch 2.11 has no shapes for it, and a later one none of a GPU's where it is built without them."""
    with FakeTensorMode(), LiveBytes() as live, live.measured() as usage:
        a, b = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in ((8, 16), (16, 4)))
        out = torch.empty(8, 4, device="cuda")
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    assert usage.flops == 2 * 8 * 16 * 4
    assert usage.peak == a.nbytes + b.nbytes + out.nbytes
