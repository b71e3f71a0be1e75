"""OpenRLHF 0.11: policy loss, value loss and reward shaping under its names.

    # a launcher that every worker imports before its trainer
    from ppomax.kernels.adapters import openrlhf
    openrlhf.install()
    # or on one trainer: trainer.actor_loss_fn = openrlhf.PolicyLoss(0.2, 0.2)

Tensors are (B, T), masks 1 = keep. What differs from OpenRLHF's numbers:

- Masked positions may hold anything, NaN included; shaped rewards are 0 there (OpenRLHF: the KL term, masked later).
- Rows without an unmasked token count nowhere (OpenRLHF: their score lands on the last column, and their filter
  statistics are NaN); a batch without one gives 0 instead of NaN.
- Results are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..api import Reduction, masked_mean, policy_loss, shaped_gae, value_loss
from .layout import row_means
from .replace import Replacements

LOG_RATIO_CLAMP = 20.0


class PolicyLoss(nn.Module):
    """The clipped policy loss, with OpenRLHF's corrections for rollouts of another engine.

    Args:
        clip_eps_low, clip_eps_high: the ratio's range is 1 - low .. 1 + high.
        dual_clip: bound on the ratio where the advantage is negative; None is off.
        token_level_loss: mean over tokens; else over sequences, of their tokens' means.
        policy_loss_type: "ppo", or "gspo" (one ratio a sequence, arXiv 2507.18071; always a mean over sequences).
        is_correction_level: "off", "token" or "seq": what is judged by how the trained policy's old log-probs and the
            rollout's differ ("ppo" only). Under "gspo" anything but "off" takes the ratio to the rollout's log-probs.
        is_correction_mode: "mask" drops units outside the thresholds, the others weigh their tokens by the ratio old /
            rollout; "clip" clamps the tokens' ratios.
        is_correction_gating: what is judged: "ratio" (of a sequence: its geometric mean), "binary_kl" or "tv", the
            divergence of the sampled token's probability.
        is_correction_threshold: (low, high).
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple[float, float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        _check("policy_loss_type", policy_loss_type, "ppo", "gspo")
        _check("is_correction_level", is_correction_level, "off", "token", "seq")
        _check("is_correction_mode", is_correction_mode, "mask", "clip")
        _check("is_correction_gating", is_correction_gating, "ratio", "binary_kl", "tv")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError("is_correction_mode='clip' is for the ratio of tokens")
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type == "ppo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level, self.is_correction_mode = is_correction_level, is_correction_mode
        self.is_correction_gating, self.is_correction_threshold = is_correction_gating, is_correction_threshold

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(loss, clipped fraction, mean of old - new log-probs, mean of rollout - old, fraction filtered).

        The last two are None without a correction.
        """
        rollout = None if self.is_correction_level == "off" else rollout_log_probs
        if rollout is None and self.is_correction_level != "off":
            raise ValueError("a correction for the rollout needs rollout_log_probs")
        new, old = log_probs, old_log_probs
        weights = vllm_kl = filtered = None
        if self.policy_loss_type == "gspo":
            new = row_means(log_probs - (old_log_probs if rollout is None else rollout), action_mask)
            new, old = new.expand_as(log_probs), torch.zeros_like(log_probs)
        elif rollout is not None:
            weights, filtered = self._correction(old_log_probs, rollout, action_mask)
            vllm_kl = masked_mean(rollout - old_log_probs, action_mask)
        reduction, normalizer, scale = _aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        loss, stats = policy_loss(
            new,
            old,
            advantages,
            action_mask,
            clip_eps=self.clip_eps_low,
            clip_eps_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
            importance_weights=weights,
            log_ratio_clamp=LOG_RATIO_CLAMP if self.policy_loss_type == "ppo" else None,
            reduction=reduction,
            normalizer=normalizer,
        )
        ppo_kl = masked_mean(old_log_probs - log_probs.detach(), action_mask)
        return loss * scale, stats.clipfrac, ppo_kl, vllm_kl, filtered

    @torch.no_grad()
    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(weight of each token's term, fraction of the tokens or sequences outside the thresholds)."""
        low, high = self.is_correction_threshold
        judged = self._judged(old, rollout, mask)
        outside = (judged < low) | (judged > high)
        counted = mask
        if self.is_correction_level == "seq" and mask is not None:
            counted = (mask != 0).any(-1, keepdim=True)
        filtered = masked_mean(outside.float(), counted)
        if self.is_correction_mode == "clip":
            return judged.clamp(low, high), filtered
        return torch.where(outside, 0.0, torch.exp(old - rollout)), filtered

    def _judged(self, old: Tensor, rollout: Tensor, mask: Tensor | None) -> Tensor:
        """What is held against the thresholds: [B, T], or [B, 1] at the level of sequences."""
        by_row = self.is_correction_level == "seq"
        if self.is_correction_gating == "ratio":
            log_ratio = old - rollout
            return torch.exp(row_means(log_ratio, mask) if by_row else log_ratio)
        p, q = (torch.exp(x).clamp(1e-6, 1.0 - 1e-6) for x in (rollout, old))
        if self.is_correction_gating == "tv":
            divergence = (p - q).abs()
        else:
            divergence = p * torch.log(p / q) + (1.0 - p) * torch.log((1.0 - p) / (1.0 - q))
        return row_means(divergence, mask) if by_row else divergence


class ValueLoss(nn.Module):
    """The value loss with its factor 1/2; `clip_eps` None is unclipped."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps, self.token_level_loss = clip_eps, token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> Tensor:
        reduction, normalizer, scale = _aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        result = value_loss(
            values,
            old_values,
            returns,
            action_mask,
            clip_eps=self.clip_eps,
            coef=0.5,
            reduction=reduction,
            normalizer=normalizer,
        )
        return result.loss * scale


def _check(name: str, value: str, *known: str) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def _aggregation(
    token_level: bool, dp_size: int, tokens: float | Tensor | None, sequences: float | Tensor | None
) -> tuple[Reduction, float | Tensor | None, int]:
    """(reduction, normalizer, factor): ranks count only where the normalizer is that of all of them."""
    total = tokens if token_level else sequences
    return "token-mean" if token_level else "seq-mean-token-mean", total, 1 if total is None else dp_size


def compute_reward(
    r: Tensor,
    kl_coef: float,
    kl: Tensor,
    action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """Rewards [B, T]: `-kl_coef * kl`, plus the clipped score at each row's last unmasked token; 0 where masked.

    Args:
        r: [B], scores. kl_coef: below 0 is 0. kl: [B, T], an estimate per token.
    """
    scores = r.clamp(*reward_clip_range) if reward_clip_range else r
    bounds = torch.arange(kl.shape[0] + 1, dtype=torch.int32, device=kl.device) * kl.shape[1]
    flat, mask = kl.reshape(-1), None if action_mask is None else action_mask.reshape(-1)
    zero = torch.zeros_like(flat)
    shaped = shaped_gae(scores.reshape(-1), flat, zero, zero, bounds, mask=mask, kl_coef=max(kl_coef, 0.0))
    return shaped.rewards.view(kl.shape)


_replacements = Replacements(
    "openrlhf",
    {
        "openrlhf.models.loss": {"PolicyLoss": PolicyLoss, "ValueLoss": ValueLoss},
        "openrlhf.models.utils": {"compute_reward": compute_reward},
    },
)

install, uninstall = _replacements.install, _replacements.uninstall
