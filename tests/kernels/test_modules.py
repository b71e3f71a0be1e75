"""The losses as modules: what they compute is the functions', what they show and refuse is theirs."""

import inspect
from typing import Any

import pytest
import torch
from ppomax.kernels import api
from ppomax.kernels.modules import (
    LinearCrossEntropyModule,
    LinearPPOLossModule,
    PolicyLossModule,
    PPOLossModule,
    ValueLossModule,
)

MODULES = {
    PolicyLossModule: api.policy_loss,
    ValueLossModule: api.value_loss,
    PPOLossModule: api.ppo_loss,
    LinearPPOLossModule: api.linear_ppo_loss,
    LinearCrossEntropyModule: api.linear_cross_entropy,
}
PER_CALL = {
    "importance_weights", "entropy", "ref_logprobs", "normalizer", "cu_seqlens", "whiten", "bias", "weight_grad",
}  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_option_of_the_function_and_no_tensor(module: Any) -> None:
    parameters = inspect.signature(MODULES[module]).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in PER_CALL}
    assert module().options == options
    assert {p.name: p.default for p in inspect.signature(module).parameters.values()} == options
    assert getattr(api, module.__name__) is module
    assert not list(module().state_dict())


@pytest.mark.usefixtures("path")
def test_token_losses_are_the_functions(tokens: Any) -> None:
    fields = tokens([5, 3])
    options = {
        "dual_clip": 3.0,
        "entropy_coef": 0.1,
        "kl_coef": 0.2,
        "kl_kind": "k2",
        "reduction": "seq-mean-token-sum",
    }
    tensors = {"entropy": fields["entropy"], "ref_logprobs": fields["ref_logprobs"], "normalizer": 3.0}
    policy, critic = fields.policy(), fields.critic()
    pairs = [
        (PolicyLossModule(**options)(*policy, fields.mask, **tensors),
         api.policy_loss(*policy, fields.mask, **options, **tensors)),
        (ValueLossModule(clip_eps=None, coef=1.0)(*critic, mask=fields.mask),
         api.value_loss(*critic, fields.mask, clip_eps=None, coef=1.0)),
        (PPOLossModule(value_coef=2.0, **options)(*policy, *critic, fields.mask, **tensors),
         api.ppo_loss(*policy, *critic, fields.mask, value_coef=2.0, **options, **tensors)),
    ]  # fmt: skip
    for ours, functional in pairs:
        assert type(ours) is type(functional)
        torch.testing.assert_close(ours, functional, rtol=0, atol=0)


def test_linear_losses_are_the_functions(head_inputs: Any) -> None:
    hidden, weight, bias, labels = head_inputs(6, 8, 11)
    old_logprobs, advantages = -torch.rand(6), torch.randn(6)
    given = (hidden, weight, labels, old_logprobs, advantages)
    ours = LinearPPOLossModule(temperature=0.7, clip_eps=0.1)(*given, bias=bias)
    functional = api.linear_ppo_loss(*given, bias=bias, temperature=0.7, clip_eps=0.1)
    torch.testing.assert_close(ours, functional, rtol=0, atol=0)
    module = LinearCrossEntropyModule(softcap=5.0)
    functional = api.linear_cross_entropy(hidden, weight, labels, softcap=5.0)
    torch.testing.assert_close(module(hidden, weight, labels), functional, rtol=0, atol=0)
    leaves = (hidden, weight)
    for a, b in zip(
        torch.autograd.grad(module(*leaves, labels).loss, leaves),
        torch.autograd.grad(functional.loss, leaves),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_an_option_of_the_call_goes_before_the_modules() -> None:
    x = torch.zeros(3)
    module = PolicyLossModule(reduction="token-sum")
    assert float(module(x, x, x + 1).loss) == -3.0
    assert float(module(x, x, x + 1, reduction="token-mean").loss) == -1.0
    assert module.options["reduction"] == "token-sum"


def test_options_are_shown() -> None:
    assert repr(ValueLossModule(clip_eps=None, coef=1.0)) == (
        "ValueLossModule(clip_eps=None, coef=1.0, reduction='token-mean')"
    )
    assert "dual_clip=3.0, entropy_coef=0.0" in repr(torch.nn.Sequential(PPOLossModule(dual_clip=3.0)))


def test_compiles_in_one_graph() -> None:
    module, old, advantages = PolicyLossModule(clip_eps=0.1), -torch.rand(9), torch.randn(9)
    x = (-torch.rand(9)).requires_grad_()
    compiled = torch.compile(lambda x: module(x, old, advantages).loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(module(x, old, advantages).loss, x)[0]
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], expected)


@pytest.mark.parametrize(
    ("module", "options", "error", "match"),
    [
        (PolicyLossModule, {"clip": 0.1}, TypeError, "no option clip; it has clip_eps, "),
        (ValueLossModule, {"dual_clip": 3.0}, TypeError, "no option dual_clip"),
        (PolicyLossModule, {"normalizer": 3.0}, TypeError, "no option normalizer"),
        (PolicyLossModule, {"clip_eps": -0.1}, ValueError, "must not be negative"),
        (PolicyLossModule, {"kl_kind": "k4"}, ValueError, "unknown KL estimator"),
        (PolicyLossModule, {"reduction": "mean"}, ValueError, "unknown reduction"),
        (ValueLossModule, {"clip_eps": -1.0}, ValueError, "must not be negative"),
        (PPOLossModule, {"dual_clip": 0.9}, ValueError, "dual_clip"),
        (PPOLossModule, {"value_clip_eps": -1.0}, ValueError, "must not be negative"),
        (LinearPPOLossModule, {"temperature": 0.0}, ValueError, "temperature must be positive"),
        (LinearPPOLossModule, {"log_ratio_clamp": -1.0}, ValueError, "log_ratio_clamp"),
        (LinearCrossEntropyModule, {"softcap": -5.0}, ValueError, "softcap must be positive"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else None,
)
def test_refusals(module: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        module(**options)
