"""torchtune 0.6: PPO loss, advantages, whitening and log-probs under its names.

    # the recipe's configuration
    loss:
      _component_: ppomax.kernels.adapters.torchtune.PPOLoss

    # in the recipe, for the rest
    from ppomax.kernels.adapters import torchtune
    torchtune.install()

Masks are True = keep. torchtune's recursion over time does not look at the mask, and its recipe relies on that: the
score lies one token after the response, where the mask of the advantages is False. So `estimate_advantages` does the
same, and rewards and values have to be finite everywhere. What differs from torchtune's numbers:

- In the losses masked positions may hold anything, NaN included; the mean ratio is that of the unmasked tokens
  (torchtune: of all, padding with its ratio of 1 among them). `whiten` gives 0 where masked.
- Nothing to average gives 0 where torchtune's unmasked means give NaN; the variance of a single value is 0.
- Log-probs are fp32 also for bf16 logits.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..api import gae, logprobs_from_logits, masked_whiten, policy_loss, value_loss
from .replace import Replacements


class PPOLoss(nn.Module):
    """The policy loss plus `value_coeff` times the clipped value loss, each a mean over its own mask.

    Args:
        epsilon: clip range of the ratio.
        value_clip_range: how far a value may move from its old value.
        value_coeff: factor of the value loss, beside its own 1/2.
    """

    def __init__(self, epsilon: float = 0.1, value_clip_range: float = 0.2, value_coeff: float = 0.1) -> None:
        super().__init__()
        self.epsilon, self.value_clip_range, self.value_coeff = epsilon, value_clip_range, value_coeff

    def forward(
        self,
        pi_old_logprobs: Tensor,
        pi_logprobs: Tensor,
        advantages: Tensor,
        phi_old_values: Tensor,
        phi_values: Tensor,
        returns: Tensor,
        padding_masks: Tensor | None = None,
        value_padding_masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Per-token tensors of one shape: (loss, policy loss, value loss, mean ratio, clipped fraction)."""
        policy, stats = policy_loss(pi_logprobs, pi_old_logprobs, advantages, padding_masks, clip_eps=self.epsilon)
        value, _ = value_loss(
            phi_values, phi_old_values, returns, value_padding_masks, clip_eps=self.value_clip_range, coef=0.5
        )
        loss = policy + self.value_coeff * value
        return loss, policy.detach(), value.detach(), stats.ratio_mean, stats.clipfrac


def estimate_advantages(
    values: Tensor, rewards: Tensor, gamma: float, lmbda: float, masks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(whitened advantages, 0 where masked; returns) of [B, T]; `masks` is for the whitening alone."""
    advantages, returns = gae(rewards, values, gamma=gamma, gae_lambda=lmbda)
    return whiten(advantages, masks), returns


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """`(x - mean) / sqrt(var + 1e-8)`, plus the mean again *with* `shift_mean`: torchtune's sense of the word."""
    return masked_whiten(x, mask, shift_mean=not shift_mean)


def logits_to_logprobs(logits: Tensor, sequences: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs [B, T] of tokens [B, T] from logits [B, T, V] / temperature."""
    return logprobs_from_logits(logits, sequences, temperature=temperature).logprobs


_replacements = Replacements(
    "torchtune",
    {
        "torchtune.rlhf": {
            "estimate_advantages": estimate_advantages,
            "whiten": whiten,
            "logits_to_logprobs": logits_to_logprobs,
        },
        "torchtune.rlhf.loss": {"PPOLoss": PPOLoss},
    },
)

install, uninstall = _replacements.install, _replacements.uninstall
