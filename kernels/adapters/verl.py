"""verl 0.9: policy loss, GAE, value loss, KL, aggregation, log-probs, entropy and the fused LM head.

    # ppo_losses.py, on the workers' PYTHONPATH
    from ppomax.kernels.adapters import verl
    verl.register()  # the policy loss "ppomax"
    verl.install()  # the rest, in place of verl's own

    VERL_USE_EXTERNAL_MODULES=ppo_losses python -m verl.trainer.main_ppo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=ppomax actor_rollout_ref.model.use_fused_kernels=True ...

verl's trainer hands registered advantage estimators no values, so GAE is replaced by `install`, not registered.

Tensors are (B, response_length), masks 1 = keep. What differs from verl's numbers:

- Masked positions may hold anything, NaN included (but `kl_penalty`, which has no mask, passes NaN on). Advantages and
  returns are 0 there (verl: the value carried back over the gap, whitened; returns of whatever the critic said).
- A batch without an unmasked token gives 0 (verl: NaN, or an error in whitening, also with a single token).
- Log-probs and entropy are fp32 whatever the dtype of the model, and neither -inf logits nor rows whose logits all lie
  far below 0 make NaN or inf (verl's Triton head starts its running maximum at 0).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..api import KLKind, Reduction, gae, linear_logprobs, masked_mean, masked_whiten, policy_loss, value_loss
from ..api import kl_penalty as estimate_kl
from ..api import logprobs_from_logits as logprobs_and_entropy
from .layout import aggregate, numbers
from .replace import Replacements

LOG_RATIO_CLAMP = 20.0
KL_CLAMP = 10.0
KL_KINDS: dict[str, KLKind] = {
    "kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3",
}  # fmt: skip
REDUCTIONS: dict[str, Reduction] = {
    "token-mean": "token-mean",
    "token-sum": "token-sum",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "seq-mean-token-sum",
    "seq-mean-token-mean": "seq-mean-token-mean",
}


class Aggregation(NamedTuple):
    """verl's loss is `scale` times ours with this reduction and normalizer."""

    reduction: Reduction
    normalizer: float | Tensor | None
    scale: float


def _aggregation(
    mode: str,
    length: int,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Aggregation:
    if mode not in REDUCTIONS:
        raise ValueError(f"unknown loss_agg_mode {mode!r}, expected one of {', '.join(REDUCTIONS)}")
    total = {"token-mean": batch_num_tokens, "token-sum": 1}.get(mode, global_batch_size)
    if total is None and dp_size > 1:
        name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
        raise ValueError(f"{mode} over several ranks needs {name}")
    norm = (loss_scale_factor or length) if mode == "seq-mean-token-sum-norm" else 1
    return Aggregation(REDUCTIONS[mode], total, dp_size / norm)


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """One loss of per-token terms [B, T]: its share of the global batch's, times `dp_size`."""
    how = _aggregation(
        loss_agg_mode, loss_mask.shape[-1], dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    return aggregate(loss_mat, loss_mask, how.reduction, how.normalizer) * how.scale


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped, dual-clipped policy loss; what `register` enters.

    Args:
        config: the actor's, with `clip_ratio`, `clip_ratio_low`, `clip_ratio_high`, `clip_ratio_c` and
            `global_batch_info`.
        rollout_is_weights: factor of each token's term.

    Returns:
        (loss, {actor/pg_clipfrac, actor/ppo_kl, actor/pg_clipfrac_lower}).
    """
    if config is None:
        raise ValueError("the policy loss reads its clip range from the actor's config")
    low, high = config.clip_ratio_low, config.clip_ratio_high
    how = _aggregation(loss_agg_mode, response_mask.shape[-1], **(config.global_batch_info or {}))
    loss, stats = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        clip_eps=config.clip_ratio if low is None else low,
        clip_eps_high=config.clip_ratio if high is None else high,
        dual_clip=config.get("clip_ratio_c", 3.0),
        importance_weights=rollout_is_weights,
        log_ratio_clamp=LOG_RATIO_CLAMP,
        reduction=how.reduction,
        normalizer=how.normalizer,
    )
    with torch.no_grad():
        kl = estimate_kl(old_log_prob, log_prob, "k1", log_ratio_clamp=LOG_RATIO_CLAMP)
        metrics = {
            "actor/pg_clipfrac": stats.clipfrac,
            "actor/ppo_kl": masked_mean(kl, response_mask),
            "actor/pg_clipfrac_lower": stats.clipfrac_dual,
        }
    return loss * how.scale, numbers(**metrics)


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float | Tensor, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(whitened advantages, returns), masked gaps transparent; 0 where masked."""
    advantages, returns = gae(
        token_level_rewards, values, mask=response_mask, gamma=float(gamma), gae_lambda=float(lam)
    )
    return masked_whiten(advantages, response_mask), returns


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(clipped value loss with the factor 1/2, fraction of tokens clipped)."""
    how = _aggregation(
        loss_agg_mode, response_mask.shape[-1], dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    loss, stats = value_loss(
        vpreds,
        values,
        returns,
        response_mask,
        clip_eps=cliprange_value,
        coef=0.5,
        reduction=how.reduction,
        normalizer=how.normalizer,
    )
    return loss * how.scale, stats.clipfrac


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Per-token KL estimate: kl or k1, abs, mse or k2, low_var_kl or k3; with a trailing + the gradient is k2's.

    k3 is clamped, its log-ratio to +-20 and its value to +-10; k2's gradient is not.
    """
    base = kl_penalty.removesuffix("+")
    if base not in KL_KINDS:
        raise ValueError(f"unknown KL estimator {kl_penalty!r}, expected one of {', '.join(KL_KINDS)}, or one with +")
    clamps = {"log_ratio_clamp": LOG_RATIO_CLAMP, "clamp": KL_CLAMP} if KL_KINDS[base] == "k3" else {}
    value = estimate_kl(logprob, ref_logprob, KL_KINDS[base], **clamps)
    if base == kl_penalty:
        return value
    gradient = estimate_kl(logprob, ref_logprob, "k2")
    return gradient + (value - gradient).detach()


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs of labels [...] from logits [..., V]; by default the gradient is written over the logits."""
    return logprobs_and_entropy(logits, labels, inplace_backward=inplace_backward).logprobs


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy [...] of logits [..., V], differentiable."""
    return logprobs_and_entropy(logits, _first_token(logits)).entropy


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """`entropy_from_logits`, which is always chunked: `chunk_size` is not used."""
    return entropy_from_logits(logits)


def _first_token(logits: Tensor) -> Tensor:
    return torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)


class FusedLinearForPPO(nn.Module):
    """The head that verl's models call with `use_fused_kernels`; `chunk_size` and `impl_backend` are not used."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [..., H], vocab_weights [V, H], input_ids [...]: (log_probs, entropy), fp32 [...]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        result = linear_logprobs(rows, vocab_weights, input_ids.reshape(-1).long(), temperature=temperature)
        return result.logprobs.view(input_ids.shape), result.entropy.view(input_ids.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy) as `FusedLinearForPPO` gives them; every token for itself, the whole vocabulary here."""
    if reduction != "none" or dist_process_group is not None:
        raise ValueError("linear_cross_entropy: only reduction='none' and a vocabulary that is not sharded")
    return FusedLinearForPPO()(hidden, weight, labels, temperature)


_replacements = Replacements(
    "verl",
    {
        "verl.trainer.ppo.core_algos": {
            "agg_loss": agg_loss,
            "compute_gae_advantage_return": compute_gae_advantage_return,
            "compute_value_loss": compute_value_loss,
            "kl_penalty": kl_penalty,
        },
        "verl.utils.torch_functional": {
            "logprobs_from_logits": logprobs_from_logits,
            "entropy_from_logits": entropy_from_logits,
            "entropy_from_logits_with_chunking": entropy_from_logits_with_chunking,
        },
        "verl.utils.experimental.torch_functional": {"FusedLinearForPPO": FusedLinearForPPO},
        "verl.utils.kernel.linear_cross_entropy": {"linear_cross_entropy": linear_cross_entropy},
    },
)


def register(name: str = "ppomax") -> None:
    """Enters the policy loss in verl's registry: `actor.policy_loss.loss_mode=name`."""
    import_module("verl.trainer.ppo.core_algos").register_policy_loss(name)(compute_policy_loss_vanilla)


install, uninstall = _replacements.install, _replacements.uninstall
