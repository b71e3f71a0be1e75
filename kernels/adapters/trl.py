"""TRL: masked statistics, log-probs and entropy under its names.

    from ppomax.kernels.adapters import trl
    trl.install()  # returns what it replaced
    PPOTrainer(...).train()  # or GRPOTrainer(...)

TRL 1.12, the last release with a PPO trainer, has `masked_mean`, `masked_var` and `masked_whiten` beside its trainer,
`selective_log_softmax` and `entropy_from_logits` for all trainers; later releases have the latter two,
`selective_log_softmax_and_entropy` and `ChunkedLogProbFunction`, the LM head of the GRPO trainer. `install` replaces
what the installed release has. The clipped losses are written out inside TRL's trainers, so they stay TRL's.

Masks are 1 = keep (TRL's padding masks mean the opposite, its callers negate them). What differs from TRL's numbers:

- Masked positions may hold anything, NaN included, and are 0 after whitening (TRL: whitened too, then overwritten).
- Nothing to average gives 0 (TRL: NaN; an error in the variance).
- Results are fp32 (fp64 for fp64), also for bf16 logits, whose log-probs TRL rounds to bf16.
- Entropy is right where logits are -inf (TRL: NaN); a label of -100 gives 0 (TRL: an index error).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import api
from ..api import LogProbs, linear_logprobs, logprobs_from_logits
from ..reductions import loss_dtype
from .replace import Replacements


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean of the unmasked values, over everything or along one axis."""
    if axis is None:
        return api.masked_mean(values, mask)
    values, mask = values.movedim(axis, -1), mask.movedim(axis, -1)
    shape = values.shape[:-1]
    rows = torch.arange(shape.numel(), device=values.device)[:, None]
    flat = (x.reshape(shape.numel(), -1) for x in (values, mask))
    return api.masked_mean(*flat, segments=rows, num_segments=shape.numel()).view(shape)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of the unmasked values."""
    return api.masked_var(values, mask, unbiased)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`(values - mean) / sqrt(var + 1e-8)` by the unbiased variance, plus the mean again without `shift_mean`."""
    return api.masked_whiten(values, mask, shift_mean=shift_mean)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probs of tokens from logits [..., V].

    Args:
        index: [...], or [..., K] for K tokens a position.
        temperature: divides the logits.
        row_mask: the shape of `index`, 1 = keep; 0 elsewhere.

    Returns:
        fp32 (fp64 for fp64 logits), the shape of `index`.
    """
    _check_temperature(temperature)
    if index.dim() < logits.dim():
        return _log_probs(logits, index, temperature, row_mask).logprobs
    chosen = _scaled(logits, index, temperature) - _log_normalizer(logits, temperature)
    return chosen if row_mask is None else torch.where(row_mask != 0, chosen, 0.0)


def _log_normalizer(logits: Tensor, temperature: float) -> Tensor:
    """log sum exp(logits / temperature), [..., 1]: a token's logit less its log-prob, best seen at the likeliest."""
    top = logits.detach().argmax(-1)
    return _scaled(logits, top[..., None], temperature) - _log_probs(logits, top, temperature).logprobs[..., None]


def _scaled(logits: Tensor, index: Tensor, temperature: float) -> Tensor:
    return logits.gather(-1, index).to(loss_dtype(logits)) / temperature


def _log_probs(logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None = None) -> LogProbs:
    return logprobs_from_logits(logits, index, temperature=temperature, mask=row_mask)


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError("temperature must be positive")


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy [...] of logits [..., V]; always chunked, `chunk_size` is not used."""
    first = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return logprobs_from_logits(logits, first).entropy


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy) in one read of the logits; the entropy detached without `entropy_requires_grad`."""
    _check_temperature(temperature)
    logprobs, entropy = _log_probs(logits, index, temperature, row_mask)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


class ChunkedLogProbFunction:
    """The LM head of TRL's GRPO and RLOO trainers since 1.16, `ChunkedLogProbFunction.apply(...)`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> tuple[Tensor | None, ...]:
        """(log-probs, entropy or None, None, None, None) of targets [N], from hidden [N, H] and weight [V, H].

        With outputs other than "log_probs" and "entropy" (the trainers for SFT, DPO and KTO), and under ZeRO-3, whose
        weights are gone by the backward, TRL's own runs. `chunk_size` is not used.
        """
        if set(outputs) - {"log_probs", "entropy"} or hasattr(weight, "ds_id"):
            theirs = _replacements.original(ChunkedLogProbFunction)
            arguments = (hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale)
            result: tuple[Tensor | None, ...] = theirs.apply(*arguments, outputs)
            return result
        # softcap * tanh(scale x / softcap) / T: a softcap and a temperature divided by the scale
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
        logprobs, entropy = linear_logprobs(
            hidden, weight, targets, bias=bias, temperature=temperature / logit_scale, softcap=softcap
        )
        return logprobs, entropy if "entropy" in outputs else None, None, None, None


_replacements = Replacements(
    "trl",
    {
        "trl.trainer.utils": {
            "selective_log_softmax": selective_log_softmax,
            "entropy_from_logits": entropy_from_logits,
            "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
        },
        "trl.kernels": {"ChunkedLogProbFunction": ChunkedLogProbFunction},
        "trl.experimental.ppo.ppo_trainer": {
            "masked_mean": masked_mean,
            "masked_var": masked_var,
            "masked_whiten": masked_whiten,
        },
    },
    skip_missing=True,
)

install, uninstall = _replacements.install, _replacements.uninstall
