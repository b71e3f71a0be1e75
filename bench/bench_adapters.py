"""The adapters' functions beside those they stand for, on a CPU with one thread: milliseconds and peak memory.

    python bench/bench_adapters.py [--json bench/results/adapters_cpu.json] [--only NAME ...] [--samples 15]

Measured is every trainer that this environment can import; the others' figures in the JSON file are left as they are,
so that one file collects several environments. The trainers are no dependencies: TRL 1.12 and torchtune 0.6.1 (with
torchao 0.11), a current TRL, and verl 0.9.1 each want an environment of their own.

Functions of per-token tensors run on [128, 4096], those of logits on 1024 rows and a vocabulary of 32,000, LM heads on
as many rows of 512; with gradients where the trainer takes them. Results are held against each other first. Samples
of both alternate; figures are medians. Memory is the rise of resident memory beside the inputs, gradients included.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import records
import torch
from environment import environment
from ppomax.kernels.adapters import torchtune, trl, verl
from rich.console import Console
from rich.table import Table
from timing import cpu_peak, cpu_times, relative_error
from torch import Tensor

B, T, ROWS, WIDTH, VOCABULARY = 128, 4096, 1024, 512, 32_000
TOLERANCE = 1e-5
Call = Callable[[Any], Sequence[Tensor]]  # of the module that has the function


class Case(NamedTuple):
    """A function by name, and how it is called on a module that has it: (results, gradients)."""

    name: str
    call: Call


def with_gradients(outputs: Any, *leaves: Tensor) -> list[Tensor]:
    """The results and the gradients of their sum."""
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), leaves)
    return [*(x.detach() for x in outputs), *gradients]


def tokens() -> dict[str, Tensor]:
    """Per-token fields [B, T], the mask among them."""
    new, values = -3 * torch.rand(B, T), torch.randn(B, T)
    return {
        "new": new.requires_grad_(),
        "old": (new + 0.3 * torch.randn(B, T)).detach(),
        "values": values.requires_grad_(),
        "old_values": (values + 0.3 * torch.randn(B, T)).detach(),
        "returns": torch.randn(B, T),
        "rewards": torch.randn(B, T),
        "advantages": torch.randn(B, T),
        "mask": (torch.arange(T) < torch.randint(T // 8, T, (B, 1))),
    }


def rows() -> tuple[Tensor, Tensor]:
    """(logits [4, ROWS / 4, V], labels)."""
    return torch.randn(4, ROWS // 4, VOCABULARY).requires_grad_(), torch.randint(0, VOCABULARY, (4, ROWS // 4))


def head() -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, labels)."""
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, VOCABULARY, (ROWS,))


def trl_cases(has: Callable[[str], bool]) -> Iterator[Case]:
    f, (logits, labels) = tokens(), rows()
    if has("masked_whiten"):
        yield Case("masked_whiten", lambda m: [m.masked_whiten(f["returns"], f["mask"]) * f["mask"]])
    yield Case("selective_log_softmax", lambda m: with_gradients(m.selective_log_softmax(logits, labels), logits))
    yield Case("entropy_from_logits, no gradient", lambda m: [m.entropy_from_logits(logits.detach())])
    if has("selective_log_softmax_and_entropy"):
        name = "selective_log_softmax_and_entropy"
        yield Case(name, lambda m: with_gradients(m.selective_log_softmax_and_entropy(logits, labels), logits))
    if has("ChunkedLogProbFunction"):
        hidden, weight, targets = head()
        arguments = (hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ("log_probs", "entropy"))
        yield Case(
            "ChunkedLogProbFunction",
            lambda m: with_gradients(m.ChunkedLogProbFunction.apply(*arguments), hidden, weight),
        )


def torchtune_cases(has: Callable[[str], bool]) -> Iterator[Case]:
    f, (logits, labels) = tokens(), rows()

    def loss(m: Any) -> list[Tensor]:
        order = ("old", "new", "advantages", "old_values", "values", "returns", "mask", "mask")
        total = m.PPOLoss()(*(f[name] for name in order))[0]
        return with_gradients(total, f["new"], f["values"])

    yield Case("PPOLoss", loss)
    values = f["values"].detach()
    yield Case("estimate_advantages", lambda m: m.estimate_advantages(values, f["rewards"], 1.0, 0.95, f["mask"]))
    yield Case("logits_to_logprobs", lambda m: with_gradients(m.logits_to_logprobs(logits, labels), logits))


def verl_cases(has: Callable[[str], bool]) -> Iterator[Case]:
    f, (logits, labels), (hidden, weight, targets) = tokens(), rows(), head()
    config = verl_config()

    def policy(m: Any) -> list[Tensor]:
        loss, _ = m.compute_policy_loss_vanilla(f["old"], f["new"], f["advantages"], f["mask"], config=config)
        return with_gradients(loss, f["new"])

    def value(m: Any) -> list[Tensor]:
        loss, _ = m.compute_value_loss(f["values"], f["returns"], f["old_values"], f["mask"], 0.2)
        return with_gradients(loss, f["values"])

    def advantages(m: Any) -> list[Tensor]:
        mask = f["mask"].float()
        return [x * mask for x in m.compute_gae_advantage_return(f["rewards"], f["old_values"], mask, 1.0, 0.95)]

    yield Case("compute_policy_loss_vanilla", policy)
    yield Case("compute_value_loss", value)
    yield Case("compute_gae_advantage_return", advantages)
    yield Case("kl_penalty", lambda m: with_gradients(m.kl_penalty(f["new"], f["old"], "k3"), f["new"]))
    mode = "seq-mean-token-mean"
    yield Case("agg_loss", lambda m: with_gradients(m.agg_loss(f["new"], f["mask"], mode), f["new"]))
    yield Case("logprobs_from_logits", lambda m: with_gradients(m.logprobs_from_logits(logits, labels, False), logits))
    yield Case("entropy_from_logits", lambda m: with_gradients(m.entropy_from_logits(logits), logits))
    yield Case(
        "FusedLinearForPPO", lambda m: with_gradients(m.FusedLinearForPPO()(hidden, weight, targets), hidden, weight)
    )


def verl_config() -> Any:
    class Config(SimpleNamespace):
        def get(self, name: str, default: Any) -> Any:
            return getattr(self, name, default)

    return Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, clip_ratio_c=3.0, global_batch_info={})


class Peer(NamedTuple):
    ours: ModuleType
    modules: tuple[str, ...]  # where the trainer has its functions
    cases: Callable[[Callable[[str], bool]], Iterator[Case]]


PEERS = {
    "trl": Peer(trl, ("trl.kernels", "trl.trainer.utils", "trl.experimental.ppo.ppo_trainer"), trl_cases),
    "torchtune": Peer(torchtune, ("torchtune.rlhf", "torchtune.rlhf.loss"), torchtune_cases),
    "verl": Peer(
        verl,
        ("verl.trainer.ppo.core_algos", "verl.utils.torch_functional", "verl.utils.experimental.torch_functional"),
        verl_cases,
    ),
}


def functions_of(modules: Sequence[str]) -> SimpleNamespace | None:
    """The names of those of the modules that can be imported; None where none can. Later modules win."""
    found: dict[str, Any] = {}
    for name in modules:
        try:
            found |= vars(import_module(name))
        except ImportError:
            continue
    return SimpleNamespace(**found) if found else None


def measured(case: Case, theirs: Any, ours: Any, samples: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """(figures, milliseconds of each sample)."""
    errors = [relative_error(x, y) for x, y in zip(case.call(ours), case.call(theirs), strict=True)]
    if not max(errors) <= TOLERANCE:
        raise SystemExit(f"{case.name}: ours and theirs differ by {max(errors):.1e}")
    runs = {"ppomax": lambda: case.call(ours), "peer": lambda: case.call(theirs)}
    times = cpu_times(runs, samples)
    ms = {name: median(values) for name, values in times.items()}
    peak = {name: median(cpu_peak(run) for _ in range(3)) for name, run in runs.items()}
    return {"ms": ms, "peak_bytes": peak, "difference": max(errors)}, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="functions whose name contains these")
    parser.add_argument("--samples", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, peer in PEERS.items():
        theirs = functions_of(peer.modules)
        if theirs is None:
            continue
        torch.manual_seed(0)
        functions: dict[str, Any] = {}
        samples: dict[str, dict[str, list[float]]] = {}
        results[f"{name} {metadata.version(name)}"] = {
            "environment": environment(), "functions": functions, "samples_ms": samples,
        }  # fmt: skip
        for case in peer.cases(lambda function, theirs=theirs: hasattr(theirs, function)):
            if any(part in case.name for part in arguments.only):
                functions[case.name], samples[case.name] = measured(case, theirs, peer.ours, arguments.samples)
    show(results)
    if arguments.json:
        before = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        records.write(arguments.json, before | results)


def show(results: dict[str, Any]) -> None:
    table = Table("function", "ours, ms", "theirs, ms", "times as fast", "ours, MiB", "theirs, MiB", "of theirs")
    for peer, entry in results.items():
        table.add_section()
        table.add_row(f"[bold]{peer}")
        for name, r in entry["functions"].items():
            (ours, theirs), (held, taken) = r["ms"].values(), (x / 2**20 for x in r["peak_bytes"].values())
            cells = f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}", f"{held:.1f}", f"{taken:.1f}"
            table.add_row(name, *cells, f"{held / taken:.2f}" if taken else "-")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
