"""Bytes that processes exchange in a PPO iteration: counted at 2 processes, and a model of larger numbers.

    python bench/bench_communication.py [--json bench/results/communication.json]

Counted are the payloads of all collectives of one iteration of a tiny model on a CPU, by phase and kind, and held
against what the sizes of its weights predict: the run fails where they differ. The model puts the sizes of a 7B model
into the same formulas, which are those of `ppomax plan` (`engine/communication.py`). Its bandwidths (450 GB/s inside a
machine of 8 GPUs, 50 for each GPU between machines) are assumptions, nothing of it was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import records
import torch
from environment import environment
from ppomax.engine.attention import ATTENTION
from ppomax.engine.batch import Prompt
from ppomax.engine.communication import USUAL, Payload, Sizes, payloads, traffic
from ppomax.engine.config import PPOConfig, RolloutConfig, RuntimeConfig
from ppomax.engine.hardware import chip
from ppomax.engine.models import CausalModel, scalar_from_causal
from ppomax.engine.parallel import Ranks
from ppomax.engine.ppo import PPO
from ppomax.engine.rewards import ModelReward
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

PROCESSES = 2
CONFIG = PPOConfig(
    rollouts_per_iteration=16, minibatch_size=8, micro_batch_tokens=160, max_sequence=64,
    rollout=RolloutConfig(max_response=32, max_running=16), runtime=RuntimeConfig(device="cpu"),
)  # fmt: skip
SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
WEIGHTS = ("all-gather", "reduce-scatter")  # what FSDP2 does, in the order of a Payload
# What each collective is called, and which of its arguments is the whole payload.
KINDS = {
    "_allgather_base_": (WEIGHTS[0], 0), "_reduce_scatter_base_": (WEIGHTS[1], 1),
    "allgather_": ("figures, rollouts", 0), "allreduce_": ("all-reduce", 0), "all_reduce": ("all-reduce", 0),
}  # fmt: skip
IN_PLACE = ("barrier", "wait_tensor", "_wrap_tensor_autograd")  # which move nothing


class Counting(TorchDispatchMode):
    """Payload bytes of the collectives inside, by (phase, kind)."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.bytes, self.calls = "else", Counter[tuple[str, str]](), Counter[tuple[str, str]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = function.namespace, function._opname
        if "c10d" in space and name not in IN_PLACE:
            kind, place = KINDS[name]
            self.bytes[self.phase, kind] += _size(args[place])
            self.calls[self.phase, kind] += 1
        return function(*args, **(kwargs or {}))

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer


def _size(x: Any) -> int:
    return x.nbytes if isinstance(x, Tensor) else sum(map(_size, x))


class Work(NamedTuple):
    """What an iteration does, as far as weights travel for it."""

    scoring: int
    """Micro-batches of a process in the scoring by policy, reference and critic"""
    rewards: int
    """In that by the reward model"""
    updates: int
    """In the updates of policy and critic, each"""


def predicted(policy: Sizes, critic: Sizes, work: Work) -> dict[str, Payload]:
    """Payloads of an iteration by phase, the reference of the policy's size and the reward model of the critic's."""
    models = {"policy": policy, "reference": policy, "critic": critic, "reward": critic}
    scored = {"policy": work.scoring, "reference": work.scoring, "critic": work.scoring, "reward": work.rewards}
    return payloads(models, scored, dict.fromkeys(("policy", "critic"), work.updates))


def sizes_of(model: Any, ranks: Ranks) -> Sizes:
    """Of the sharded model; each weight's rows are filled up to a multiple of the processes."""
    layers = rest = 0
    for name, p in model.named_parameters():
        size = -(-p.shape[0] // ranks.size) * ranks.size * p.stride(0) * p.element_size()
        if ".layers." in name:
            layers += size
        else:
            rest += size
    return Sizes(layers, rest)


def new_ppo(ranks: Ranks) -> PPO:
    def policy(seed: int) -> CausalModel:
        torch.manual_seed(seed)
        config = LlamaConfig(**SHAPE)  # type: ignore[arg-type]
        return CausalModel(LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION))

    prompts = [Prompt([{"role": "user", "content": ""}], [2 + i % 500] * (4 + i % 28)) for i in range(64)]
    reward = ModelReward(scalar_from_causal(policy(1), std=0.1), CONFIG.micro_batch_tokens, ranks)
    return PPO(
        CONFIG, policy=policy(0), reference=policy(0), critic=scalar_from_causal(policy(2), std=0.1), reward=reward,
        prompts=prompts, stop_tokens=[1], ranks=ranks,
    )  # fmt: skip


def count(found: Path) -> None:
    """One process of the counted run."""
    torch.set_num_threads(1)
    ranks = Ranks.of(CONFIG.runtime)
    ppo, counting = new_ppo(ranks), Counting()
    work: dict[str, int] = {}
    updates = {"update_policy": "update policy", "update_critic": "update critic"}
    for method, phase in {"_sample": "rollout", "shape": "score", **updates}.items():
        setattr(ppo, method, _in_phase(counting, phase, getattr(ppo, method)))
    plan = ppo.plan

    def plan_and_note(rollouts: Any, epoch: int) -> Any:
        minibatches = plan(rollouts, epoch)
        work["updates"] = work["scoring"] = sum(map(len, minibatches))
        work["rewards"] = len(ranks.micro_batches([len(r.tokens) for r in rollouts], CONFIG.micro_batch_tokens))
        return minibatches

    ppo.plan = plan_and_note  # type: ignore[method-assign]
    ppo.iterate()
    with counting:
        ppo.iterate()
    phases = predicted(sizes_of(ppo.policy, ranks), sizes_of(ppo.critic, ranks), Work(**work))
    expected = {(name, kind): size for name, each in phases.items() for kind, size in zip(WEIGHTS, each, strict=True)}
    if ranks.is_main:
        rows = [
            {"phase": phase, "kind": kind, "calls": counting.calls[phase, kind], "bytes": size,
             "predicted": expected.get((phase, kind))}
            for (phase, kind), size in counting.bytes.items()
        ]  # fmt: skip
        found.write_text(json.dumps({"work": work, "rows": rows}))


def _in_phase(counting: Counting, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with counting.during(phase):
            return method(*args, **options)

    return call


# The model of larger numbers of processes

SEVEN_B = {"hidden": 4096, "layers": 32, "kv": 1024, "ffn": 14336, "vocabulary": 128256}
ROLLOUTS, SECONDS_A_PROMPT = 16, 0.70  # of a GPU in an iteration; what the design asks of one H200 for all of it
WORK = Work(scoring=4, rewards=2, updates=4)  # micro-batches of at most 16384 tokens: 4 minibatches, each with one


def seven_b() -> tuple[Sizes, Sizes]:
    """Policy and critic in bfloat16, gradients reduced in float32."""
    h, kv, ffn = SEVEN_B["hidden"], SEVEN_B["kv"], SEVEN_B["ffn"]
    layer = 2 * h * h + 2 * h * kv + 3 * h * ffn + 2 * h
    rest = 2 * SEVEN_B["vocabulary"] * h + h
    critic_rest = SEVEN_B["vocabulary"] * h + 2 * h
    layers = 2 * SEVEN_B["layers"] * layer
    return Sizes(layers, 2 * rest, 2.0), Sizes(layers, 2 * critic_rest, 2.0)


def modelled(gpus: int, shard_size: int) -> dict[str, float]:
    """Bytes that come to each GPU in an iteration, those of them that pass its network adapter, and how long they take
    if nothing hides them.

    Where `shard_size` GPUs share a copy of the weights, gradients are summed over the copies too, each GPU its part.
    """
    phases = predicted(*seven_b(), WORK).values()
    moved = [traffic(payload, gpus, shard_size, USUAL) for payload in phases]
    seconds = sum(each.seconds(chip("h200").link or 0.0, USUAL.network) for each in moved)
    return {
        "gpus": gpus,
        "shard_size": shard_size,
        "sent_GB": sum(each.received for each in moved) / 1e9,
        "network_GB": sum(each.network for each in moved) / 1e9,
        "seconds": seconds,
        "share_of_target": seconds / (ROLLOUTS * SECONDS_A_PROMPT),
    }


def show(counted: dict[str, Any], models: list[dict[str, float]]) -> None:
    console = Console()
    title = f"Counted, {PROCESSES} processes, tiny model"
    table = Table("phase", "collective", "calls", "payload, KB", "predicted, KB", title=title)
    for row in counted["rows"]:
        expected = "" if row["predicted"] is None else f"{row['predicted'] / 1e3:.1f}"
        table.add_row(row["phase"], row["kind"], str(row["calls"]), f"{row['bytes'] / 1e3:.1f}", expected)
    console.print(table)
    heading = f"MODEL, not measured: 8.0B policy and critic, {ROLLOUTS} rollouts of 2048 tokens a GPU and iteration"
    columns = ("GPUs", "share a copy", "to each, GB", "by network, GB", "seconds", "of the target's time")
    table = Table(*columns, title=heading)
    for model in models:
        table.add_row(
            f"{model['gpus']:.0f}", f"{model['shard_size']:.0f}", f"{model['sent_GB']:.0f}",
            f"{model['network_GB']:.0f}", f"{model['seconds']:.1f}", f"{model['share_of_target']:.0%}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.found:
        count(arguments.found)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found"
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        subprocess.run([*line, __file__, "--found", str(found)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        counted = json.loads(found.read_text())
    models = [modelled(gpus, size) for gpus in (8, 16, 32, 64, 128, 256, 512) for size in sorted({USUAL.gpus, gpus})]
    show(counted, models)
    wrong = [row for row in counted["rows"] if row["predicted"] not in (None, row["bytes"])]
    if wrong:
        sys.exit(f"counted differs from predicted: {wrong}")
    if arguments.json:
        records.write(arguments.json, {**counted, "model": models, "environment": environment()})


if __name__ == "__main__":
    main()
