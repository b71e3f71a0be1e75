"""SkyRL 0.3: policy loss, GAE and critic loss under its names.

    # before the trainer starts, in the script that starts it
    from ppomax.kernels.adapters import skyrl
    skyrl.register()  # policy losses "ppomax" and "ppomax_dual_clip", estimator "ppomax_gae"
    # trainer.algorithm.policy_loss_type=ppomax trainer.algorithm.advantage_estimator=ppomax_gae

`install` puts the critic loss in place of SkyRL's, which has no registry for it; every worker has to call it.

Tensors are (B, T), masks 1 = keep. SkyRL folds the normalisation of the policy loss into the advantages, so that loss
is a sum. Its recursion over time does not look at the mask: rewards and values have to be finite everywhere. What
differs from SkyRL's numbers:

- In the losses masked positions may hold anything, NaN included; advantages are 0 there. Masks are taken as binary.
- A batch without an unmasked token, or whitening of one alone, gives 0 where SkyRL raises.
- Results are fp32.
- Corrections for the rollout (`off_policy_correction`) are SkyRL's own, called from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from ..api import gae, masked_whiten, policy_loss, value_loss
from .layout import numbers
from .replace import Replacements

LOG_RATIO_CLAMP = 20.0
_UTILS = "skyrl.backends.skyrl_train.utils"


def ppo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """(sum of the clipped loss over the unmasked tokens, {clip_ratio, and those of a correction}).

    Args:
        config: of the algorithm: `eps_clip_low`, `eps_clip_high`, `policy_loss_type` (dual-clipped by `clip_ratio_c`
            where the name ends in "dual_clip") and `off_policy_correction`.
        rollout_logprobs: for `off_policy_correction`.
    """
    weights, metrics = None, {}
    if rollout_logprobs is not None and config.off_policy_correction is not None:
        correct = import_module(f"{_UTILS}.off_policy_correction_utils").compute_off_policy_correction
        ratio, metrics, kept = correct(old_log_probs, rollout_logprobs, loss_mask, config.off_policy_correction)
        weights = kept if ratio is None else kept * ratio
    loss, stats = policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        loss_mask,
        clip_eps=config.eps_clip_low,
        clip_eps_high=config.eps_clip_high,
        dual_clip=config.clip_ratio_c if config.policy_loss_type.endswith("dual_clip") else None,
        importance_weights=weights,
        log_ratio_clamp=LOG_RATIO_CLAMP,
        reduction="token-sum",
    )
    return loss, {**numbers(clip_ratio=stats.clipfrac), **metrics}


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lambd: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """(whitened advantages, 0 where masked; returns); the mask is for the whitening alone."""
    advantages, returns = gae(token_level_rewards, values, gamma=gamma, gae_lambda=lambd)
    return masked_whiten(advantages, response_mask), returns


def ppo_critic_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, config: Any, loss_mask: Tensor | None = None
) -> tuple[Tensor, float | None]:
    """(value loss with its factor 1/2, clipped fraction or None): the mean over all rows of their tokens' means.

    `config.value_clip` None is unclipped. Rows without an unmasked token count as 0.
    """
    loss, stats = value_loss(
        values,
        old_values,
        returns,
        loss_mask,
        clip_eps=config.value_clip,
        coef=0.5,
        reduction="seq-mean-token-mean",
        normalizer=values.shape[0],
    )
    return loss, None if config.value_clip is None else float(stats.clipfrac)


_replacements = Replacements("skyrl", {f"{_UTILS}.ppo_utils": {"ppo_critic_loss": ppo_critic_loss}})


def register(name: str = "ppomax") -> None:
    """Enters `name` and `name`_dual_clip as policy losses and `name`_gae as advantage estimator."""
    utils = import_module(f"{_UTILS}.ppo_utils")
    for policy in (name, f"{name}_dual_clip"):
        utils.PolicyLossRegistry.register(policy, ppo_policy_loss)
    utils.AdvantageEstimatorRegistry.register(f"{name}_gae", compute_gae_advantage_return)


install, uninstall = _replacements.install, _replacements.uninstall
