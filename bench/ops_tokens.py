"""Operations over per-token vectors."""

from __future__ import annotations

from typing import Any

import torch
from ops import Inputs, Op, Provider, Results, against, compiled, doubled, mapped, present, with_gradients
from ppomax.kernels import api
from ppomax.kernels.gae import gae_ref, shaped_gae_ref
from ppomax.kernels.kl import kl_penalty_ref
from ppomax.kernels.ppo_loss import policy_loss_ref, value_loss_ref
from torch import Tensor

CLIP, ENTROPY_COEF, KL_COEF, GAMMA, LAMBDA = 0.2, 0.01, 0.05, 0.99, 0.95


def column_loop(rewards: Tensor, values: Tensor) -> Results:
    """GAE as loops over time write it: one column of the batch after another."""
    advantages = torch.empty_like(values)
    carry = next_value = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        carry = delta + GAMMA * LAMBDA * carry
        advantages[:, t], next_value = carry, values[:, t]
    return advantages, advantages + values


def gae(batch: int, length: int, device: str) -> list[Op]:
    def inputs() -> Inputs:
        rewards, values = torch.randn(2, batch, length, device=device)
        return {"rewards": rewards, "values": values}

    def with_factors(function: Any) -> Provider:
        return lambda rewards, values: tuple(function(rewards, values, gamma=GAMMA, gae_lambda=LAMBDA))

    providers = {"ppomax": with_factors(api.gae), "column loop": column_loop}
    judge, moved = against(with_factors(gae_ref)), 16.0 * batch * length
    return [Op("gae", f"{batch} x {length}", inputs, providers, judge, 1e-5, moved, gate_ms=0.02)]


def shaped_gae(batch: int, length: int, device: str, *, masked: bool = False) -> list[Op]:
    """Packed sequences of equal length, KL penalty and scores included; beside the column loop where none is masked."""

    def inputs() -> Inputs:
        logprobs, ref_logprobs, values = torch.randn(3, batch * length, device=device)
        bounds = length * torch.arange(batch + 1, dtype=torch.int32, device=device)
        scores = torch.randn(batch, device=device)
        given = {"scores": scores, "logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
        mask = {"mask": torch.rand(batch * length, device=device) < 0.9} if masked else {}
        return {**given, "cu_seqlens": bounds, **mask}

    def with_factors(function: Any) -> Provider:
        return lambda **given: tuple(function(**given, kl_coef=KL_COEF, gamma=GAMMA, gae_lambda=LAMBDA))

    def eager(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, cu_seqlens: Tensor) -> Results:
        kl = logprobs - ref_logprobs
        rewards = (-KL_COEF * kl).view(batch, length)
        rewards[:, -1] += scores
        advantages, returns = (x.flatten() for x in column_loop(rewards, values.view(batch, length)))
        mean = advantages.mean()
        count = torch.full_like(mean, advantages.numel())
        return advantages, returns, rewards.flatten(), kl, count, mean, (advantages - mean).square().sum()

    providers = present(ppomax=with_factors(api.shaped_gae), column_loop=None if masked else eager)
    judge, moved = against(with_factors(shaped_gae_ref)), (28.0 + masked) * batch * length
    name = "shaped_gae with a mask" if masked else "shaped_gae"
    return [Op(name, f"{batch} x {length}", inputs, providers, judge, 1e-3, moved)]


def plain_ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    entropy: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
) -> Tensor:
    """The loss alone, without the statistics that ours returns."""
    ratio = torch.exp(logprobs - old_logprobs)
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    clipped = old_values + (values - old_values).clamp(-CLIP, CLIP)
    value = 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
    return ((policy - ENTROPY_COEF * entropy + value) * mask).sum() / mask.sum()


def ppo_loss(n: int, device: str) -> list[Op]:
    """Policy, value and entropy terms of n tokens with the gradients of log-probs, entropies and values."""
    names = ("logprobs", "old_logprobs", "advantages", "entropy", "values", "old_values", "returns")

    def inputs() -> Inputs:
        old, advantages, entropy, old_values, returns, *steps = torch.randn(7, n, device=device)
        rows = (old + 0.2 * steps[0], old, advantages, entropy.abs(), old_values + 0.2 * steps[1], old_values, returns)
        return {**dict(zip(names, rows, strict=True)), "mask": torch.rand(n, device=device) < 0.9}

    def ours(mask: Tensor, **given: Tensor) -> Tensor:
        return api.ppo_loss(**given, mask=mask, entropy_coef=ENTROPY_COEF).loss

    def exact(mask: Tensor, **given: Tensor) -> Tensor:
        policy = {name: given[name] for name in ("logprobs", "old_logprobs", "advantages", "entropy")}
        critic = {name: given[name] for name in ("values", "old_values", "returns")}
        loss = policy_loss_ref(**policy, mask=mask, entropy_coef=ENTROPY_COEF).loss
        return loss + value_loss_ref(**critic, mask=mask).loss

    leaves = ("logprobs", "entropy", "values")
    functions = present(ppomax=ours, torch_eager=plain_ppo, torch_compile=compiled(plain_ppo, device))
    providers = mapped(functions, lambda f: with_gradients(f, *leaves))
    judge = against(doubled(with_gradients(exact, *leaves)))
    return [Op("ppo_loss forward + backward", f"{n} tokens", inputs, providers, judge, 1e-4, 41.0 * n, gate_ms=0.015)]


def policy_loss_options(n: int, device: str) -> list[Op]:
    """The policy loss with everything that it may be asked for."""
    options: dict[str, Any] = {"dual_clip": 3.0, "entropy_coef": ENTROPY_COEF, "entropy_bound": 2.0, "kl_coef": KL_COEF,
                               "log_ratio_clamp": 20.0}  # fmt: skip

    def inputs() -> Inputs:
        old, advantages, entropy, ref, weights, step = torch.randn(6, n, device=device)
        mean, rstd = advantages.mean(), advantages.std().reciprocal()
        return {"logprobs": old + 0.2 * step, "old_logprobs": old, "advantages": advantages, "entropy": entropy.abs(),
                "ref_logprobs": old + 0.1 * ref, "importance_weights": weights.exp(), "mean": mean, "rstd": rstd,
                "mask": torch.rand(n, device=device) < 0.9}  # fmt: skip

    def loss(function: Any) -> Provider:
        def total(mean: Tensor, rstd: Tensor, **given: Tensor) -> Tensor:
            result: Tensor = function(**given, **options, whiten=(mean, rstd)).loss
            return result

        return with_gradients(total, "logprobs", "entropy")

    providers, judge = {"ppomax": loss(api.policy_loss)}, against(doubled(loss(policy_loss_ref)))
    return [Op("policy_loss with all options", f"{n} tokens", inputs, providers, judge, 1e-4, 33.0 * n)]


def kl_penalty(n: int, device: str) -> list[Op]:
    """The k3 estimate with its gradient."""

    def inputs() -> Inputs:
        logprobs, step, c = torch.randn(3, n, device=device)
        return {"logprobs": logprobs, "ref_logprobs": logprobs + 0.2 * step, "c": c}

    def eager(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
        d = logprobs - ref_logprobs
        return torch.expm1(-d) + d

    def loss(function: Any) -> Provider:
        def total(logprobs: Tensor, ref_logprobs: Tensor, c: Tensor) -> Tensor:
            return (function(logprobs, ref_logprobs, "k3") * c).sum()

        return with_gradients(total, "logprobs")

    functions = present(ppomax=api.kl_penalty, torch_eager=eager, torch_compile=compiled(eager, device))
    judge = against(doubled(loss(kl_penalty_ref)))
    return [Op("kl_penalty forward + backward", f"{n} tokens", inputs, mapped(functions, loss), judge, 1e-3, 28.0 * n)]


def masked_whiten(n: int, device: str, *, sequences: int | None = None) -> list[Op]:
    """Over all unmasked tokens, or over those of each of so many sequences; alone and with its gradient."""
    rows = 1 if sequences is None else sequences

    def inputs() -> Inputs:
        x, c = torch.randn(2, rows, n // rows, device=device)
        return {"x": x + 3, "c": c, "mask": torch.rand(rows, n // rows, device=device) < 0.9}

    def ours(x: Tensor, mask: Tensor) -> Tensor:
        if sequences is None:
            return api.masked_whiten(x, mask)
        ids = torch.arange(rows, device=x.device)[:, None]
        return api.masked_whiten(x, mask, segments=ids, num_segments=rows)

    def eager(x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum(1, keepdim=True)
        mean = torch.where(mask, x, 0.0).sum(1, keepdim=True) / count
        centred = torch.where(mask, x - mean, 0.0)
        return centred * torch.rsqrt(centred.square().sum(1, keepdim=True) / (count - 1) + 1e-8)

    def forward(function: Any) -> Provider:
        return torch.no_grad()(lambda x, c, mask: (function(x, mask),))

    def backward(function: Any) -> Provider:
        return with_gradients(lambda x, c, mask: (function(x, mask) * c).sum(), "x")

    functions = present(ppomax=ours, torch_eager=eager, torch_compile=compiled(eager, device))
    size = f"{n} tokens" if sequences is None else f"{n} tokens of {sequences} sequences"

    def op(name: str, provider: Any, moved: float) -> Op:
        judge = against(doubled(provider(eager)))
        return Op(f"masked_whiten {name}", size, inputs, mapped(functions, provider), judge, 1e-3, moved * n)

    return [op("forward", forward, 9.0), op("forward + backward", backward, 22.0)]
