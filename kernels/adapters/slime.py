"""slime: advantages, the reduction of the policy loss, and its per-token terms, under its names.

    --custom-advantage-function-path ppomax.kernels.adapters.slime.compute_advantages_and_returns
    --custom-pg-loss-reducer-function-path ppomax.kernels.adapters.slime.get_pg_loss_reducer
    --custom-megatron-init-path ppomax.kernels.adapters.slime.install  # compute_policy_loss, in place of slime's

Written from slime's interface of 2026. Sequences are lists of tensors [R_i], one per response, or their concatenation
[N]; masks 1 = keep. Without context parallelism: with it a rank holds slices, which raises here. What differs from
slime's numbers:

- The reducer takes the mean of each sample's own tokens, as slime's does unless several samples share a rollout.
  Masked positions may hold anything there, NaN included.
- The terms are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..api import Reduction, shaped_gae
from ..ppo_terms import PolicyInputs, PolicyOptions, clip_bounds, policy_terms
from ..reductions import loss_dtype
from .layout import aggregate
from .replace import Replacements


def compute_policy_loss(
    ppo_kl: Tensor, advantages: Tensor, eps_clip: float, eps_clip_high: float, eps_clip_c: float | None = None
) -> tuple[Tensor, Tensor]:
    """(clipped loss, 1 where the clip range holds it), per token; `ppo_kl` is old - new log-probs."""
    plain = PolicyOptions(eps_clip, eps_clip_high)
    dtype = loss_dtype(ppo_kl, advantages)
    log_ratio, advantages = -ppo_kl.to(dtype), advantages.detach().to(dtype)
    inputs = PolicyInputs(torch.zeros_like(log_ratio), advantages, None, None)
    terms, ratio = policy_terms(log_ratio, None, inputs, PolicyOptions(eps_clip, eps_clip_high, eps_clip_c))
    lower, upper = clip_bounds(advantages, plain)
    clipped = ((ratio < lower) | (ratio > upper)) & (advantages != 0)
    return terms, clipped.to(dtype)


def get_pg_loss_reducer(
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    loss_masks: Sequence[Tensor],
    calculate_per_token_loss: bool = False,
) -> Callable[[Tensor], Tensor]:
    """A function of the concatenated terms [N]: the sum of each sample's mean, or of all tokens."""
    mask = torch.cat(list(loss_masks))
    bounds = _bounds(response_lengths, mask)
    reduction: Reduction = "token-sum" if calculate_per_token_loss else "seq-mean-token-mean"

    def reducer(terms: Tensor) -> Tensor:
        if terms.shape != mask.shape:
            raise ValueError(f"{tuple(terms.shape)} terms for {mask.numel()} tokens: no context parallelism here")
        return aggregate(terms, mask, reduction, normalizer=1.0, cu_seqlens=bounds)

    return reducer


def compute_advantages_and_returns(args: Any, rollout_data: dict[str, Any]) -> None:
    """Fills rollout_data's "advantages" and "returns", lists of [R_i].

    The reward of a response enters at its last token, `-args.kl_coef` times its "kl" at every one; then GAE with
    `args.gamma` and `args.lambd`. Loss masks play no part. Whitening (`normalize_advantages`) is slime's, afterwards.
    """
    lengths = list(rollout_data["response_lengths"])
    values, kl = torch.cat(list(rollout_data["values"])), torch.cat(list(rollout_data["kl"]))
    if values.numel() != sum(lengths):
        raise ValueError(f"{values.numel()} values for {sum(lengths)} response tokens: no context parallelism here")
    scores = torch.as_tensor(rollout_data["rewards"], dtype=kl.dtype, device=kl.device)
    shaped = shaped_gae(
        scores,
        kl,
        torch.zeros_like(kl),
        values,
        _bounds(lengths, values),
        kl_coef=args.kl_coef,
        gamma=args.gamma,
        gae_lambda=args.lambd,
    )
    rollout_data["advantages"] = list(shaped.advantages.split(lengths))
    rollout_data["returns"] = list(shaped.returns.split(lengths))


def _bounds(lengths: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=like.device)


_replacements = Replacements("slime", {"slime.utils.ppo_utils": {"compute_policy_loss": compute_policy_loss}})
uninstall = _replacements.uninstall


def install(args: Any = None) -> list[str]:
    """Replaces slime's `compute_policy_loss`; returns where ("module.name").

    `args` is what slime hands to the function of `--custom-megatron-init-path`.
    """
    return _replacements.install()
