"""The policy loss, the value loss or both as one operation: what `ppo_loss.py` calls where Triton runs.

The forward forms the gradients with the loss, before the normalizer and the upstream gradient are applied; the
backward is one multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import dense, temperature_pair
from .ppo_stats import PolicyStats, ValueStats
from .ppo_terms import PolicyOptions, PolicyTensors, ValueOptions, ValueTensors, row_numbers
from .reductions import Weighting, token_weights

STATS = len(PolicyStats._fields) + len(ValueStats._fields) + 1


class FusedLoss(NamedTuple):
    """The losses of both parts, 0 where there is none, and `stats`: PolicyStats, ValueStats, 1 / normalizer."""

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    stats: Tensor

    @property
    def policy_stats(self) -> PolicyStats:
        return PolicyStats(*self.stats[: len(PolicyStats._fields)].unbind())

    @property
    def value_stats(self) -> ValueStats:
        return ValueStats(*self.stats[len(PolicyStats._fields) : STATS - 1].unbind())


@torch.library.custom_op("ppomax::ppo_loss_forward", mutates_args=())
def _forward(
    policy: Sequence[Tensor | None],
    value: Sequence[Tensor],
    mask: Tensor | None,
    weights: Tensor | None,
    normalizer: float | None,
    normalizer_tensor: Tensor | None,
    numbers: Sequence[float],
    kl_kind: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, policy_loss, value_loss, stats, and the gradients of logprobs, entropy and values).

    Args:
        policy, value: the fields of `PolicyTensors` and `ValueTensors`, [N]; empty without that loss.
        mask, weights: [N]; weights of the terms, None is 1.
        normalizer, normalizer_tensor: divide the losses; where both are None, the number of unmasked tokens does.
        numbers: `RowNumbers`.
        wants: which gradients; others have no elements. They are not yet divided by the normalizer.
    """
    from .gpu import ppo_loss as triton_path

    return triton_path.forward(policy, value, mask, weights, normalizer, normalizer_tensor, numbers, kl_kind, wants)


@_forward.register_fake
def _(
    policy: Sequence[Tensor | None],
    value: Sequence[Tensor],
    mask: Tensor | None,
    weights: Tensor | None,
    normalizer: float | None,
    normalizer_tensor: Tensor | None,
    numbers: Sequence[float],
    kl_kind: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = policy[0] if policy else value[0]
    assert like is not None
    shapes: list[tuple[int, ...]] = [(), (), (), (STATS,), *(tuple(like.shape) if wanted else (0,) for wanted in wants)]
    a, b, c, d, e, f, g = (like.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return a, b, c, d, e, f, g


@torch.library.custom_op("ppomax::ppo_loss_backward", mutates_args=())
def _backward(grads: Sequence[Tensor | None], stats: Tensor, upstream: Sequence[Tensor | None]) -> list[Tensor]:
    """`grads` (of logprobs, entropy, values) over the normalizer, times the `upstream` gradients of (loss,
    policy_loss, value_loss), fp32; without elements where they are None."""
    from .gpu import ppo_loss as triton_path

    return triton_path.backward(grads, stats, upstream)


@_backward.register_fake
def _(grads: Sequence[Tensor | None], stats: Tensor, upstream: Sequence[Tensor | None]) -> list[Tensor]:
    return [stats.new_empty(0) if g is None else torch.empty_like(g) for g in grads]


class _Call(NamedTuple):
    """Arguments of `_forward`, detached."""

    policy: Sequence[Tensor | None]
    value: Sequence[Tensor | None]
    mask: Tensor | None
    weights: Tensor | None
    normalizer: float | None
    normalizer_tensor: Tensor | None
    numbers: Sequence[float]
    kl_kind: str
    wants: Sequence[bool]


class _FusedPPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor | None, entropy: Tensor | None, values: Tensor | None, call: _Call
    ) -> tuple[Tensor, ...]:
        loss, policy_loss, value_loss, stats, *grads = _forward(*call)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(stats, *grads)
        ctx.wants = call.wants
        ctx.dtypes = [None if x is None else x.dtype for x in (logprobs, entropy, values)]
        return loss, policy_loss, value_loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        stats, *formed = ctx.saved_tensors
        wanted = [need and want for need, want in zip(ctx.needs_input_grad[:3], ctx.wants, strict=True)]
        if not any(wanted) or all(g is None for g in upstream[:3]):
            return (None,) * 4
        given = [g if w else None for g, w in zip(formed, wanted, strict=True)]
        grads = _backward(given, stats, [dense(g) for g in upstream[:3]])
        return (*(g.to(t) if w else None for g, w, t in zip(grads, wanted, ctx.dtypes, strict=True)), None)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


def _constants(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor | None]:
    return [None if x is None else _flat(x.detach().to(like.device)) for x in tensors]


def _normalizer(weighting: Weighting, like: Tensor) -> tuple[float | None, Tensor | None]:
    """As `_forward` takes it; the weights of the seq-* reductions contain theirs."""
    if weighting.reduction.startswith("seq"):
        return 1.0, None
    if weighting.normalizer is None:
        return (None if weighting.reduction == "token-mean" else 1.0), None
    return temperature_pair(weighting.normalizer, like)


def fused_ppo_loss(
    policy: PolicyTensors | None,
    value: ValueTensors | None,
    mask: Tensor | None,
    policy_options: PolicyOptions,
    value_options: ValueOptions,
    weighting: Weighting,
) -> FusedLoss:
    """The losses of per-token tensors of one shape; differentiable in logprobs, entropy and values."""
    like = policy.advantages if policy is not None else value.returns if value is not None else None
    assert like is not None
    leaves = [policy and policy.logprobs, policy and policy.entropy, value and value.values]
    bonus = policy_options.entropy_coef != 0.0
    wants = [
        torch.is_grad_enabled() and x is not None and x.requires_grad and used
        for x, used in zip(leaves, (True, bonus, True), strict=True)
    ]
    sequences = weighting.reduction.startswith("seq")
    weights = token_weights(mask, like.float(), **weighting._asdict()) if sequences else None
    call = _Call(
        _constants(policy or (), like),
        _constants(value or (), like),
        _flat(mask),
        _flat(weights),
        *_normalizer(weighting, like),
        row_numbers(policy_options, value_options),
        policy_options.kl_kind,
        wants,
    )
    return FusedLoss(*_FusedPPOLoss.apply(*(_flat(x) for x in leaves), call))
