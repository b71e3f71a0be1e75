"""A few PPO steps of TRL 1.12's own trainer on tiny random models, with our log-probs and whitening in it; on a CPU.

    python -m venv .venv-trl && .venv-trl/bin/pip install . trl==1.12.0
    .venv-trl/bin/python bench/examples/trl_ppo.py [--plain]

`--plain` leaves TRL as it is: the same seed gives the same metrics up to rounding.
"""

from __future__ import annotations

import argparse
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from ppomax.kernels.adapters import trl as adapter
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

STEPS, BATCH, VOCABULARY = 3, 8, 97


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
    )


def trainer(out: str) -> PPOTrainer:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    prompts = Dataset.from_dict({"input_ids": torch.randint(2, VOCABULARY, (STEPS * BATCH, 6)).tolist()})
    arguments = PPOConfig(
        output_dir=out, total_episodes=STEPS * BATCH, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
        num_mini_batches=2, num_ppo_epochs=2, response_length=12, stop_token="eos", learning_rate=1e-3, logging_steps=1,
        num_sample_generations=0, report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    return PPOTrainer(
        arguments,
        tokenizer(),
        model=LlamaForCausalLM(config),
        ref_model=LlamaForCausalLM(config),
        reward_model=LlamaForSequenceClassification(config),
        value_model=LlamaForSequenceClassification(config),
        train_dataset=prompts,
        eval_dataset=prompts,
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
    shown = ("objective/kl", "objective/rlhf_reward", "loss/policy_avg", "loss/value_avg", "val/ratio")
    for line in run.state.log_history:
        print(" ".join(f"{name} {line[name]:.6f}" for name in shown))


if __name__ == "__main__":
    main()
