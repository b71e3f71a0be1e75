"""The losses as `nn.Module`s: options to the constructor, tensors to `forward`.

    loss = PolicyLossModule(clip_eps=0.1, dual_clip=3.0)
    loss(logprobs, old_logprobs, advantages, mask, entropy=entropy).loss.backward()

A module's options are the keyword-only parameters of its function that are not tensors, with their defaults; the
function's docstring describes both. No module has parameters or state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

from torch import nn

from .linear_cross_entropy import linear_cross_entropy
from .linear_ppo import linear_ppo_loss
from .ppo_loss import policy_loss, ppo_loss, value_loss
from .ppo_terms import PolicyOptions, ValueOptions
from .reductions import check_reduction


class LossModule(nn.Module):
    """A loss function that remembers its options.

    Raises:
        TypeError: an option that the function does not have.
        ValueError: a value that the function would refuse, whatever its tensors.
    """

    function: ClassVar[Callable[..., Any]]
    defaults: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, function: Callable[..., Any]) -> None:
        super().__init_subclass__()
        parameters = [p for p in inspect.signature(function).parameters.values() if _is_option(p)]
        cls.function = staticmethod(function)
        cls.defaults = {p.name: p.default for p in parameters}
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        unknown = options.keys() - self.defaults.keys()
        if unknown:
            known = ", ".join(self.defaults)
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}; it has {known}")
        self.options = {**self.defaults, **options}
        self.check_options()

    def check_options(self) -> None:
        if "reduction" in self.options:
            check_reduction(self.options["reduction"])
        for name in ("temperature", "softcap"):
            value = self.options.get(name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def chosen(self, *names: str) -> list[Any]:
        return [self.options[name] for name in names]

    def forward(self, *tensors: Any, **more: Any) -> Any:
        """The function's result; `more` are its tensors by name, and options that go before the module's."""
        return self.function(*tensors, **{**self.options, **more})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _is_option(parameter: inspect.Parameter) -> bool:
    """Keyword-only, and not a tensor: those are annotated as such and absent by default."""
    keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
    return keyword and (parameter.default is not None or "Tensor" not in str(parameter.annotation))


_POLICY = [field.name for field in fields(PolicyOptions)]


class PolicyLossModule(LossModule, function=policy_loss):
    """`policy_loss`: forward(logprobs, old_logprobs, advantages, mask=None, *, ...) -> PolicyLoss."""

    def check_options(self) -> None:
        super().check_options()
        PolicyOptions(*self.chosen(*_POLICY))


class ValueLossModule(LossModule, function=value_loss):
    """`value_loss`: forward(values, old_values, returns, mask=None, *, ...) -> ValueLoss."""

    def check_options(self) -> None:
        super().check_options()
        ValueOptions(*self.chosen("clip_eps", "coef"))


class PPOLossModule(LossModule, function=ppo_loss):
    """`ppo_loss`: forward(logprobs, old_logprobs, advantages, values, old_values, returns, mask=None, *, ...)
    -> PPOLoss."""

    def check_options(self) -> None:
        super().check_options()
        PolicyOptions(*self.chosen(*_POLICY))
        ValueOptions(*self.chosen("value_clip_eps", "value_coef"))


class LinearPPOLossModule(LossModule, function=linear_ppo_loss):
    """`linear_ppo_loss`: forward(hidden, weight, labels, old_logprobs, advantages, mask=None, *, ...)
    -> LinearPPOLoss."""

    def check_options(self) -> None:
        super().check_options()
        PolicyOptions(*self.chosen(*_POLICY))


class LinearCrossEntropyModule(LossModule, function=linear_cross_entropy):
    """`linear_cross_entropy`: forward(hidden, weight, labels, row_weights=None, *, ...) -> LinearCrossEntropy."""
