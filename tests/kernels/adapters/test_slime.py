"""The slime adapter against loops over slime's documented conventions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppomax.kernels.adapters import slime

LENGTHS = [4, 1, 7, 3]


@pytest.mark.parametrize("dual", [None, 1.4, 1.05])
def test_terms(dual: float | None, fields: Any, loops: Any, same: Any) -> None:
    f = fields(garbage=None, gaps=False)
    f.mask = torch.ones_like(f.mask)
    f.advantages[0, :2] = 0.0
    kl = f.old_logprobs - f.logprobs
    kl[0, 0], kl[0, 1] = 1.0, -1.0
    kl.requires_grad_()
    terms, clipped = slime.compute_policy_loss(kl, f.advantages, 0.15, 0.3, dual)
    rows = zip(kl.detach().double().tolist(), f.rows("advantages"), strict=True)
    exact = [[loops.clipped(-k, 0.0, a, 0.15, 0.3, dual) for k, a in zip(*row, strict=True)] for row in rows]
    same(terms, [[t.term for t in row] for row in exact])
    same(clipped, [[t.held for t in row] for row in exact])
    same(torch.autograd.grad(terms.sum(), kl)[0], [[-t.slope for t in row] for row in exact])
    assert 0 < float(clipped.sum()) < clipped.numel()


@pytest.mark.parametrize("per_token", [False, True], ids=["samples", "tokens"])
def test_reducer(per_token: bool, dtype: torch.dtype, loops: Any, same: Any) -> None:
    """Garbage in masked terms, and a sample without an unmasked one."""
    masks = [(torch.rand(n) > 0.3).float() for n in LENGTHS]
    masks[2][:], masks[1][:] = 0.0, 1.0
    terms = torch.randn(sum(LENGTHS), dtype=dtype)
    dirty = torch.where(torch.cat(masks) != 0, terms, torch.nan).requires_grad_()
    reducer = slime.get_pg_loss_reducer([9] * 4, LENGTHS, masks, per_token)
    rows = [x.double().tolist() for x in terms.split(LENGTHS)]
    keep = [(m != 0).tolist() for m in masks]
    means = [loops.row_mean(row, flags) for row, flags in zip(rows, keep, strict=True)]
    sizes = [sum(flags) for flags in keep]
    loss = reducer(dirty)
    same(loss, sum(m * (n if per_token else 1) for m, n in zip(means, sizes, strict=True)))
    weights = [float(k) / (1 if per_token or not n else n) for flags, n in zip(keep, sizes, strict=True) for k in flags]
    same(torch.autograd.grad(loss, dirty)[0], weights)
    with pytest.raises(ValueError, match="context parallelism"):
        reducer(terms[1:])


def test_advantages(dtype: torch.dtype, loops: Any, same: Any) -> None:
    kl, values = (list(torch.randn(sum(LENGTHS), dtype=dtype).split(LENGTHS)) for _ in range(2))
    masks = [torch.zeros(n) for n in LENGTHS]  # they play no part
    data = {"rewards": [1.0, -2.0, 0.5, 3.0], "kl": kl, "values": values, "response_lengths": LENGTHS}
    slime.compute_advantages_and_returns(
        SimpleNamespace(kl_coef=0.1, gamma=0.99, lambd=0.95), data | {"loss_masks": masks}
    )
    assert "advantages" not in data
    slime.compute_advantages_and_returns(SimpleNamespace(kl_coef=0.1, gamma=0.99, lambd=0.95), data)
    for i, n in enumerate(LENGTHS):
        rewards = [-0.1 * x for x in kl[i].double().tolist()]
        rewards[-1] += data["rewards"][i]  # type: ignore[index]
        advantages, returns = loops.discounted(rewards, values[i].double().tolist(), None, 0.99, 0.95)
        assert data["advantages"][i].shape == (n,)  # type: ignore[index]
        same(data["advantages"][i], advantages, ulps=64)  # type: ignore[index]
        same(data["returns"][i], returns, ulps=64)  # type: ignore[index]
    with pytest.raises(ValueError, match="context parallelism"):
        slime.compute_advantages_and_returns(SimpleNamespace(), data | {"response_lengths": [9, 9, 9, 9]})


def test_install(fake_package: Any) -> None:
    """As `--custom-megatron-init-path` calls it; in the trainer's module too."""
    theirs = object()
    utils = fake_package("slime.utils.ppo_utils", compute_policy_loss=theirs)
    trainer = fake_package("slime.backends.megatron_utils.loss", compute_policy_loss=theirs)
    slime.install(SimpleNamespace())
    assert trainer.compute_policy_loss is utils.compute_policy_loss is slime.compute_policy_loss
    slime.uninstall()
    assert trainer.compute_policy_loss is utils.compute_policy_loss is theirs
