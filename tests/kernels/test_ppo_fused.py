"""What autograd, torch.compile and the dispatcher see of the PPO losses, on both paths."""

from typing import Any

import pytest
import torch
from ppomax.kernels.ppo_loss import policy_loss, ppo_loss, value_loss
from ppomax.kernels.ppo_terms import PolicyOptions, ValueOptions, row_numbers
from torch import Tensor

pytestmark = pytest.mark.usefixtures("path")

LENGTHS = [40, 25, 1, 31]
LEAVES = ("logprobs", "entropy", "values")
ALL = {
    "clip_eps_high": 0.28, "dual_clip": 1.6, "entropy_coef": 0.1, "entropy_bound": 1.2, "kl_coef": 0.1,
    "importance_weights": True, "value_clip_eps": 0.3,
}  # fmt: skip


def losses(fields: Any) -> Any:
    return ppo_loss(*fields.policy(), *fields.critic(), fields.mask, **fields.options(ALL))


@pytest.mark.parametrize("wanted", [("logprobs",), ("entropy",), ("values",), ("entropy", "values")], ids=str)
def test_gradients_of_some_inputs(wanted: tuple[str, ...], tokens: Any) -> None:
    fields = tokens(LENGTHS)
    complete, given = fields.leaves(*LEAVES), fields.leaves(*wanted)
    for leaves in (complete, given):
        out = losses(leaves)
        (out.loss + 0.3 * out.policy_loss - 0.2 * out.value_loss).backward()
    for name in wanted:
        assert torch.equal(given[name].grad, complete[name].grad)
    assert all(given[name].grad is None for name in LEAVES if name not in wanted)


@pytest.mark.parametrize("output", [0, 1, 2], ids=["loss", "policy_loss", "value_loss"])
def test_gradient_of_one_loss_alone(output: int, tokens: Any) -> None:
    fields = tokens(LENGTHS).leaves(*LEAVES)
    parts = [
        torch.autograd.grad(
            losses(fields)[i], [fields[name] for name in LEAVES], allow_unused=True, materialize_grads=True
        )
        for i in (output, 1, 2)
    ]
    for ours, policy, value in zip(*parts, strict=True):
        expected = {0: policy + value, 1: policy, 2: value}[output]
        assert torch.equal(ours, expected)


def test_constants_and_statistics_take_no_gradient(tokens: Any) -> None:
    fields = tokens(LENGTHS)
    constants = fields.leaves("old_logprobs", "advantages", "ref_logprobs", "importance_weights", "returns")
    assert not losses(constants).loss.requires_grad
    out = losses(fields.leaves(*LEAVES))
    assert not any(s.requires_grad for s in (*out.policy_stats, *out.value_stats))
    with torch.no_grad():
        assert not losses(fields.leaves(*LEAVES)).loss.requires_grad


def test_retained_graph_and_scaled_upstream(tokens: Any) -> None:
    fields = tokens(LENGTHS).leaves(*LEAVES)
    loss, leaves = losses(fields).loss, [fields[name] for name in LEAVES]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves, torch.tensor(-2.0))
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(-2 * a, b)


def test_autocast_changes_nothing(tokens: Any) -> None:
    fields = tokens(LENGTHS).leaves(*LEAVES)
    leaves = [fields[name] for name in LEAVES]
    expected = losses(fields)
    with torch.autocast("cuda" if leaves[0].is_cuda else "cpu", torch.bfloat16):
        out = losses(fields)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for a, b in zip(*(torch.autograd.grad(each.loss, leaves) for each in (out, expected)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
def test_compiles_in_one_graph(reduction: str, tokens: Any) -> None:
    fields = tokens([7, 1, 9])
    constants, mask = dict(fields), fields.mask
    numbers = {k: v for k, v in ALL.items() if k != "importance_weights"}

    def loss(logprobs: Tensor, entropy: Tensor, values: Tensor) -> Tensor:
        policy = (logprobs * 1.0, constants["old_logprobs"], constants["advantages"])
        critic = (values * 1.0, constants["old_values"], constants["returns"])
        tensors = {name: constants[name] for name in ("importance_weights", "ref_logprobs")}
        out = ppo_loss(*policy, *critic, mask, entropy=entropy * 1.0, reduction=reduction, **tensors, **numbers)
        alone = policy_loss(*policy, mask).loss + value_loss(*critic, mask).loss
        return out.loss + out.policy_stats.approx_kl + alone

    torch.compiler.reset()  # the other path's graph
    leaves = [fields[name].requires_grad_() for name in LEAVES]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert torch.equal(a, b)


def test_custom_ops_are_sound(path: str, tokens: Any) -> None:
    if path == "torch":
        pytest.skip("the torch path has no operator")
    fields, ops = tokens([7, 4]).packed(), torch.ops.ppomax
    policy = [*fields.policy(), fields["importance_weights"], fields["entropy"], fields["ref_logprobs"], None, None]
    numbers = row_numbers(PolicyOptions(entropy_coef=0.1, kl_coef=0.2), ValueOptions())
    for wants in ([True, True, True], [False, False, True]):
        arguments = (policy, fields.critic(), fields.mask, None, None, None, list(numbers), "k3", wants)
        torch.library.opcheck(ops.ppo_loss_forward.default, arguments)
        *_, stats, a, b, c = ops.ppo_loss_forward(*arguments)
        grads = [g if wanted else None for g, wanted in zip((a, b, c), wants, strict=True)]
        torch.library.opcheck(ops.ppo_loss_backward.default, (grads, stats, [torch.tensor(2.0), None, None]))
