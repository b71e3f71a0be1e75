"""NeMo-RL: the clipped policy loss and the value loss under its names.

    # examples/run_grpo.py, after `setup` has returned NeMo-RL's own loss function
    from ppomax.kernels.adapters.nemo_rl import ClippedPGLossFn
    loss_fn = ClippedPGLossFn(master_config.loss_fn)
    grpo_train(policy, policy_generation, dataloader, val_dataloader, tokenizer, loss_fn, ...)

Written from NeMo-RL's interface of 2026 (losses called with `next_token_logprobs`). Nothing is registered or replaced:
a loss function is an argument there. Fields of `data` are [B, S]; those of the policy loss are shifted by one against
the log-probs [B, S - 1], those of the value loss are not; masks 1 = keep, `sample_mask` [B]. Metrics are parts of the
global means, to be added up over micro-batches.

Not here, and an error: `disable_ppo_ratio`, `use_cispo`, `positive_example_nll_weight`. What differs from NeMo-RL's
numbers: masked positions may hold anything, NaN included, in losses and in metrics; results are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..api import KLKind, Reduction, kl_penalty, policy_loss, value_loss
from .layout import aggregate, numbers, row_means

_UNSUPPORTED = ("disable_ppo_ratio", "use_cispo", "positive_example_nll_weight")
_TRUNCATIONS = ("tis", "icepop", "seq-mask-tis")


@dataclass(frozen=True)
class ClippedPGOptions:
    """The fields of NeMo-RL's configuration that count here, and its defaults."""

    token_level_loss: bool = True
    sequence_level_importance_ratios: bool = False
    force_on_policy_ratio: bool = False
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    reference_policy_kl_penalty: float = 0.01
    reference_policy_kl_type: KLKind = "k3"
    kl_input_clamp_value: float | None = 20.0
    kl_output_clamp_value: float | None = 10.0
    use_kl_in_reward: bool = False
    use_on_policy_kl_approximation: bool = False
    use_importance_sampling_correction: bool = False
    truncated_importance_sampling_type: str | None = None
    truncated_importance_sampling_ratio: float | None = None
    truncated_importance_sampling_ratio_min: float | None = None

    def __post_init__(self) -> None:
        if self.sequence_level_importance_ratios and self.token_level_loss:
            raise ValueError("sequence_level_importance_ratios needs token_level_loss=False")
        if self.truncated_importance_sampling_ratio is None:
            return
        kind = self.truncated_importance_sampling_type
        if kind not in _TRUNCATIONS:
            raise ValueError(f"truncated_importance_sampling_type is {kind!r}, expected {', '.join(_TRUNCATIONS)}")
        if not self.use_importance_sampling_correction:
            raise ValueError("truncated_importance_sampling_ratio needs use_importance_sampling_correction")
        if kind != "tis" and self.truncated_importance_sampling_ratio_min is None:
            raise ValueError(f"{kind} needs truncated_importance_sampling_ratio_min")
        if kind == "seq-mask-tis" and self.sequence_level_importance_ratios:
            raise ValueError("seq-mask-tis is for ratios of tokens")

    @property
    def kl_coef(self) -> float:
        return 0.0 if self.use_kl_in_reward else self.reference_policy_kl_penalty


class _Batch(NamedTuple):
    """Per-token fields [B, T] of one micro-batch, aligned with the log-probs."""

    current: Tensor
    previous: Tensor
    generation: Tensor
    advantages: Tensor
    mask: Tensor  # bool
    samples: Tensor  # bool [B, 1]


class _Weights(NamedTuple):
    """Importance weights of the policy's terms, and where they lie outside the bounds: [B, T], or [B, 1] of samples."""

    weights: Tensor
    outside: Tensor | None = None


class ClippedPGLossFn:
    """The clipped policy loss with a KL term and corrections for the rollout.

    Args:
        cfg: NeMo-RL's configuration of the loss, a mapping or an object.
    """

    def __init__(self, cfg: Any) -> None:
        for name in _UNSUPPORTED:
            if _option(cfg, name, False):
                raise ValueError(f"{name} is not supported")
        known = {field.name: _option(cfg, field.name, field.default) for field in fields(ClippedPGOptions)}
        self.options = ClippedPGOptions(**known)

    @property
    def loss_type(self) -> Any:
        kinds = import_module("nemo_rl.algorithms.loss.interfaces").LossType
        return kinds.TOKEN_LEVEL if self.options.token_level_loss else kinds.SEQUENCE_LEVEL

    @property
    def input_type(self) -> Any:
        return import_module("nemo_rl.algorithms.loss.interfaces").LossInputType.LOGPROB

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """next_token_logprobs [B, S - 1], data's fields [B, S]: (loss, metrics)."""
        options, batch = self.options, self._batch(next_token_logprobs, data)
        weighting = self._weights(batch)
        reduction: Reduction = "token-mean" if options.token_level_loss else "seq-mean-token-mean"
        normalizer = global_valid_toks if options.token_level_loss else global_valid_seqs
        new, old = batch.current, batch.previous
        if options.sequence_level_importance_ratios and not options.force_on_policy_ratio:
            new = row_means(new - old, batch.mask).expand_as(new)
            old = torch.zeros_like(new)
        corrected = options.use_importance_sampling_correction
        loss, _ = policy_loss(
            new,
            old,
            batch.advantages,
            batch.mask,
            clip_eps=options.ratio_clip_min,
            clip_eps_high=options.ratio_clip_max,
            dual_clip=options.ratio_clip_c,
            importance_weights=weighting.weights.expand_as(new) if corrected else None,
            reduction=reduction,
            normalizer=normalizer,
        )
        kl = torch.zeros_like(loss)
        if options.kl_coef != 0.0:
            kl = aggregate(self._kl(batch, data), batch.mask, reduction, normalizer)
        loss = loss + options.kl_coef * kl
        metrics = _metrics(batch, new - old, weighting, options, global_valid_seqs, global_valid_toks)
        return loss, numbers(loss=loss, kl_penalty=kl, **metrics)

    def _batch(self, current: Tensor, data: Mapping[str, Tensor]) -> _Batch:
        samples = (data["sample_mask"] != 0)[:, None]
        on_policy = self.options.force_on_policy_ratio
        return _Batch(
            current,
            current.detach() if on_policy else data["prev_logprobs"][:, 1:],
            data["generation_logprobs"][:, 1:],
            data["advantages"][:, 1:],
            (data["token_mask"][:, 1:] != 0) & samples,
            samples,
        )

    def _kl(self, batch: _Batch, data: Mapping[str, Tensor]) -> Tensor:
        """[B, T]: the estimate against the reference, weighted where the tokens are another policy's."""
        options = self.options
        current = torch.where(batch.mask, data.get("curr_logprobs_unfiltered", batch.current), 0.0)
        reference = torch.where(batch.mask, data["reference_policy_logprobs"][:, 1:], 0.0)
        kl = kl_penalty(
            current,
            reference,
            options.reference_policy_kl_type,
            log_ratio_clamp=options.kl_input_clamp_value,
            clamp=options.kl_output_clamp_value,
        )
        if not options.use_on_policy_kl_approximation:
            return kl
        return kl * _finite(torch.exp(current.detach() - batch.generation))

    @torch.no_grad()
    def _weights(self, batch: _Batch) -> _Weights:
        options = self.options
        log_ratio = torch.where(batch.mask, batch.previous - batch.generation, 0.0)
        by_sample = options.sequence_level_importance_ratios
        weights = _finite(torch.exp(log_ratio.sum(-1, keepdim=True) if by_sample else log_ratio))
        high, low = options.truncated_importance_sampling_ratio, options.truncated_importance_sampling_ratio_min
        if high is None:
            return _Weights(weights)
        if options.truncated_importance_sampling_type == "tis":
            return _Weights(weights.clamp(max=high), weights > high)
        judged = weights
        if options.truncated_importance_sampling_type == "seq-mask-tis":
            judged = torch.exp(row_means(_finite(log_ratio), batch.mask))
        assert low is not None
        outside = (judged < low) | (judged > high)
        return _Weights(torch.where(outside, 0.0, weights), outside)


@torch.no_grad()
def _metrics(
    batch: _Batch,
    log_ratio: Tensor,
    weighting: _Weights,
    options: ClippedPGOptions,
    global_seqs: Tensor,
    global_toks: Tensor,
) -> dict[str, Tensor]:
    """NeMo-RL's metrics beside the loss and its KL term: 0-dim, of the unmasked tokens."""
    current, previous, generation = (x[batch.mask].double() for x in (batch.current, batch.previous, batch.generation))
    ratio = log_ratio[batch.mask].double().exp()
    clamped = ratio.clamp(1.0 - options.ratio_clip_min, 1.0 + options.ratio_clip_max)
    kind = options.reference_policy_kl_type
    mixture = torch.logaddexp(previous, generation) - math.log(2.0)
    divergence = 0.5 * (kl_penalty(mixture, previous, "k3") + kl_penalty(mixture, generation, "k3"))
    per_token = {
        "probs_ratio": ratio,
        "probs_ratio_clamped": clamped,
        "token_mult_prob_error": (generation - previous).abs().exp(),
        "gen_kl_error": kl_penalty(generation, previous, kind),
        "policy_kl_error": kl_penalty(previous, generation, kind),
        "js_divergence_error": divergence,
        "approx_entropy": -(current - generation).exp() * current,
    }
    metrics = {name: x.sum() / global_toks for name, x in per_token.items()}
    for name, x in (("probs_ratio", ratio), ("probs_ratio_clamped", clamped)):
        metrics[f"{name}_min"], metrics[f"{name}_max"] = _extremes(x)
    metrics["num_valid_samples"] = batch.samples.sum()
    by_sample = options.sequence_level_importance_ratios
    kept, total = (batch.samples, global_seqs) if by_sample else (batch.mask, global_toks)
    metrics["sampling_importance_ratio"] = aggregate(weighting.weights, kept, "token-mean", total)
    if weighting.outside is not None:
        by_sample = options.truncated_importance_sampling_type == "seq-mask-tis"
        kept, total = (batch.samples, global_seqs) if by_sample else (batch.mask, global_toks)
        metrics["is_oob_ratio"] = aggregate(weighting.outside.expand_as(kept).float(), kept, "token-mean", total)
    return metrics


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return x.new_tensor(math.inf), x.new_tensor(-math.inf)
    return x.amin(), x.amax()


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


class MseValueLossFn:
    """The value loss with its factor 1/2, times `cfg.scale`; `cfg.cliprange` None or 0 is unclipped."""

    def __init__(self, cfg: Any) -> None:
        self.scale = _option(cfg, "scale", 1.0)
        self.cliprange = _option(cfg, "cliprange", None) or None

    @property
    def loss_type(self) -> Any:
        return import_module("nemo_rl.algorithms.loss.interfaces").LossType.TOKEN_LEVEL

    @property
    def input_type(self) -> Any:
        return import_module("nemo_rl.algorithms.loss.interfaces").LossInputType.LOGIT

    def __call__(
        self, logits: Tensor, data: Mapping[str, Tensor], global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """logits [B, S] or [B, S, 1], the critic's output, data's fields [B, S]: (loss, metrics)."""
        values = logits.squeeze(-1) if logits.dim() > 2 else logits
        mask = (data["token_mask"] != 0) & (data["sample_mask"] != 0)[:, None]
        loss, stats = value_loss(
            values,
            values if self.cliprange is None else data["values"],
            data["returns"],
            mask,
            clip_eps=self.cliprange,
            coef=0.5 * self.scale,
            normalizer=global_valid_toks,
        )
        part = stats.count / global_valid_toks
        low, high = _extremes(values.detach()[mask]) if bool(mask.any()) else (loss.new_zeros(()),) * 2
        metrics = {
            "vf_clipfrac": stats.clipfrac * part,
            "returns_mean": stats.return_mean * part,
            "values_mean": stats.value_mean * part,
            "values_min": low,
            "values_max": high,
            "returns_sq_mean": (stats.return_var + stats.return_mean.square()) * part,
            "residual_sq_mean": (stats.error_var + stats.error_mean.square()) * part,
        }
        return loss, {**numbers(loss=loss, **metrics), "num_valid_samples": values.shape[0]}


def _option(cfg: Any, name: str, default: Any) -> Any:
    return cfg.get(name, default) if isinstance(cfg, Mapping) else getattr(cfg, name, default)
