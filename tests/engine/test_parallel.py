"""Two processes under torchrun equal one: PPO, SFT and reward model, checkpoints that go on with another number.

All that needs two processes happens in one torchrun of `parallel_worker.py`; the tests look at what it found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ppomax.engine import cli, evaluation
from ppomax.engine import ppo as ppo_module
from ppomax.engine.batch import Request, Rollout, deal, deal_requests, pack, plan_minibatches, quotas, split_evenly
from ppomax.engine.config import RuntimeConfig
from ppomax.engine.errors import InputError
from ppomax.engine.metrics import read_metrics
from ppomax.engine.parallel import ALONE, Ranks, _mesh, _start
from ppomax.engine.runs import RunFolder

from .parallel_worker import CONFIG, FORMS, PROMPTS, SCHEDULE, new_policy, new_ppo, new_scalar

WORKER = Path(__file__).with_name("parallel_worker.py")
CPU = torch.device("cpu")
# In float64 two processes add the same numbers in another order: found are 1e-15 and less.
TOLERANCE = 1e-12
# In float32, over whole runs; found are 3e-6 and less.
FLOAT32 = 1e-4
CHECKS = ["ppo", "lora", "partial", "one samples", "resharding", "errors", "offloading", "loading", "copies"]


def torchrun(processes: int, folder: Path, checks: Sequence[str], commands: Sequence[Sequence[str]] = ()) -> Any:
    tasks = {"checks": checks, "commands": commands, "folder": str(folder / "states"), "found": str(folder / "found")}
    (folder / "tasks").write_text(json.dumps(tasks))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*line, str(WORKER), str(folder / "tasks")], env=environment, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "found").read_text()) | {"shown": done.stderr}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, arguments: Callable) -> Any:
    """What two processes found; `folder` holds each command's run by one process and by two, and PPO runs that began
    with one number and went on with the other."""
    folder = tmp_path_factory.mktemp("parallel")
    extra = {"runtime__keep_checkpoints": 9}
    names = ("sft", "rm", "ppo")
    for name in names:
        torch.manual_seed(0)
        cli.main(arguments(name, folder / f"{name} 1", **extra))
    cut_short(folder / "ppo 1", folder / "ppo 1 to 2")
    commands = [arguments(name, folder / f"{name} 2", **extra) for name in names]
    commands.append(["ppo", "--resume", str(folder / "ppo 1 to 2")])
    found = torchrun(2, folder, CHECKS, commands)
    cut_short(folder / "ppo 2", folder / "ppo 2 to 1")
    cli.main(["ppo", "--resume", str(folder / "ppo 2 to 1")])
    return found | {"folder": folder}


def cut_short(run: Path, to: Path) -> None:
    """A copy of a run that ended after its second iteration."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / "step-000004")
    (to / "config.json").unlink()


# Two processes


def test_two_processes_train_as_one(runs: Any) -> None:
    """Two PPO iterations after critic pre-training, with ptx, whitening, moments and several samples a prompt."""
    ppo = runs["ppo"]
    assert ppo["same tokens"]
    for name in ("fields", "policy gradients", "critic gradients", "policy weights", "critic weights"):
        assert ppo[name] < TOLERANCE, (name, ppo)
    assert ppo["metrics"] < 1e-6  # they are reported in float32
    assert ppo["policy moved"] > 1e-3
    assert ppo["metrics equal everywhere"]


def test_two_processes_train_adapters_as_one(runs: Any) -> None:
    lora = runs["lora"]
    assert lora["same tokens"]
    assert max(*lora["gradients"], *lora["weights"]) < TOLERANCE, lora
    assert min(lora["moved"]) > 1e-3
    assert lora["equal everywhere"]


def test_unequal_token_budgets_do_not_deadlock(runs: Any) -> None:
    """Responses have several lengths, and some process had fewer micro-batches than the other."""
    assert not runs["ppo"]["responses of one length"]
    assert sum(runs["ppo"]["empty micro-batches"]) > 0


def test_responses_left_under_way_are_known_to_all(runs: Any) -> None:
    assert runs["partial"] == {"trained on": [12, 12], "under way": 4, "equal everywhere": True, "finite": True}


def test_a_process_may_have_nothing_to_sample(runs: Any) -> None:
    assert runs["one samples"]["same tokens"]
    assert runs["one samples"]["weights"] < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_optimizer_state_goes_on_with_another_number_of_processes_bit_for_bit(form: str, runs: Any) -> None:
    assert runs["resharding"][f"{form}: 2 to 1"]
    assert runs["resharding"][f"{form}: 1 to 2"]


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    """Optimizer state goes on with them and from them; also where two of them share a copy of the weights."""
    found = torchrun(4, tmp_path, ["resharding", "copies", "resharding of copies"])
    for name in ("resharding", "resharding of copies"):
        assert found[name] == {f"{form}: {way}": True for form in FORMS for way in ("4 to 1", "1 to 4")}
    assert found["copies"]["mesh"] == [2, 2]
    assert found["copies"]["same tokens"]
    assert found["copies"]["weights"] < TOLERANCE


def test_processes_may_have_copies_of_the_weights(runs: Any) -> None:
    """Gradients are then summed over the copies too."""
    assert runs["copies"]["mesh"] == [2, 1]
    assert runs["copies"]["same tokens"]
    assert runs["copies"]["weights"] < TOLERANCE


def test_an_error_on_one_process_is_one_on_all(runs: Any) -> None:
    found = runs["errors"]
    assert found["scores"] == pytest.approx([1.0, 0.5, 1 / 3, 0.25])
    assert len(found["messages"]) == 2
    assert len(set(found["messages"])) == 1
    assert "ZeroDivisionError" in found["messages"][0]
    different = "prompts: the processes have read different ones; all need the same files"
    assert found["different"] == [different] * 2


def test_a_shared_model_is_read_layer_by_layer(runs: Any) -> None:
    """Before that it is nowhere but in its files."""
    loading = runs["loading"]
    assert loading["mapped"]
    assert loading["whole"] == loading["pieces"]
    assert loading["equal"]


def test_a_frozen_model_is_sharded_and_may_wait_in_host_memory(runs: Any) -> None:
    assert runs["offloading"]["equal"]
    assert runs["offloading"]["kept"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", ["sft", "rm", "ppo"])
def test_a_command_under_torchrun_does_what_it_does_alone(name: str, runs: Any, weights_of: Callable) -> None:
    assert_close(runs["folder"] / f"{name} 1", runs["folder"] / f"{name} 2", weights_of)


@pytest.mark.parametrize("way", ["1 to 2", "2 to 1"])
def test_a_run_goes_on_with_another_number_of_processes(way: str, runs: Any, weights_of: Callable) -> None:
    assert_close(runs["folder"] / f"ppo {way[0]}", runs["folder"] / f"ppo {way}", weights_of)


def test_one_process_writes_and_speaks(runs: Any) -> None:
    records = read_metrics(runs["folder"] / "ppo 2" / "metrics.jsonl")
    assert [(r["stage"], r["step"]) for r in records] == [
        *(("critic", n) for n in (1, 2)),
        *(("ppo", n) for n in (1, 2, 3, 4)),
    ]
    assert runs["shown"].count("ppo 4/4") == 2  # the run, and the one that was resumed
    assert not list(runs["folder"].rglob("*.draft"))


def assert_close(one: Path, other: Path, weights_of: Callable) -> None:
    """Figures and finished weights, in float32."""
    figures = [read_metrics(run / "metrics.jsonl") for run in (one, other)]
    assert len(figures[0]) == len(figures[1])
    for ours, theirs in zip(*figures, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {*SCHEDULE, "stage"}:
            if not name.startswith("time/"):
                assert ours[name] == pytest.approx(theirs[name], rel=FLOAT32, abs=FLOAT32), name
    weights, others = weights_of(one), weights_of(other)
    assert weights.keys() == others.keys()
    assert len(weights) > 10
    for name, weight in weights.items():
        assert (weight - others[name]).abs().max() < FLOAT32, name


# Who does what

lengths = st.lists(st.integers(1, 40), max_size=24)


@given(lengths, st.integers(1, 5))
def test_hands_are_complete_and_balanced(weights: list[int], hands: int) -> None:
    dealt = deal(weights, hands)
    assert len(dealt) == hands
    assert sorted(index for hand in dealt for index in hand) == list(range(len(weights)))
    assert all(hand == sorted(hand) for hand in dealt)
    sums = [sum(weights[index] for index in hand) for hand in dealt]
    assert max(sums) - min(sums) <= max(weights, default=0)


@given(lengths, st.integers(1, 60), st.integers(1, 5))
def test_all_processes_agree_on_the_number_of_micro_batches(lengths: list[int], budget: int, processes: int) -> None:
    plans = split_evenly(lengths, budget, processes)
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(i for plan in plans for group in plan for i in group) == list(range(len(lengths)))
    for group in (group for plan in plans for group in plan):
        assert sum(lengths[i] for i in group) <= budget or len(group) == 1
    assert not lengths or any(plan[-1] for plan in plans), "a micro-batch that is empty everywhere"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_quotas(counts: list[int], data: Any) -> None:
    total = data.draw(st.integers(0, sum(counts)))
    parts = quotas(counts, total)
    assert sum(parts) == total
    assert all(0 <= part <= count for part, count in zip(parts, counts, strict=True))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(0, 2)), max_size=8), st.integers(1, 4))
def test_requests_of_one_prompt_stay_together(groups: list[tuple[int, int, int]], processes: int) -> None:
    requests = [
        Request([prompt], seed=n, response=[1] * begun, logprobs=[0.0] * begun, versions=[0] * begun)
        for prompt, count, begun in groups
        for n in range(count)
    ]
    parts = deal_requests(requests, 8, processes)
    assert sorted(index for part in parts for index in part) == list(range(len(requests)))
    owner = {index: number for number, part in enumerate(parts) for index in part}
    for index, (one, other) in enumerate(pairwise(requests)):
        if one.prompt == other.prompt and not one.response and not other.response:
            assert owner[index] == owner[index + 1]


@given(st.lists(st.integers(1, 9), min_size=8, max_size=8), st.integers(1, 30), st.integers(1, 4))
def test_minibatches_are_the_same_whatever_the_number_of_processes(
    lengths: list[int], budget: int, processes: int
) -> None:
    rollouts = [Rollout([7], [8] * n, torch.zeros(n), True, [0] * n) for n in lengths]
    alone = plan_minibatches(rollouts, 4, budget, [1, 2], CPU)
    parts = [plan_minibatches(rollouts, 4, budget, [1, 2], CPU, rank=r, processes=processes) for r in range(processes)]
    for number, minibatch in enumerate(alone):
        own = [part[number] for part in parts]
        assert {(each.rows, each.size, len(each)) for each in own} == {(minibatch.rows, 4, len(own[0]))}
        for field in ("members", "places"):
            together = torch.cat([getattr(micro, field) for each in own for micro in each]).sort().values
            assert torch.equal(together, torch.cat([getattr(micro, field) for micro in minibatch]).sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_empty_micro_batch_runs_the_layers_and_adds_nothing(dtype: torch.dtype) -> None:
    empty, none = pack([], [], CPU), torch.empty(0, dtype=dtype)
    policy = new_policy(0, dtype)
    result = policy.policy_loss(empty, old_logprobs=none, advantages=none, clip_eps=0.2, normalizer=5)
    loss = result.loss + policy.cross_entropy(empty, 5)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())
    critic = new_scalar(0)
    loss = critic.value_loss(empty, none.double(), none.double(), clip_eps=0.2, normalizer=5).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in critic.parameters())


# One process


def test_one_process_hands_back_what_it_is_given() -> None:
    x = torch.ones(3)
    assert ALONE.sum(x) is x
    assert ALONE.gather([1, 2]) == ALONE.on_main(lambda: [1, 2]) == [1, 2]
    assert ALONE.share([3, 4]) == [0, 1]
    policy = new_policy(0)
    ALONE.shard(policy)
    with ALONE.gathered(policy):
        assert type(policy).__name__ == "CausalModel"


def test_processes_need_devices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"RuntimeConfig.device = 'cuda:1': expected no number with 2 processes"):
        Ranks.of(RuntimeConfig(device="cuda:1"))


def test_one_process_takes_the_gpu_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *args, **options: None)
    monkeypatch.setattr("atexit.register", lambda *args: None)
    _start(1, True, "cuda:1")
    assert taken == [1]
    with pytest.raises(InputError, match="no GPU of number 2, which this process needs: this machine has 2"):
        _start(1, True, "cuda:2")


def test_copies_of_the_weights_need_as_many_processes_each() -> None:
    with pytest.raises(InputError, match=r"RuntimeConfig.shard_size = 3: expected a divisor of the 4 processes"):
        _mesh("cpu", 4, 3)


def test_offloading_frozen_models_changes_nothing_on_a_cpu() -> None:
    ranks = Ranks.of(RuntimeConfig(device="cpu", offload_frozen=True))
    assert (ranks.size, ranks.mesh, ranks.offloads) == (1, None, False)


def test_sampling_leaves_no_graph_of_gathered_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = new_ppo(CONFIG, ALONE)
    graphs = ppo.engine.decoder.graphs
    monkeypatch.setattr(ppo_module, "is_sharded", lambda model: model is ppo.policy)
    monkeypatch.setattr(evaluation, "is_sharded", lambda model: model is ppo.policy)
    graphs[1] = None  # type: ignore[assignment]
    ppo.collect()
    assert not graphs
    graphs[1] = None  # type: ignore[assignment]
    evaluation.answer_and_judge(ppo.engine, ppo.policy, PROMPTS[:2], {}, micro_batch_tokens=64, seed=0)
    assert not graphs


def test_processes_that_nobody_started_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE = 2, but the processes do not meet"):
        Ranks.of(RuntimeConfig(device="cpu"))


def test_commands_for_one_process_say_so(ppomax: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ppomax("generate").complaint == "ppomax generate runs in one process; torchrun is for sft, rm, ppo"


def test_other_processes_keep_off_the_run_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, Ranks(rank=1, size=2))
    log = run.log("ppo", after=0)
    log.write(1, {"x": 1.0})
    log.close()
    run.remove_if_unused()
    assert list(tmp_path.iterdir()) == []
