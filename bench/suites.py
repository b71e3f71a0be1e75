"""Which operations at which shapes: the reference shapes of a GPU, those the launch configurations go by, a CPU's."""

from __future__ import annotations

import ops_decode
import ops_head
import ops_tokens
import ops_update
import torch
from ops import Op

N, H, V = 8192, 4096, 128256  # tokens, hidden, vocabulary
BF16, FP32 = torch.bfloat16, torch.float32


def reference(device: str, *, quick: bool = False) -> list[Op]:
    n, h, v = (1024, 1024, 32000) if quick else (N, H, V)
    return [
        *ops_head.from_logits(n, v, BF16, device),
        *ops_head.cross_entropy_from_logits(n, v, BF16, device),
        *ops_head.linear_logprobs(n, h, v, BF16, device),
        *ops_head.linear_cross_entropy(n, h, v, BF16, device),
        *ops_head.linear_ppo(n, h, v, BF16, device),
        *ops_tokens.ppo_loss(n * 128, device),
        *ops_tokens.gae(64, n, device),
        *ops_tokens.shaped_gae(64, n, device),
        *ops_tokens.kl_penalty(n * 128, device),
        *ops_tokens.masked_whiten(n * 128, device),
        *ops_decode.sample(256, v, BF16, device),
        *ops_decode.paged_attention(64, n // 2, 1, BF16, device),
        *ops_decode.paged_attention(8, n // 2, 512, BF16, device),
        *ops_decode.write_kv(n, BF16, device),
        *(op for eight_bit in (False, True) for op in ops_update.adamw(n << 13, device, eight_bit=eight_bit)),
    ]


def configured(device: str) -> list[Op]:
    """The reference shapes and smaller ones: every entry of configs.json is launched with by some of them."""
    return [
        *reference(device),
        *ops_head.from_logits(N, 4096, BF16, device),
        *ops_head.from_logits(16, V, BF16, device)[:1],
        *ops_head.linear_ppo(N, 1024, 4096, BF16, device)[:1],
        *(op for length in (2048, 1024, 512) for op in ops_tokens.gae(N * 64 // length, length, device)),
        *(op for length in (2048, 1024, 512) for op in ops_tokens.shaped_gae(N * 64 // length, length, device)),
        *ops_head.linear_ppo_options(N, H, V, BF16, device),
        *ops_tokens.policy_loss_options(N * 128, device),
        *ops_tokens.shaped_gae(64, N, device, masked=True),
        *ops_tokens.masked_whiten(N * 128, device, sequences=512),
        *ops_decode.paged_attention(4, 8192, 1, BF16, device),
        *ops_decode.paged_attention(64, 4096, 1, BF16, device, width=256),
        *ops_decode.paged_attention(64, 4096, 1, FP32, device, width=256),
        *ops_decode.paged_attention(64, 4096, 16, BF16, device),
        *ops_decode.paged_attention(8, 4096, 512, BF16, device, width=256),
        *ops_decode.write_kv(N, BF16, device, heads=1),
        *ops_decode.sample(256, 4096, BF16, device),
        *ops_decode.sample(64, V, BF16, device, penalty=1.1),
    ]


def cpu(*, quick: bool = False, full: bool = False) -> list[Op]:
    """Each operation at a size for one thread; `full` adds the LM head of a vocabulary of 128256."""
    n, h, v = (64, 32, 1000) if quick else (1024, 512, 32000)
    heads = [*ops_head.linear_cross_entropy(2 * n, h, v, FP32, "cpu")]
    if full:
        heads += [op._replace(least=3) for op in ops_head.linear_cross_entropy(2 * n, h, V, FP32, "cpu")]
    return [
        *ops_head.from_logits(n // 4, v, FP32, "cpu"),
        *ops_head.cross_entropy_from_logits(n // 4, v, FP32, "cpu"),
        *ops_head.linear_logprobs(n, h, v, FP32, "cpu"),
        *heads,
        *ops_head.linear_ppo(n, h, v, FP32, "cpu"),
        *(op for length in ((n,) if quick else (512, 2048, 8192)) for op in ops_tokens.gae(64, length, "cpu")),
        *ops_tokens.shaped_gae(64, 2 * n, "cpu"),
        *ops_tokens.ppo_loss(n * 1024, "cpu"),
        *ops_tokens.kl_penalty(n * 1024, "cpu"),
        *ops_tokens.masked_whiten(n * 1024, "cpu"),
        *ops_decode.sample(n // 32, v, FP32, "cpu"),
        *ops_decode.paged_attention(n // 64, n, 1, FP32, "cpu"),
        *ops_decode.paged_attention(2, n, n // 8, FP32, "cpu"),
        *ops_decode.write_kv(2 * n, FP32, "cpu"),
        *(op for eight_bit in (False, True) for op in ops_update.adamw(n << 10, "cpu", eight_bit=eight_bit)),
    ]


def of(device: str, *, quick: bool = False, full: bool = False) -> list[Op]:
    return cpu(quick=quick, full=full) if device == "cpu" else reference(device, quick=quick)


def small(device: str) -> list[Op]:
    """Every operation at odd sizes: a moment's work even where each access is checked."""
    dtype = FP32 if device == "cpu" else BF16
    return [
        *ops_head.from_logits(5, 137, dtype, device),
        *ops_head.cross_entropy_from_logits(5, 137, dtype, device),
        *ops_head.linear_logprobs(6, 40, 137, dtype, device),
        *ops_head.linear_cross_entropy(6, 40, 137, dtype, device),
        *ops_head.linear_ppo(6, 40, 137, dtype, device),
        *ops_head.linear_ppo_options(6, 40, 137, dtype, device),
        *ops_tokens.ppo_loss(51, device),
        *ops_tokens.policy_loss_options(51, device),
        *ops_tokens.gae(3, 17, device),
        *ops_tokens.shaped_gae(3, 17, device),
        *ops_tokens.shaped_gae(3, 17, device, masked=True),
        *ops_tokens.kl_penalty(51, device),
        *ops_tokens.masked_whiten(51, device),
        *ops_tokens.masked_whiten(51, device, sequences=3),
        *ops_decode.sample(4, 137, dtype, device),
        *ops_decode.sample(4, 137, dtype, device, penalty=1.3),
        *ops_decode.paged_attention(2, 48, 1, dtype, device),
        *ops_decode.paged_attention(2, 48, 5, dtype, device),
        *ops_decode.write_kv(16, dtype, device),
        *(op for eight_bit in (False, True) for op in ops_update.adamw(601, device, eight_bit=eight_bit)),
    ]
