"""A few PPO steps of torchtune 0.6 on tiny random models, with our loss, advantages and log-probs; on a CPU.

    python -m venv .venv-torchtune && .venv-torchtune/bin/pip install . torchtune==0.6.1 torchao==0.11.0
    .venv-torchtune/bin/python bench/examples/torchtune_ppo.py [--plain]

The steps are those of torchtune's recipe `ppo_full_finetune_single_device`, on its models, generation, rewards and
trajectories; the recipe itself wants a checkpoint. `--plain` leaves torchtune as it is: the same seed gives the same
losses up to rounding (the mean ratio apart, which torchtune takes over padding too). The reward is the share of even
tokens.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from ppomax.kernels.adapters import torchtune as adapter
from torch import Tensor
from torchtune import rlhf
from torchtune.generation import generate
from torchtune.models.llama2 import llama2, llama2_classifier
from torchtune.modules import TransformerDecoder
from torchtune.rlhf import loss as losses

STEPS, BATCH, PROMPT, RESPONSE, VOCABULARY, EOS = 3, 8, 6, 12, 97, 1
SIZES = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": PROMPT + RESPONSE}


class Rollouts(NamedTuple):
    """Prompts and responses [B, S], the rest [B, RESPONSE]; masks True = keep."""

    tokens: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    mask: Tensor
    value_mask: Tensor


def outputs(policy: TransformerDecoder, critic: TransformerDecoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs of the responses, values before each of their tokens)."""
    responses = tokens[:, PROMPT:]
    logits = rlhf.truncate_sequence_for_logprobs(policy(tokens), PROMPT)
    values = rlhf.truncate_sequence_for_logprobs(critic(tokens), PROMPT).squeeze(-1)
    return rlhf.logits_to_logprobs(logits, responses), values


@torch.no_grad()
def collect(policy: TransformerDecoder, reference: TransformerDecoder, critic: TransformerDecoder) -> Rollouts:
    prompts = torch.randint(2, VOCABULARY, (BATCH, PROMPT))
    tokens, _ = generate(policy, prompts, max_generated_tokens=RESPONSE, pad_id=0)
    padding, responses = rlhf.truncate_sequence_at_first_stop_token(tokens[:, PROMPT:], torch.tensor([EOS]))
    tokens = torch.cat([prompts, responses], 1)
    last = (~padding).sum(1) - 1
    after = torch.where(padding.any(1), last + 1, last)
    value_padding = padding.scatter(1, after[:, None], False)
    logprobs, values = outputs(policy, critic, tokens)
    ref_logprobs, _ = outputs(reference, critic, tokens)
    logprobs, ref_logprobs = logprobs.masked_fill(padding, 1.0), ref_logprobs.masked_fill(padding, 1.0)
    values = values.masked_fill(value_padding, 0.0)
    scores = ((responses % 2 == 0) & ~padding).sum(1) / (~padding).sum(1)
    rewards, _, _ = rlhf.get_rewards_ppo(scores, logprobs, ref_logprobs, 0.05, after)
    advantages, returns = rlhf.estimate_advantages(values, rewards, 1.0, 0.95, masks=~padding)
    return Rollouts(tokens, logprobs, values, advantages, returns, ~padding, ~value_padding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true")
    if not parser.parse_args().plain:
        print("replaced:", *adapter.install(), sep="\n  ")
    torch.manual_seed(0)
    policy, reference = (llama2(vocab_size=VOCABULARY, **SIZES) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    critic = llama2_classifier(num_classes=1, vocab_size=VOCABULARY, **SIZES)
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=1e-3)
    loss_fn = losses.PPOLoss(epsilon=0.2, value_clip_range=0.2, value_coeff=0.1)
    for _ in range(STEPS):
        batch = collect(policy, reference, critic)
        for _ in range(2):
            logprobs, values = outputs(policy, critic, batch.tokens)
            logprobs = logprobs.masked_fill(~batch.mask, 1.0)
            values = values.masked_fill(~batch.value_mask, 0.0)
            loss, policy_loss, value_loss, ratio, clipfrac = loss_fn(
                batch.logprobs, logprobs, batch.advantages, batch.values, values, batch.returns, batch.mask,
                batch.value_mask,
            )  # fmt: skip
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"policy {policy_loss:.6f} value {value_loss:.6f} ratio {ratio:.6f} clipped {clipfrac:.4f}")


if __name__ == "__main__":
    main()
