"""`ppomax plan`, what it suggests, its model of time, and the plan that a run prints."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppomax.engine import cli, run_plan
from ppomax.engine import plan as plan_module
from ppomax.engine.batch import Prompt
from ppomax.engine.communication import Machines
from ppomax.engine.config import PPOConfig, from_dict
from ppomax.engine.errors import InputError
from ppomax.engine.fake_models import Shapes
from ppomax.engine.footprint import Lengths
from ppomax.engine.hardware import GIB, GPUS, Chip, chip, chip_of
from ppomax.engine.memory import plan
from ppomax.engine.metrics import console
from ppomax.engine.plan import plan_command, read_shape, reference_shape, show, show_remedies, verdict
from ppomax.engine.remedies import remedies
from ppomax.engine.rewards import ModelReward
from ppomax.engine.run_plan import RunPlan
from rich.console import Console
from transformers import LlamaConfig, ViTConfig

LENGTHS = Lengths(96, 32)
SMALL: dict[str, Any] = {
    "rollouts_per_iteration": 8, "minibatch_size": 4, "max_sequence": 128, "micro_batch_tokens": 256, "ptx_coef": 0.0,
    "rollout": {"max_response": 32, "max_running": 8, "kv_blocks": 100},
}  # fmt: skip


def shape() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=192, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip


SHAPES = Shapes.of(shape(), None, shape())
H, V, LAYERS, FFN, HEADS, KV = 64, 512, 2, 192, 4, 2


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Chip:
    """A GPU to plan for; its kernels' modules are imported as the interpreter's, like in the tests of these."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return chip("h200")


def small(**changes: Any) -> PPOConfig:
    return from_dict(PPOConfig, {**SMALL, **changes})


def test_flops_are_those_of_the_products(h200: Chip) -> None:
    made = plan(small(), SHAPES, h200, lengths=LENGTHS)
    head_size, length, rows = H // HEADS, LENGTHS.sequence, 8
    layer = 2 * H * H + 2 * H * KV * head_size + 3 * H * FFN
    attention = 4 * (length * (length + 1) // 2) * H * LAYERS
    trunk, head = 2 * layer * LAYERS * length + attention, 2 * H * V * LENGTHS.response
    score, policy, critic = (made.phase(name).work for name in ("score", "update policy", "update critic"))
    assert score.needed == rows * (4 * trunk + 2 * head)
    assert policy.needed == 3 * rows * (trunk + head)
    assert critic.needed == 3 * rows * trunk
    assert score.flops == pytest.approx(score.needed, rel=0.01)  # as counted on the operations
    assert critic.flops == pytest.approx(critic.needed + rows * attention / 2, rel=0.01)
    assert policy.flops == pytest.approx(policy.needed + rows * attention / 2, rel=0.01)


def test_adapters_need_no_gradient_of_the_base(h200: Chip) -> None:
    work = plan(small(lora={"rank": 1}), SHAPES, h200, lengths=LENGTHS).phase("update policy").work
    attention = 4 * (LENGTHS.sequence * (LENGTHS.sequence + 1) // 2) * H * LAYERS
    first = 2 * (H * H + 2 * H * KV * (H // HEADS)) * LENGTHS.sequence  # whose inputs, embeddings, are frozen
    counted = work.flops + 8 * (first - attention / 2)  # attention is computed again; gradients of the adapters
    assert work.needed == pytest.approx(counted, rel=0.02)


def test_layers_computed_again_cost_flops_that_are_not_needed(h200: Chip) -> None:
    plain, again = (
        plan(small(runtime={"checkpointing": kind}), SHAPES, h200, lengths=LENGTHS).phase("update critic").work
        for kind in ("none", "layer")
    )
    length, rows = LENGTHS.sequence, 8
    layer = 2 * H * H + 2 * H * KV * (H // HEADS) + 2 * H * FFN  # its last product is not needed again
    attention = 4 * (length * (length + 1) // 2) * H * LAYERS
    assert again.needed == plain.needed
    assert again.flops - plain.flops == rows * (2 * layer * LAYERS * length + attention)


def test_selective_checkpointing_multiplies_nothing_again(h200: Chip) -> None:
    plain, kept, again = (
        plan(small(runtime={"checkpointing": kind}), SHAPES, h200, lengths=LENGTHS).phase("update critic")
        for kind in ("none", "selective", "layer")
    )
    assert kept.work.flops == plain.work.flops
    assert again.resident["activations"] < kept.resident["activations"] < plain.resident["activations"]


def test_times_are_those_of_the_slower_of_products_and_memory(h200: Chip) -> None:
    made = plan(small(), SHAPES, h200, lengths=LENGTHS)
    slower = plan(small(), SHAPES, replace(h200, bandwidth=h200.bandwidth / 2), lengths=LENGTHS)  # type: ignore[operator]
    for phase in made.phases:
        assert phase.seconds is not None
        assert phase.seconds >= max(phase.work.flops / 790e12, phase.work.traffic / 4.3e12) * (1 - 1e-9)
        assert phase.seconds <= phase.work.flops / 790e12 + phase.work.traffic / 4.3e12
        assert slower.phase(phase.name).seconds == pytest.approx(2 * phase.seconds, rel=0.1)  # small: memory alone
    assert made.seconds == sum(phase.seconds or 0 for phase in made.phases)
    assert made.tokens_per_second == pytest.approx(8 * LENGTHS.sequence / (made.seconds or 1))
    assert made.mfu == pytest.approx(made.needed / (made.seconds or 1) / 989e12)  # of the vendor's peak


def test_a_device_without_known_ceilings_has_no_times() -> None:
    made = plan(small(), SHAPES, chip("cpu"), lengths=LENGTHS)
    assert made.seconds is None
    assert made.mfu is None
    assert made.phase("score").work.flops > 0


def test_decoding_takes_its_floor(h200: Chip) -> None:
    """Weights and LM head once a token, keys and values of every sequence."""
    made = plan(small(), SHAPES, h200, lengths=LENGTHS)
    shorter = plan(small(rollout={**SMALL["rollout"], "max_running": 4}), SHAPES, h200, lengths=LENGTHS)
    head_size = H // HEADS
    layer = 2 * H * H + 2 * H * KV * head_size + 3 * H * FFN
    context = LENGTHS.prompt + LENGTHS.response / 2
    cached = context * 2 * LAYERS * KV * head_size * 2
    step = [2 * (LAYERS * layer + H * V) + 8 * n * V + n * cached for n in (8, 4)]
    decoded = LENGTHS.response * (2 * step[1] - step[0])  # twice as many steps of half as many
    assert shorter.phase("rollout").work.traffic - made.phase("rollout").work.traffic == pytest.approx(decoded, rel=0.1)


def test_changes_are_planned_one_after_another_until_it_fits(h200: Chip) -> None:
    config = small(rollout={**SMALL["rollout"], "kv_blocks": None})
    whole = plan(config, SHAPES, h200, lengths=LENGTHS)
    tight = replace(h200, memory=int(1.55 * GIB))
    made = plan(config, SHAPES, tight, lengths=LENGTHS)
    found = list(remedies(replace(made, chip=replace(tight, memory=made.peak - 1)), SHAPES))
    assert whole.fits
    assert found[-1].plan.fits
    assert not any(remedy.plan.fits for remedy in found[:-1])
    peaks = [made.peak, *(remedy.plan.peak for remedy in found)]
    assert [remedy.saved for remedy in found] == [a - b for a, b in pairwise(peaks)]
    assert found[0].flags == "--rollout.sleep"
    for remedy in found:  # flags of the command, which set what was planned
        flags = remedy.flags.removesuffix(" (all weights trained)").split()
        assert cli._parse("plan", ["--model", "7b-shape", *flags])
    assert list(remedies(whole, SHAPES)) == []
    printed = Console(width=200, record=True, file=StringIO())
    show_remedies(made, found, printed)
    assert "with all of these: fits, " in printed.export_text()
    show_remedies(replace(made, chip=replace(tight, memory=made.peak - 1)), found[:-1], printed)
    assert "No change known here makes it fit." in printed.export_text()


def test_the_reference_shape_has_8_billion_parameters() -> None:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(reference_shape())
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248


def test_every_gpu_says_where_its_figures_come_from() -> None:
    assert {name: known.source.split(":")[0] for name, known in GPUS.items()} == {
        name: "measured" if name == "h200" else "vendor data sheet" for name in GPUS
    }
    assert chip_of(torch.device("cpu")).flops is None
    h200, h100 = chip("h200"), chip("h100-80")
    assert h200.flops == h100.flops == 989e12
    assert h200.rate == pytest.approx(h100.rate, rel=0.01)  # the same chip: what one reaches the other is taken to


def test_unknown_gpus_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown GPU 'h300'; expected one of h200, h100-80"):
        chip("h300")
    with pytest.raises(InputError, match=r"nowhere: no such folder, expected a Hugging Face model folder or 7b-shape"):
        read_shape("nowhere")
    with pytest.raises(InputError, match=r"holds no config.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: "):
        read_shape(tmp_path)


def test_the_command_prints_and_writes_a_plan(
    ppomax: Callable, policy_folder: Path, reward_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    outcome = ppomax(
        "plan", "--model", policy_folder, "--reward", reward_folder, "--gpu", "cpu", "--prompt-tokens", 24,
        "--response-tokens", 8, "--ptx-coef", 0, "--rollouts-per-iteration", 8, "--minibatch-size", 4, "--json", file,
        "--rollout.max-running", 4,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    made = json.loads(file.read_text())
    assert made["fits"] is True
    assert made["batches"]["running"] == 4
    assert made["lengths"] == {"prompt": 24, "response": 8}
    assert made["peak"] == max(phase["peak"] for phase in made["phases"])
    for text in ("weights policy", "moments critic", "KV cache", "peak", "tokens of a micro-batch", "checkpoint"):
        assert text in outcome.out
    assert "to spare" in outcome.out
    assert "weights judge" not in outcome.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpu", "tpu"), "unknown GPU 'tpu'; expected one of h200"),
        (("--prompt-tokens", "0"), "prompt tokens = 0: expected at least 1"),
        (("--gpus", "0"), "GPUs = 0: expected 1 to minibatch_size = 32"),
        (("--reward", "nowhere"), "nowhere: no such folder"),
        (("--judge", "nowhere"), "nowhere: no such folder"),
        (("--gpus-per-machine", "0"), "GPUs of a machine = 0: expected at least 1"),
        (("--network", "0"), "network = 0 GB/s: expected more than 0"),
    ],
)
def test_bad_input_of_the_command_is_one_line(
    flags: tuple[str, ...], message: str, ppomax: Callable, policy_folder: Path
) -> None:
    assert ppomax("plan", "--model", policy_folder, *flags).complaint.startswith(message)


def test_a_model_that_is_no_language_model(ppomax: Callable, tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    complaint = ppomax("plan", "--model", tmp_path, "--gpu", "cpu").complaint
    assert complaint.startswith("ViTConfig: not a model that can be planned (Unrecognized configuration class")


def folder_of(config: LlamaConfig, place: Path) -> str:
    config.save_pretrained(place)
    return str(place)


def test_a_judge_of_the_rewards_folder_is_the_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Shapes] = []
    monkeypatch.setattr(plan_module, "plan", lambda config, shapes, *args, **options: planned.append(shapes))
    monkeypatch.setattr(plan_module, "show", lambda *args: (_ for _ in ()).throw(InputError("enough")))
    policy, reward = (folder_of(shape(), tmp_path / name) for name in ("policy", "reward"))
    larger = folder_of(LlamaConfig(hidden_size=128), tmp_path / "judge")
    for judge in (None, "function", reward, larger):
        with pytest.raises(InputError, match="enough"):
            plan_command(PPOConfig(), policy, "cpu", reward=reward, judge=judge)
    assert [shapes.judge is None for shapes in planned] == [True, True, True, False]
    assert json.loads(planned[-1].judge or "")["hidden_size"] == 128


@pytest.mark.parametrize(
    ("spare", "words"),
    [
        (0.5, "fits, 50.0 GiB to spare"),
        (0.049, "fits, 4.9 GiB to spare, LITTLE: fragmentation is not modelled"),
        (-0.25, "does not fit, 25.0 GiB too many"),
    ],
    ids=["plenty", "little", "too much"],
)
def test_the_verdict_says_by_how_much(spare: float, words: str, h200: Chip) -> None:
    made = plan(small(), SHAPES, h200, lengths=LENGTHS)
    made = replace(made, loading=int((1 - spare) * 100 * GIB), chip=replace(h200, memory=100 * GIB))
    assert verdict(made) == words
    line = run_plan._summary(made)[1]  # of a run
    assert line.endswith(words) == ("LITTLE" in words)
    assert ("MORE THAN THE 100.0 THERE ARE" in line) == (spare < 0)


def test_the_tables_of_several_machines_say_what_goes_where(h200: Chip) -> None:
    made = plan(small(), SHAPES, h200, lengths=LENGTHS, gpus=4, machines=Machines(2, 25e9))
    console = Console(width=80)  # and nothing is cut
    with console.capture() as printed:
        show(made, console)
    text = printed.get()
    for words in ("4 x h200 in 2 machines", "by network", "25 GB/s a GPU, as stated", "Loading takes"):
        assert words in " ".join(text.split())
    assert "…" not in text
    rows = ([cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines())
    cells = {row[0]: row[1:] for row in rows if len(row) == 6}
    received = [phase.communication / 1e9 for phase in made.phases]
    assert list(map(float, cells["GB received"])) == pytest.approx([*received, sum(received)], abs=0.01)
    assert float(cells["seconds"][-1]) == pytest.approx(made.seconds, abs=0.01)
    assert cells["bound by"] == [*(phase.bound for phase in made.phases), ""]
    assert cells["MFU"][-1] == f"{made.mfu:.0%}"


def test_a_run_prints_its_plan(ppomax: Callable, arguments: Callable, tmp_path: Path) -> None:
    changes = {"judge": None, "eval_data": None, "eval_every": 0, "iterations": 1, "critic_pretrain_iterations": 0}
    outcome = ppomax(*arguments("ppo", tmp_path / "run", **changes))
    assert outcome.code == 0
    lines = outcome.err.splitlines()
    assert lines[0].startswith("ppo on CPU, float32, attention sdpa")
    assert "torch 2" in lines[0]
    plans = [line for line in lines if line.startswith("ppo plan: ")]
    assert plans[0].startswith("ppo plan: 8 rollouts, 8 sampled at a time; 2 minibatches of 4")
    assert "MiB of tensors, sequences at their longest: rollout " in plans[1]
    assert len(plans) == 2
    assert re.search(r"ppo memory: \d+ MiB of tensors planned; the process was at [\d,]+ at most, ", outcome.err)


def test_a_run_plans_its_judge_and_its_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(requires_grad_=lambda on: model, config=shape(), device=torch.device("cpu"))
    other = SimpleNamespace(requires_grad_=lambda on: other, config=shape())
    planned: list[Any] = []
    monkeypatch.setattr(run_plan, "plan", lambda config, shapes, chip, **options: planned.append((shapes, options)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    reward = ModelReward(model, 256)  # type: ignore[arg-type]
    for judge in (None, reward, lambda prompts, rollouts: torch.zeros(0), ModelReward(other, 256)):  # type: ignore[arg-type]
        ppo = SimpleNamespace(
            config=small(), policy=model, critic=model, reward=reward, judge=judge, ranks=SimpleNamespace(size=8)
        )
        RunPlan(ppo, "ppo")._planned(LENGTHS)  # type: ignore[arg-type]
    assert [shapes.judge is None for shapes, _ in planned] == [True, True, True, False]
    assert all(options["machines"].gpus == 4 for _, options in planned)


@pytest.fixture
def run_on_gpu(h200: Chip, monkeypatch: pytest.MonkeyPatch) -> RunPlan:
    """The end of a run on a GPU that has allocated 2 GiB, made out of what it asks of torch."""
    ppo = SimpleNamespace(config=small(), prompts=[Prompt([], [0] * n) for n in (90, 102)], policy=SimpleNamespace())
    ppo.policy.device = torch.device("cuda")
    run = RunPlan(ppo, "ppo")  # type: ignore[arg-type]
    made = plan(small(), SHAPES, h200, lengths=LENGTHS)
    monkeypatch.setattr(run, "_planned", lambda lengths: replace(made, lengths=lengths))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2 * GIB)
    run.plan = made
    return run


def test_a_run_on_a_gpu_ends_with_what_it_took(run_on_gpu: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    planned = run_on_gpu._planned
    monkeypatch.setattr(run_on_gpu, "_planned", lambda lengths: asked.append(lengths) or planned(lengths))
    for length, seconds in ((20, 1.0), (24, 3.0)):
        times = {"time/rollout": seconds, "time/score": 0.5, "time/update": 2.0}
        run_on_gpu.add({**times, "response/length_mean": length, "kl/ref": 0.0})
    run_on_gpu.add({"critic/fresh_loss": 1.0})  # of critic pre-training
    with console.capture() as printed:
        run_on_gpu.compare()
    memory, times = printed.get().splitlines()
    assert memory.startswith("ppo memory: 2.0 GiB allocated at the peak, ")
    assert times.startswith("ppo an iteration: rollout 2.00 s (model ")
    assert "score 0.50 s (model " in times
    assert asked == [Lengths(96, 22)]


def test_a_model_that_cannot_be_planned_is_trained_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = SimpleNamespace(config=None, device=torch.device("cpu"))
    run = RunPlan(SimpleNamespace(policy=policy, critic=policy, reward=None, judge=None), "ppo")  # type: ignore[arg-type]
    with console.capture() as printed:
        assert run._planned(LENGTHS) is None
    assert printed.get().startswith("ppo no plan of this run: AttributeError: ")
