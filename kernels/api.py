"""The public operations: `from ppomax.kernels.api import gae, linear_ppo_loss`."""

from .gae import GAE, ShapedGAE, gae, shaped_gae
from .kl import KLKind, kl_penalty
from .kv_write import write_kv
from .linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from .linear_logprobs import LogProbs, linear_logprobs
from .linear_ppo import LinearPPOLoss, linear_ppo_loss
from .logprobs import logprobs_from_logits
from .modules import (
    LinearCrossEntropyModule,
    LinearPPOLossModule,
    PolicyLossModule,
    PPOLossModule,
    ValueLossModule,
)
from .moments import Moments, moments
from .paged_attention import paged_attention
from .ppo_loss import PolicyLoss, PPOLoss, ValueLoss, policy_loss, ppo_loss, value_loss
from .ppo_stats import PolicyStats, ValueStats, merge_policy_stats, merge_value_stats
from .reductions import Reduction
from .sampling import Sample, sample
from .whiten import masked_mean, masked_var, masked_whiten, whitening

__all__ = [
    "GAE",
    "KLKind",
    "LinearCrossEntropy",
    "LinearCrossEntropyModule",
    "LinearPPOLoss",
    "LinearPPOLossModule",
    "LogProbs",
    "Moments",
    "PPOLoss",
    "PPOLossModule",
    "PolicyLoss",
    "PolicyLossModule",
    "PolicyStats",
    "Reduction",
    "Sample",
    "ShapedGAE",
    "ValueLoss",
    "ValueLossModule",
    "ValueStats",
    "gae",
    "kl_penalty",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_ppo_loss",
    "logprobs_from_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "merge_policy_stats",
    "merge_value_stats",
    "moments",
    "paged_attention",
    "policy_loss",
    "ppo_loss",
    "sample",
    "shaped_gae",
    "value_loss",
    "whitening",
    "write_kv",
]
