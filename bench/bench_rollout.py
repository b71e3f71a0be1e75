"""Tokens per second of the rollout engine against Hugging Face `generate`: same model, same prompts, same lengths.

    python bench/bench_rollout.py [--device cpu] [--rounds 3] [--prompts 256] [--json bench/results/rollout_cpu.json]

Each response has its own length, drawn once from a log-normal distribution (median 48, sigma 1) between 8 and 512:
a scripted end, the same in both. `generate` takes the prompts in batches of as many rows as the engine has slots,
padded on the left; a batch lasts until its longest row is done. Rounds alternate between the two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import records
import torch
from environment import environment
from ppomax.engine.attention import ATTENTION
from ppomax.engine.batch import Request
from ppomax.engine.config import RolloutConfig
from ppomax.engine.models import CausalModel
from ppomax.engine.rollout import RolloutEngine
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

PROMPTS, SLOTS, SHORTEST, LONGEST, PAD, EOS = 256, 32, 8, 512, 0, 1
SHAPE = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
    "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip


class ScriptedEnd(LogitsProcessor):
    """Row r draws EOS as its `lengths[r]`-th token and never before."""

    def __init__(self, prompt_width: int, lengths: list[int]) -> None:
        self.width, self.lengths = prompt_width, torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = input_ids.shape[1] - self.width == self.lengths.to(scores.device) - 1
        scores[:, [PAD, EOS]] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, EOS] = 0.0
        return scores


def draw_work(count: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Prompts of 16 to 64 tokens, and the length of each response."""
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(2, 4096, generator.integers(16, 65)).tolist() for _ in range(count)]
    lengths = np.clip(np.exp(generator.normal(np.log(48), 1.0, count)), SHORTEST, LONGEST)
    return prompts, [int(length) for length in lengths]


def ours(model: LlamaForCausalLM, prompts: list[list[int]], lengths: list[int]) -> Callable[[], int]:
    """A function that answers all prompts and returns the number of tokens drawn."""
    model.set_attn_implementation(ATTENTION)
    config = RolloutConfig(max_response=LONGEST, max_running=SLOTS, temperature=1.0, top_p=1.0, repetition_penalty=1.0)
    engine = RolloutEngine(CausalModel(model), config, [], max_prompt=64)
    work = list(zip(prompts, lengths, strict=True))
    requests = [Request(prompt, seed, limit=length) for seed, (prompt, length) in enumerate(work)]

    def run() -> int:
        model.set_attn_implementation(ATTENTION)
        return sum(len(rollout.response) for _, rollout in engine.stream(requests))

    return run


def hugging_face(model: LlamaForCausalLM, prompts: list[list[int]], lengths: list[int]) -> Callable[[], int]:
    """The same by `generate` in batches of SLOTS prompts."""

    def batch(start: int) -> int:
        chosen, ends = prompts[start : start + SLOTS], lengths[start : start + SLOTS]
        width = max(map(len, chosen))
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in chosen], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chosen], device=model.device)
        script = LogitsProcessorList([ScriptedEnd(width, ends)])
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=LONGEST, logits_processor=script,
        )  # fmt: skip
        drawn = (out[:, width:] != PAD).sum(1).tolist()
        assert drawn == ends, "every row ends where the script says"
        return sum(drawn)

    def run() -> int:
        model.set_attn_implementation("sdpa")
        return sum(batch(start) for start in range(0, len(prompts), SLOTS))

    return run


def title(prompts: int) -> str:
    return f"rollouts, {prompts} prompts, {SLOTS} slots"


def timed(function: Callable[[], int], device: torch.device) -> tuple[float, int]:
    started = time.perf_counter()
    tokens = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, tokens


def measure(device: torch.device, rounds: int, count: int = PROMPTS) -> dict[str, Any]:
    """Raises AssertionError where one of the two does not draw what the script says."""
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(device, dtype).eval()
    prompts, lengths = draw_work(count)
    runs = {"ppomax": ours(model, prompts, lengths), "transformers": hugging_face(model, prompts, lengths)}
    if device.type == "cuda":  # kernels are compiled, graphs captured and libraries set up before
        runs["ppomax"]()
        hugging_face(model, prompts[:1], lengths[:1])()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            elapsed, tokens = timed(run, device)
            assert tokens == sum(lengths), f"{name} drew {tokens} tokens, the script has {sum(lengths)}"
            seconds[name].append(elapsed)
    ratios = [theirs / mine for mine, theirs in zip(seconds["ppomax"], seconds["transformers"], strict=True)]
    return {
        "prompts": count, "slots": SLOTS, "tokens": sum(lengths), "longest": max(lengths), "model": SHAPE,
        "seconds": seconds, "tokens_per_second": {k: sum(lengths) / median(v) for k, v in seconds.items()},
        "speedup": median(ratios), "environment": environment(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    result = measure(torch.device(arguments.device), arguments.rounds, arguments.prompts)
    table = Table("", "tokens/s", "seconds of each round", title=f"{arguments.prompts} prompts, {SLOTS} slots")
    for name, rate in result["tokens_per_second"].items():
        table.add_row(name, f"{rate:,.0f}", " ".join(f"{s:.1f}" for s in result["seconds"][name]))
    Console().print(table)
    print(f"ppomax is {result['speedup']:.2f} times as fast (median over rounds)")
    if arguments.json:
        samples = {name: [1e3 * seconds for seconds in times] for name, times in result["seconds"].items()}
        records.write(arguments.json, result | {"samples_ms": {title(arguments.prompts): samples}})


if __name__ == "__main__":
    main()
