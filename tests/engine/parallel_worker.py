"""What several processes do under torchrun for test_parallel.py: `parallel_worker.py TASKS.json`.

TASKS.json holds command lines of ppomax to run one after the other, and where to write what was measured here. Each
process also runs the same as one process, in float64, and compares.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from ppomax.engine import cli, parallel
from ppomax.engine.attention import ATTENTION
from ppomax.engine.batch import Prompt, Rollout, pack_rollouts
from ppomax.engine.config import LoRAConfig, OptimConfig, PPOConfig, RewardConfig, RolloutConfig, RuntimeConfig
from ppomax.engine.errors import InputError
from ppomax.engine.layers import decoder_layers
from ppomax.engine.lora import add_adapters
from ppomax.engine.models import CausalModel, Placement, ScalarModel, load_policy, scalar_from_causal
from ppomax.engine.optim import Optimizer
from ppomax.engine.parallel import ALONE, Ranks
from ppomax.engine.ppo import PPO
from ppomax.engine.rewards import FunctionReward, ModelReward
from ppomax.engine.templates import Encoded
from ppomax.engine.tensors import put_back, take_out, write_tensors
from ppomax.engine.weights import arrive
from torch import Tensor
from torch.distributed.tensor import DTensor

STOPS = [1, 2, 3, 4, 5, 6]
CPU = RuntimeConfig(device="cpu", seed=3)
# With everything that is global in it: moments, whitening, denominators, pre-training of the critic, ptx.
CONFIG = PPOConfig(
    iterations=2,
    rollouts_per_iteration=12,
    minibatch_size=6,
    samples_per_prompt=2,
    micro_batch_tokens=34,
    max_sequence=28,
    bootstrap_truncated=True,
    normalize_advantages=True,
    importance_clip=2.0,
    entropy_coef=0.01,
    ptx_coef=0.5,
    ptx_batch_size=3,
    critic_pretrain_iterations=1,
    critic_pretrain_epochs=1,
    policy_optim=OptimConfig(lr=2e-3, eps=1e-6),
    critic_optim=OptimConfig(lr=2e-3, eps=1e-6),
    rollout=RolloutConfig(max_response=12, temperature=1.0, top_p=1.0, max_running=4, block_size=4),
    reward=RewardConfig("normalize", 0.8),
    runtime=CPU,
)


def new_policy(seed: int, dtype: torch.dtype = torch.float64, **sizes: Any) -> CausalModel:
    values = {
        "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 1, **sizes,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model("llama", **values)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return CausalModel(model.to(dtype))


def new_scalar(seed: int) -> ScalarModel:
    return scalar_from_causal(new_policy(seed), std=0.3, generator=torch.Generator().manual_seed(seed))


def draw(count: int, seed: int) -> list[int]:
    return torch.randint(7, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [Prompt([{"role": "user", "content": str(i)}], draw(1 + 5 * i % 14, i)) for i in range(20)]
DIALOGUES = [Encoded(draw(n, n), [False] * 2 + [i % 3 != 1 for i in range(n - 2)]) for n in (6, 9, 4, 27, 8)]


def new_ppo(config: PPOConfig, ranks: Ranks) -> PPO:
    reward = ModelReward(new_scalar(4), config.micro_batch_tokens, ranks)
    policy, reference, critic = new_policy(1), new_policy(2), new_scalar(3)
    if config.lora.rank:
        policy, critic = add_adapters(reference, config.lora, seed=0)
    return PPO(
        config, policy=policy, reference=reference, critic=critic, reward=reward, prompts=PROMPTS, stop_tokens=STOPS,
        ptx=DIALOGUES, ranks=ranks,
    )  # fmt: skip


def whole(x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    return (x.int() if x.dtype == torch.int16 else x).full_tensor().to(x.dtype)  # gloo does not know int16


@contextlib.contextmanager
def watched(ppo: PPO, seen: dict[str, Any]) -> Iterator[None]:
    """Notes the rollouts, the fields of each iteration, the first gradients, and the numbers of micro-batches."""
    shape, step = ppo.shape, Optimizer.step

    def shape_and_note(prompts: Any, rollouts: Any, minibatches: Any) -> Any:
        experience = shape(prompts, rollouts, minibatches)
        seen["tokens"].append([(r.prompt, r.response) for r in rollouts])
        fields = [experience.advantages, experience.shaped.returns, experience.scored.values, experience.shaped_scores]
        seen["fields"].append(torch.cat([field.double() for field in fields]))
        micros = [micro for minibatch in minibatches for micro in minibatch]
        seen["empty"] += sum(not micro.members.numel() for micro in micros)
        return experience

    def note_and_step(optimizer: Optimizer) -> Any:
        name = "policy" if optimizer is ppo.policy_optimizer else "critic"
        if name not in seen["gradients"]:
            seen["gradients"][name] = [whole(p.grad).clone() for p in optimizer.parameters]
        return step(optimizer)

    ppo.shape, Optimizer.step = shape_and_note, note_and_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.step = step  # type: ignore[method-assign]


def run_ppo(ranks: Ranks, config: PPOConfig = CONFIG) -> dict[str, Any]:
    ppo = new_ppo(config, ranks)
    seen: dict[str, Any] = {"tokens": [], "fields": [], "empty": 0, "gradients": {}}
    with watched(ppo, seen):
        seen["metrics"] = [*ppo.pretrain_critic(), *(ppo.iterate() for _ in range(config.iterations))]
    for name in ("policy", "critic"):
        seen[name] = [whole(p.detach()) for p in getattr(ppo, name).parameters()]
    seen["under_way"] = [request.response for _, request in ppo.under_way]
    return seen


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the largest value."""
    pairs = list(zip(ours, theirs, strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs) / max(float(b.abs().max()) for _, b in pairs)


# What depends on which requests run beside each other.
SCHEDULE = ("rollout/prefill_tokens", "rollout/cache_hit_rate", "rollout/evictions", "rollout/preemptions")


def metrics_distance(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> float:
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {n for n in one if n.startswith(("time/", *SCHEDULE))}:
            largest = max(largest, abs(one[name] - other[name]) / max(abs(other[name]), 1.0))
    return largest


def compare_ppo(ranks: Ranks) -> dict[str, Any]:
    """Two iterations after one batch of critic pre-training, on these processes and on one."""
    ours, theirs = run_ppo(ranks), run_ppo(ALONE)
    return {
        "same tokens": ours["tokens"] == theirs["tokens"],
        "responses of one length": len({len(r) for _, r in ours["tokens"][0]}) == 1,
        "empty micro-batches": ranks.gather([ours["empty"]]),
        "fields": distance(ours["fields"], theirs["fields"]),
        "metrics": metrics_distance(ours["metrics"], theirs["metrics"]),
        **{
            f"{name} gradients": distance(ours["gradients"][name], theirs["gradients"][name])
            for name in ours["gradients"]
        },
        **{f"{name} weights": distance(ours[name], theirs[name]) for name in ("policy", "critic")},
        "policy moved": distance(ours["policy"], [p.detach() for p in new_policy(1).parameters()]),
        "metrics equal everywhere": len({str(untimed(m)) for m in ranks.gather([ours["metrics"]])}) == 1,
    }


def compare_lora(ranks: Ranks) -> dict[str, Any]:
    """The same with adapters on one base, which each process has whole."""
    config = replace(CONFIG, lora=LoRAConfig(rank=4))
    ours, theirs, start = run_ppo(ranks, config), run_ppo(ALONE, config), new_ppo(config, ALONE)
    models = ("policy", "critic")
    return {
        "same tokens": ours["tokens"] == theirs["tokens"],
        "gradients": [distance(ours["gradients"][name], theirs["gradients"][name]) for name in models],
        "weights": [distance(ours[name], theirs[name]) for name in models],
        "moved": [distance(ours[name], [p.detach() for p in getattr(start, name).parameters()]) for name in models],
        "equal everywhere": len(set(ranks.gather([str(ours["policy"])]))) == 1,
    }


def untimed(steps: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in step.items() if not name.startswith("time/")} for step in steps]


def partial_rollouts(ranks: Ranks) -> dict[str, Any]:
    """Iterations that leave responses under way: which ones depends on the processes; complete they are on all."""
    config = replace(CONFIG, extra_in_flight=4, critic_pretrain_iterations=0)
    seen = run_ppo(ranks, config)
    return {
        "trained on": [len(batch) for batch in seen["tokens"]],
        "under way": len(seen["under_way"]),
        "equal everywhere": len({str(part) for part in ranks.gather([[seen["tokens"], seen["under_way"]]])}) == 1,
        "finite": all(torch.isfinite(p).all().item() for p in seen["policy"]),
    }


def one_samples(ranks: Ranks) -> dict[str, Any]:
    """All responses are to one prompt, which one process samples. With recorded log-probs the policy's next pass is
    that of the update."""
    config = replace(CONFIG, samples_per_prompt=12, old_logprobs="recorded", importance_clip=None)
    ours, theirs = run_ppo(ranks, config), run_ppo(ALONE, config)
    return {"same tokens": ours["tokens"] == theirs["tokens"], "weights": distance(ours["policy"], theirs["policy"])}


FORMS: dict[str, tuple[torch.dtype, OptimConfig]] = {
    "float32": (torch.float32, OptimConfig(lr=1e-3)),
    "bfloat16": (torch.bfloat16, OptimConfig(lr=1e-3)),
    "bfloat16 8-bit": (torch.bfloat16, OptimConfig(lr=1e-3, moments="8bit")),
}


def toy(dtype: torch.dtype) -> CausalModel:
    return new_policy(5, dtype, hidden_size=256, intermediate_size=256, num_hidden_layers=1, vocab_size=31)


def give_gradients(optimizer: Optimizer, step: int) -> None:
    """The same ones whatever the number of processes."""
    for index, p in enumerate(optimizer.parameters):
        generator = torch.Generator().manual_seed(100 * step + index)
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if isinstance(p, DTensor):
            last = p.device_mesh.ndim - 1  # along it are those that share a copy
            rows = -(-p.shape[0] // p.device_mesh.size(last))
            mine = grad[rows * p.device_mesh.get_local_rank(last) :][:rows]
            grad = DTensor.from_local(
                mine, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=grad.stride()
            )
        p.grad = grad


def trained(ranks: Ranks, form: str, state: dict[str, Any] | None = None, start: int = 0) -> tuple[Any, Optimizer]:
    dtype, config = FORMS[form]
    model = toy(dtype)
    if state is not None:
        with torch.no_grad():
            for p, saved in zip(model.parameters(), state["weights"], strict=True):
                p.copy_(saved)
    ranks.shard(model)
    optimizer = Optimizer(model, config, 8, None)  # a norm is another sum on two processes, in its last bit
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    for step in range(start, start + 2):
        give_gradients(optimizer, step)
        optimizer.step()
    return model, optimizer


def resharding(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """State saved by these processes and by one goes on with the other number of them."""
    found = {}
    for form in FORMS:
        results = {}
        for saved_by, goes_on in ((ranks, ALONE), (ALONE, ranks), (ALONE, ALONE)):
            model, optimizer = trained(saved_by, form)
            weights = [whole(p.detach()).clone() for p in model.parameters()]
            place = folder / f"{form} {saved_by.size} {goes_on.size}"
            small, tensors = take_out({"optimizer": optimizer.state_dict()})
            if saved_by.size > 1 or ranks.is_main:
                write_tensors(tensors, place, saved_by)
            ranks.barrier()
            state = put_back(small, place)
            model, optimizer = trained(goes_on, form, {**state, "weights": weights}, start=2)
            _, after = take_out({"optimizer": optimizer.state_dict()})
            results[saved_by.size, goes_on.size] = [
                *(whole(p.detach()) for p in model.parameters()), *(whole(x) for x in after.values())
            ]  # fmt: skip
        expected = results.pop((1, 1))
        for (one, other), got in results.items():
            equal = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            found[f"{form}: {one} to {other}"] = equal
    return found


def errors(ranks: Ranks) -> dict[str, Any]:
    """A reward function that fails on one process is an error on all."""

    def fails(prompts: list[list[dict[str, str]]], responses: list[str]) -> list[float]:
        return [1.0 / int(chat[-1]["content"]) for chat in prompts]

    class Template:
        def decode(self, tokens: list[int]) -> str:
            return str(tokens)

    rollouts = [Rollout([7], [8], torch.zeros(1), True, [0]) for _ in range(4)]
    reward = FunctionReward(fails, Template(), ranks)  # type: ignore[arg-type]
    scores = reward(PROMPTS[1:5], rollouts)
    try:
        reward(PROMPTS[:4], rollouts)
    except InputError as error:
        message = str(error)
    ranks.check_same("prompts", [[1, 2], [3]])
    try:
        ranks.check_same("prompts", [[1, 2], [ranks.rank]])
    except InputError as error:
        different = str(error)
    return {
        "scores": scores.tolist(),
        "messages": ranks.gather([message.split(" (")[0]]),
        "different": ranks.gather([different]),
    }


def two_copies(ranks: Ranks) -> Ranks:
    return Ranks.of(replace(CPU, shard_size=ranks.size // 2))


def compare_copies(ranks: Ranks) -> dict[str, Any]:
    """As `compare_ppo`, with two copies of the weights, each on half of the processes."""
    copies = two_copies(ranks)
    config = replace(CONFIG, critic_pretrain_iterations=0, iterations=1)
    ours, theirs = run_ppo(copies, config), run_ppo(ALONE, config)
    return {
        "same tokens": ours["tokens"] == theirs["tokens"],
        "mesh": list(copies.mesh.shape) if copies.mesh else [],
        "weights": max(distance(ours[name], theirs[name]) for name in ("policy", "critic")),
    }


def offloading(ranks: Ranks) -> dict[str, Any]:
    """A frozen model under FSDP2's own offloading, which on a CPU copies for nothing, computes what it does whole."""
    offloads = Ranks(ranks.rank, ranks.size, ranks.mesh, offloads=True)
    rollouts = [Rollout(draw(3, n), draw(n, 30 + n), torch.zeros(n), True, [0] * n) for n in (5, 9)]
    batch = pack_rollouts(rollouts, torch.device("cpu"))
    model, plain = new_policy(6).requires_grad_(False), new_policy(6)
    offloads.shard(model, frozen=True)
    with torch.no_grad():
        ours, theirs = [model.logprobs(batch)[0] for _ in range(2)], plain.logprobs(batch)[0]
    kept = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    return {
        "equal": all(torch.equal(each, theirs) for each in ours),
        "kept": kept / sum(p.numel() for p in plain.parameters()),
    }


def loading(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A model stored in float32 and taken in bfloat16: bytes of it that are whole at a time, and what it computes."""
    if ranks.is_main:
        sizes = {"num_hidden_layers": 4, "intermediate_size": 96}
        new_policy(8, torch.float32, **sizes).model.save_pretrained(folder / "stored", max_shard_size="50KB")
    ranks.barrier()
    half = Placement(torch.device("cpu"), torch.bfloat16)
    plain, model = load_policy(folder / "stored", half), load_policy(folder / "stored", ranks.placement(half))
    files = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [[int(end, 16) for end in fields[0].split("-")] for fields in files]
    stored = {p.data_ptr() for p in model.parameters()}
    mapped = [any(low <= address < high for low, high in spans) for address in stored]
    whole = []

    def arrive_and_note(*args: Any) -> None:
        arrive(*args)
        there = (p for p in model.parameters() if not isinstance(p, DTensor) and p.data_ptr() not in stored)
        whole.append(sum(p.nbytes for p in there))

    parallel.arrive = arrive_and_note  # type: ignore[attr-defined]
    try:
        ranks.shard(model)
    finally:
        parallel.arrive = arrive  # type: ignore[attr-defined]
    batch = pack_rollouts([Rollout(draw(3, 1), draw(9, 2), torch.zeros(9), True, [0] * 9)], half.device)
    with torch.no_grad():
        equal = torch.equal(model.logprobs(batch)[0], plain.logprobs(batch)[0])
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(plain)]
    outside = sum(p.nbytes for p in plain.parameters()) - sum(layers)
    return {"mapped": all(mapped), "whole": whole, "pieces": [*layers, outside], "equal": equal}


def main(tasks: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.of(CPU)
    found: dict[str, Any] = {}
    checks: dict[str, Callable[[], Any]] = {
        "ppo": lambda: compare_ppo(ranks),
        "lora": lambda: compare_lora(ranks),
        "partial": lambda: partial_rollouts(ranks),
        "one samples": lambda: one_samples(ranks),
        "resharding": lambda: resharding(ranks, Path(tasks["folder"])),
        "errors": lambda: errors(ranks),
        "offloading": lambda: offloading(ranks),
        "loading": lambda: loading(ranks, Path(tasks["folder"])),
        "copies": lambda: compare_copies(ranks),
        "resharding of copies": lambda: resharding(two_copies(ranks), Path(tasks["folder"]) / "copies"),
    }
    for name in tasks["checks"]:
        found[name] = checks[name]()
    for arguments in tasks["commands"]:
        torch.manual_seed(0)
        cli.main(copy.copy(arguments))
    if ranks.is_main:
        Path(tasks["found"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
