"""The adapters over both paths of the operations: Triton's results are those of torch in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppomax.kernels.adapters import nemo_rl, openrlhf, skyrl, torchtune, trl, verl
from torch import Tensor

ALGORITHM = SimpleNamespace(
    clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={"dp_size": 2, "batch_num_tokens": 9},
    get=lambda name, default: default, eps_clip_low=0.2, eps_clip_high=0.3, policy_loss_type="ppomax",
    value_clip=0.2, off_policy_correction=None,
)  # fmt: skip


def batch(dtype: torch.dtype) -> SimpleNamespace:
    """Per-token fields [2, 5] and an LM head; the same in every dtype, up to rounding."""
    torch.manual_seed(0)
    names = ("new", "old", "rollout", "ref", "advantages", "values", "old_values", "returns")
    f = SimpleNamespace(**{name: torch.randn(2, 5).to(dtype) * 0.4 - 1.0 for name in names})
    f.mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 0, 0]]).bool()
    f.hidden, f.weight = torch.randn(2, 5, 16).to(dtype), torch.randn(33, 16).to(dtype)
    f.labels = torch.randint(0, 33, (2, 5))
    for x in (f.new, f.values, f.hidden):
        x.requires_grad_()
    return f


def nemo(f: Any) -> Tensor:
    pad = torch.nn.functional.pad
    fields = {"prev_logprobs": f.old, "generation_logprobs": f.rollout, "reference_policy_logprobs": f.ref}
    data = {name: pad(x, (1, 0)) for name, x in (fields | {"advantages": f.advantages}).items()}
    data |= {"token_mask": pad(f.mask, (1, 0)), "sample_mask": torch.ones(2)}
    config = {
        "sequence_level_importance_ratios": True, "token_level_loss": False, "use_importance_sampling_correction": True,
    }  # fmt: skip
    return nemo_rl.ClippedPGLossFn(config)(f.new, data, torch.tensor(2.0), torch.tensor(6.0))[0]


CALLS: dict[str, Any] = {
    "verl": lambda f: verl.compute_policy_loss_vanilla(
        f.old, f.new, f.advantages, f.mask, config=ALGORITHM, rollout_is_weights=f.returns
    )[0],
    "verl-head": lambda f: sum(verl.FusedLinearForPPO()(f.hidden, f.weight, f.labels)).sum(),
    "trl-whiten": lambda f: (trl.masked_whiten(f.values, f.mask) ** 3).sum(),
    "trl-log-probs": lambda f: trl.selective_log_softmax(f.hidden, f.labels % 16).sum(),
    "torchtune": lambda f: torchtune.PPOLoss()(
        f.old, f.new, f.advantages, f.old_values, f.values, f.returns, f.mask, f.mask
    )[0],
    "openrlhf": lambda f: openrlhf.PolicyLoss(policy_loss_type="gspo")(f.new, f.old, f.advantages, f.mask)[0],
    "openrlhf-corrected": lambda f: openrlhf.PolicyLoss(is_correction_level="seq")(
        f.new, f.old, f.advantages, f.mask, f.rollout
    )[0],
    "skyrl": lambda f: skyrl.ppo_policy_loss(f.new, f.old, f.advantages, ALGORITHM, f.mask)[0],
    "skyrl-critic": lambda f: skyrl.ppo_critic_loss(f.values, f.old_values, f.returns, ALGORITHM, f.mask)[0],
    "nemo-rl": nemo,
}


@pytest.mark.parametrize("name", CALLS)
def test_losses_and_gradients(name: str, path: str, same: Any) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        f = batch(dtype)
        loss = CALLS[name](f)
        leaves = [x for x in (f.new, f.values, f.hidden) if _reaches(loss, x)]
        results.append([loss, *torch.autograd.grad(loss, leaves)])
        assert len(results[-1]) > 1
    for x, exact in zip(*results, strict=True):
        same(x, exact.detach().double(), ulps=512)


def _reaches(loss: Tensor, leaf: Tensor) -> bool:
    return torch.autograd.grad(loss, leaf, retain_graph=True, allow_unused=True)[0] is not None


def test_advantages(path: str, same: Any) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        f = batch(dtype)
        whitened, returns = verl.compute_gae_advantage_return(f.returns, f.old_values, f.mask, 0.99, 0.95)
        results.append([whitened, returns, openrlhf.compute_reward(f.ref[:, 0], 0.1, f.rollout, f.mask)])
    for x, exact in zip(*results, strict=True):
        same(x, exact, ulps=512)
