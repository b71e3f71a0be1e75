"""A few GRPO steps of a current TRL on a tiny random model, with our log-probs and entropy in it; on a CPU.

    python -m venv .venv-trl && .venv-trl/bin/pip install . trl
    .venv-trl/bin/python bench/examples/trl_grpo.py [--plain]

`--plain` leaves TRL as it is: the same seed gives the same losses up to rounding.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from ppomax.kernels.adapters import trl as adapter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

STEPS, GROUP, VOCABULARY = 3, 4, 97


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", padding_side="left")


def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def trainer(out: str) -> GRPOTrainer:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    prompts = [" ".join(f"w{i}" for i in row) for row in torch.randint(2, VOCABULARY, (2 * STEPS, 6)).tolist()]
    arguments = GRPOConfig(
        output_dir=out, max_steps=STEPS, per_device_train_batch_size=2 * GROUP, num_generations=GROUP,
        max_completion_length=12, learning_rate=1e-3, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    return GRPOTrainer(
        model=LlamaForCausalLM(config),
        reward_funcs=even_tokens,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true")
    plain = parser.parse_args().plain
    if not plain:
        print("replaced:", *adapter.install(), sep="\n  ")
    set_seed(0)
    with tempfile.TemporaryDirectory() as out:
        run = trainer(out)
        run.train()
    for line in run.state.log_history:
        if "loss" in line:
            print(" ".join(f"{name} {line[name]:.6f}" for name in ("reward", "loss", "entropy", "grad_norm")))


if __name__ == "__main__":
    main()
