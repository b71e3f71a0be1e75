"""One PPO iteration beside TRL 1.12's PPOTrainer on a CPU: same tiny models, same prompts, same response lengths.

TRL is no dependency. In an environment of its own:

    python -m venv .venv-trl && .venv-trl/bin/pip install . trl==1.12.0
    .venv-trl/bin/python bench/vs_trl.py --json bench/results/vs_trl.json

Policy, reference, critic and reward model are Llamas (H 256, 4 layers) of random weights; an iteration samples 32
responses, scores them with all four models and makes 4 optimizer steps of policy and critic. Each measurement is a
process of its own with one thread: iterations after the first are timed, and the peak of resident memory is taken
above what the loaded models held. Processes of the two alternate. A response's length is scripted in both, as its end
token; equal: 64 tokens each, mixed: 8 to 512, log-normal (median 48, sigma 1). In the lean case both compute the
activations of decoder layers again instead of keeping them, and the KV cache's memory is given back during updates.

Resident memory counts what malloc keeps between blocks, as well as tensors; how much that is differs from process to
process, so the file has the peak of each and the table the largest. There is little of it, on both sides, with
MALLOC_MMAP_THRESHOLD_=131072 in the environment: memory without holes, at times that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import records
import torch
from environment import environment
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

ROLLOUTS, MINIBATCH, PROMPT, EOS, PAD = 32, 8, 32, 1, 0


class Case(NamedTuple):
    vocab: int
    longest: int  # response
    epochs: int = 1
    mixed: bool = False  # lengths
    lean: bool = False


CASES = {
    "equal lengths": Case(4096, 64),
    "equal lengths, 4 epochs": Case(4096, 64, epochs=4),
    "mixed lengths": Case(4096, 512, mixed=True),
    "vocabulary of 32,000": Case(32_000, 64),
    "vocabulary of 32,000, lean": Case(32_000, 64, lean=True),
}


def response_lengths(case: str, iterations: int) -> list[list[int]]:
    """Per iteration the lengths of its responses, end token included."""
    longest, generator = CASES[case].longest, np.random.default_rng(0)
    if not CASES[case].mixed:
        return [[longest] * ROLLOUTS] * iterations
    drawn = np.clip(np.exp(generator.normal(np.log(48), 1.0, (iterations, ROLLOUTS))), 8, longest)
    return drawn.astype(int).tolist()


def prompts_of(case: str, iterations: int) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return generator.integers(2, CASES[case].vocab, (iterations * ROLLOUTS, PROMPT)).tolist()


def model_config(case: str) -> LlamaConfig:
    longest = CASES[case].longest
    return LlamaConfig(
        vocab_size=CASES[case].vocab, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=PROMPT + longest, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=PAD, num_labels=1,
    )  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_ppomax(case: str, iterations: int) -> dict[str, Any]:
    from ppomax.engine.attention import ATTENTION
    from ppomax.engine.batch import Prompt
    from ppomax.engine.config import PPOConfig, from_dict
    from ppomax.engine.layers import LayerOptions, prepare_layers
    from ppomax.engine.models import CausalModel, ScalarModel
    from ppomax.engine.ppo import PPO

    _, longest, epochs, _, lean = CASES[case]
    config = model_config(case)
    config._attn_implementation = ATTENTION
    policy, reference = (CausalModel(LlamaForCausalLM(config)) for _ in range(2))
    critic, reward = (ScalarModel(LlamaForSequenceClassification(config)) for _ in range(2))
    if lean:
        for trained in (policy, critic):
            prepare_layers(trained.model, LayerOptions(checkpointing="layer"))
    settings = {
        "iterations": iterations, "rollouts_per_iteration": ROLLOUTS, "minibatch_size": MINIBATCH,
        "ppo_epochs": epochs, "max_sequence": PROMPT + longest, "micro_batch_tokens": 2048,
        "rollout": {"max_response": longest, "max_running": ROLLOUTS, "temperature": 1.0, "top_p": 1.0,
                    "repetition_penalty": 1.0, "sleep": lean},
    }  # fmt: skip
    prompts = [Prompt([], tokens) for tokens in prompts_of(case, iterations)]

    def score(_: Any, rollouts: Any) -> torch.Tensor:
        from ppomax.engine.batch import pack_rollouts

        with torch.no_grad():
            return reward.scores(pack_rollouts(rollouts, reward.device))

    ppo = PPO(from_dict(PPOConfig, settings), policy, reference, critic, score, prompts, stop_tokens=[EOS])
    lengths = iter(response_lengths(case, iterations))
    collect = ppo.engine.collect
    ppo.engine.collect = lambda requests, enough: collect(  # type: ignore[method-assign]
        [replace(r, limit=n) for r, n in zip(requests, next(lengths), strict=True)], enough
    )
    loaded, seconds, phases = resident(), [], []
    for _ in range(iterations):
        started = time.perf_counter()
        metrics = ppo.iterate()
        seconds.append(time.perf_counter() - started)
        phases.append({name: metrics[f"time/{name}"] for name in ("rollout", "score", "update")})
    return {"seconds": seconds[1:], "phases": phases[1:], "loaded": loaded, "above": peak() - loaded}


def run_trl(case: str, iterations: int) -> dict[str, Any]:
    import tempfile

    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    _, longest, epochs, _, lean = CASES[case]
    lengths = iter(response_lengths(case, iterations))

    class ScriptedEnd(LogitsProcessor):
        def __init__(self, ends: list[int]) -> None:
            self.ends = torch.tensor(ends)

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            ending = input_ids.shape[1] - PROMPT == self.ends - 1
            scores = scores.clone()
            scores[:, EOS] = torch.where(ending, 1e4, -1e4)
            scores[:, PAD] = -1e4
            return scores

    class Scripted(LlamaForCausalLM):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            script = LogitsProcessorList([ScriptedEnd(next(lengths))])
            return super().generate(*args, logits_processor=script, **kwargs)

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    config = model_config(case)
    policy, reference = Scripted(config), LlamaForCausalLM(config)
    critic, reward = (LlamaForSequenceClassification(config) for _ in range(2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")),
        pad_token="<pad>", eos_token="</s>", padding_side="left",
    )  # fmt: skip
    dataset = Dataset.from_dict({"input_ids": prompts_of(case, iterations)})
    with tempfile.TemporaryDirectory() as out:
        arguments = PPOConfig(
            output_dir=out, per_device_train_batch_size=ROLLOUTS, gradient_accumulation_steps=1,
            num_mini_batches=ROLLOUTS // MINIBATCH, num_ppo_epochs=epochs, total_episodes=iterations * ROLLOUTS,
            local_rollout_forward_batch_size=ROLLOUTS, response_length=longest, stop_token="eos", temperature=1.0,
            num_sample_generations=0, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
            gradient_checkpointing=lean, bf16=False,
        )  # fmt: skip
        trainer = PPOTrainer(
            arguments, tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=critic,
            train_dataset=dataset, eval_dataset=dataset, callbacks=[Clock()],
        )  # fmt: skip
        loaded = resident()
        trainer.train()
    return {"seconds": np.diff(marks).tolist(), "loaded": loaded, "above": peak() - loaded}


def measured(engine: str, case: str, iterations: int) -> dict[str, Any]:
    """One process of its own."""
    command = [sys.executable, __file__, "--worker", engine, "--case", case, "--iterations", str(iterations)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(case: str, iterations: int, rounds: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """(figures, milliseconds of each timed iteration, those of all rounds one after the other)."""
    runs: dict[str, list[dict[str, Any]]] = {"ppomax": [], "trl": []}
    for _ in range(rounds):
        for engine, results in runs.items():
            results.append(measured(engine, case, iterations))
    seconds = {k: [median(r["seconds"]) for r in v] for k, v in runs.items()}
    peaks = {k: [r["above"] for r in v] for k, v in runs.items()}
    above = {k: max(v) for k, v in peaks.items()}
    phases = {
        name: median(p[name] for r in runs["ppomax"] for p in r["phases"]) for name in runs["ppomax"][0]["phases"][0]
    }
    figures = {
        "seconds": seconds,
        "speedup": median(t / p for p, t in zip(seconds["ppomax"], seconds["trl"], strict=True)),
        "peak_above_models": above,
        "peaks_above_models": peaks,
        "memory_ratio": above["ppomax"] / above["trl"],
        "phases": phases,
    }
    return figures, {k: [1e3 * s for r in v for s in r["seconds"]] for k, v in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--iterations", type=int, default=4, help="of which the first is not timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=("ppomax", "trl"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        torch.manual_seed(0)
        run = run_ppomax if arguments.worker == "ppomax" else run_trl
        print(json.dumps(run(arguments.case[0], arguments.iterations)))
        return
    found = {case: compare(case, arguments.iterations, arguments.rounds) for case in arguments.case}
    cases = {case: figures for case, (figures, _) in found.items()}
    table = Table(
        "case", "ppomax, s", "TRL, s", "times as fast", "memory: ppomax", "TRL", "of TRL's", title="one iteration"
    )
    for case, r in cases.items():
        s, m = {k: median(v) for k, v in r["seconds"].items()}, r["peak_above_models"]
        table.add_row(
            case, f"{s['ppomax']:.2f}", f"{s['trl']:.2f}", f"{r['speedup']:.2f}", f"{m['ppomax'] / 2**20:.0f} MiB",
            f"{m['trl'] / 2**20:.0f} MiB", f"{r['memory_ratio']:.2f}",
        )  # fmt: skip
    Console().print(table)
    if arguments.json:
        samples = {f"iteration, {case}": times for case, (_, times) in found.items()}
        records.write(arguments.json, {"environment": environment(), "cases": cases, "samples_ms": samples})


if __name__ == "__main__":
    main()
