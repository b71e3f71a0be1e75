"""GAE: against a loop written from the paper, packed and padded, masked, bootstrapped, long."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ppomax.kernels.gae import BLOCK, decayed_sums, gae, gae_ref, shaped_gae, shaped_gae_ref
from ppomax.kernels.kl import kl_penalty
from torch import Tensor


def paper_gae(
    rewards: list[float], values: list[float], bootstrap: float, gamma: float, gae_lambda: float
) -> tuple[list[float], list[float]]:
    """arXiv 1506.02438, equation 16, as the double sum that it is: A_t = sum_l (gamma lambda)^l delta_{t+l}."""
    n = len(rewards)
    after = [*values[1:], bootstrap]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    advantages = [sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def fields(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)


def check_rows(advantages: Tensor, returns: Tensor, rewards: Tensor, values: Tensor, **options: Any) -> None:
    """One sequence without masked tokens against the paper."""
    a, r = paper_gae(rewards.tolist(), values.tolist(), **options)
    torch.testing.assert_close(advantages, torch.tensor(a, dtype=torch.float64), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(returns, torch.tensor(r, dtype=torch.float64), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.97])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_is_the_papers(length: int, gae_lambda: float, gamma: float) -> None:
    rewards, values = fields(2, length)
    bootstrap = torch.randn(2, dtype=torch.float64)
    options = {"gamma": gamma, "gae_lambda": gae_lambda}
    for boot in (None, bootstrap):
        out = gae(rewards, values, bootstrap_values=boot, **options)
        for b in range(2):
            last = 0.0 if boot is None else float(boot[b])
            check_rows(out.advantages[b], out.returns[b], rewards[b], values[b], bootstrap=last, **options)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_masked_tokens_are_transparent(bootstrap: bool) -> None:
    """Each sequence equals the one with its masked tokens cut out, wherever they lie and whatever they hold."""
    rewards, values = fields(5, 90)
    mask = torch.rand(5, 90) > 0.4
    mask[0, -30:], mask[1, :20], mask[2], mask[3] = False, False, False, True
    rewards[~mask], values[~mask] = torch.nan, torch.inf
    boot = torch.randn(5, dtype=torch.float64) if bootstrap else None
    out = gae(rewards, values, mask=mask, bootstrap_values=boot, gamma=0.98)
    for b in range(5):
        m = mask[b]
        last = 0.0 if boot is None else float(boot[b])
        check_rows(
            out.advantages[b][m], out.returns[b][m], rewards[b][m], values[b][m],
            bootstrap=last, gamma=0.98, gae_lambda=0.95,
        )  # fmt: skip
    for x in out:
        assert torch.equal(x[~mask], torch.zeros_like(x[~mask]))


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=6),
    holes=st.sampled_from([0.0, 0.3, 1.0]),
    bootstrap=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_packed_equals_padded(lengths: list[int], holes: float, bootstrap: bool, seed: int) -> None:
    torch.manual_seed(seed)
    longest = max(*lengths, 1)
    rewards, values = fields(len(lengths), longest)
    present = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = present & (torch.rand(present.shape) >= holes)
    boot = torch.randn(len(lengths), dtype=torch.float64) if bootstrap else None
    padded = gae(rewards, values, mask=mask, bootstrap_values=boot)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = gae(rewards[present], values[present], mask=mask[present], cu_seqlens=bounds, bootstrap_values=boot)
    for a, b in zip(packed, padded, strict=True):
        torch.testing.assert_close(a, b[present], rtol=1e-12, atol=1e-12)
    exact = gae_ref(rewards, values, mask=mask, bootstrap_values=boot)
    torch.testing.assert_close(padded, exact, rtol=1e-11, atol=1e-11)


def column_loop(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """What trainers run: a step in time for all sequences, in the inputs' dtype."""
    advantages, carry = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        after = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        carry = rewards[:, t] + gamma * after - values[:, t] + gamma * gae_lambda * carry
        advantages[:, t] = carry
    return advantages, advantages + values


@pytest.mark.parametrize("gae_lambda", [1.0, 0.95])
@pytest.mark.parametrize("length", [700, 8192])
def test_fp32_error_of_long_sequences(length: int, gae_lambda: float, no_worse: Any) -> None:
    rewards, values = torch.randn(4, length), torch.randn(4, length)
    options = {"gamma": 1.0, "gae_lambda": gae_lambda}
    exact = column_loop(rewards.double(), values.double(), **options)
    no_worse(gae(rewards, values, **options), column_loop(rewards, values, **options), exact)


def test_undiscounted_advantage_is_the_sum_of_what_follows() -> None:
    rewards = torch.zeros(1, 20_000)
    rewards[0, -1] = 3.0
    out = gae(rewards, torch.ones(1, 20_000), gae_lambda=1.0)
    torch.testing.assert_close(out.advantages, torch.full((1, 20_000), 2.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.returns, torch.full((1, 20_000), 3.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_decayed_sums_take_carries_through_several_levels(decay: float) -> None:
    lengths = torch.tensor([BLOCK * BLOCK + 7, 0, 3, BLOCK * BLOCK * 2])
    x = torch.randn(int(lengths.sum()), dtype=torch.float64)
    y = decayed_sums(x, lengths, decay)
    for part, whole in zip(x.split(lengths.tolist()), y.split(lengths.tolist()), strict=True):
        carry = torch.zeros((), dtype=torch.float64)
        for t in reversed(range(part.numel())):
            carry = part[t] + decay * carry
            assert float(whole[t]) == pytest.approx(float(carry), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("kl_kind", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_shaped_gae(bootstrap: bool, kl_kind: Any) -> None:
    lengths = [5, 1, 0, 130, 7]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    n = sum(lengths)
    scores, (values, logprobs) = torch.randn(5, dtype=torch.float64), fields(n)
    ref = logprobs + 0.1 * torch.randn(n, dtype=torch.float64)
    mask = torch.rand(n) > 0.3
    mask[5] = False  # the only token of the second sequence
    mask[-1] = False  # the score of the last one moves to an earlier token
    boot = torch.randn(5, dtype=torch.float64) if bootstrap else None
    options = {"mask": mask, "bootstrap_values": boot, "kl_coef": 0.3, "kl_kind": kl_kind, "gamma": 0.99}
    out = shaped_gae(scores, logprobs, ref, values, bounds, **options)
    torch.testing.assert_close(out, shaped_gae_ref(scores, logprobs, ref, values, bounds, **options))

    kl = kl_penalty(logprobs, ref, kl_kind)
    for s, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        kept = [t for t in range(start, stop) if mask[t]]
        rewards = [-0.3 * float(kl[t]) for t in kept]
        if kept:
            rewards[-1] += float(scores[s])
        last = 0.0 if boot is None else float(boot[s])
        check_rows(
            out.advantages[kept], out.returns[kept], torch.tensor(rewards, dtype=torch.float64), values[kept],
            bootstrap=last, gamma=0.99, gae_lambda=0.95,
        )  # fmt: skip
        torch.testing.assert_close(out.rewards[kept], torch.tensor(rewards, dtype=torch.float64))
    kept_advantages = out.advantages[mask]
    assert float(out.count) == kept_advantages.numel()
    torch.testing.assert_close(out.mean, kept_advantages.mean())
    torch.testing.assert_close(out.m2, kept_advantages.var(unbiased=False) * out.count)


def test_shaped_gae_ignores_what_masked_tokens_hold() -> None:
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    scores, logprobs, ref, values = torch.randn(2), *torch.randn(3, 9)
    mask = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0, 1]).bool()
    clean = shaped_gae(scores, logprobs, ref, values, bounds, mask=mask, kl_coef=0.1)
    for x in (logprobs, ref, values):
        x[~mask] = torch.nan
    dirty = shaped_gae(scores, logprobs, ref, values, bounds, mask=mask, kl_coef=0.1)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert all(t.dtype == torch.float32 for t in dirty)


def test_nothing_to_do() -> None:
    empty = torch.zeros(0)
    assert gae(empty, empty, cu_seqlens=torch.tensor([0, 0])).advantages.shape == (0,)
    assert gae(torch.zeros(3, 0), torch.zeros(3, 0)).returns.shape == (3, 0)
    masked = gae(torch.ones(2, 3), torch.ones(2, 3), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(masked.returns, torch.zeros(2, 3))
    shaped = shaped_gae(torch.ones(1), empty, empty, empty, torch.tensor([0, 0]), kl_coef=0.1)
    assert (float(shaped.count), float(shaped.mean), float(shaped.m2)) == (0.0, 0.0, 0.0)


def test_no_gradient_flows_and_inputs_stay() -> None:
    rewards, values = torch.randn(2, 70), torch.randn(2, 70, requires_grad=True)
    before = rewards.clone()
    out = gae(rewards, values)
    assert not out.advantages.requires_grad
    assert torch.equal(rewards, before)


def test_autocast_changes_nothing() -> None:
    rewards, values = torch.randn(2, 3, 70)[0], torch.randn(3, 70)
    expected = gae(rewards, values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gae(rewards, values).advantages, expected.advantages)


def test_wrong_arguments_raise() -> None:
    x = torch.zeros(2, 3)
    bounds = torch.tensor([0, 3])
    for match, call in {
        "shapes differ": lambda: gae(x, x[:, :2]),
        "are \\[B, T\\]": lambda: gae(x[0], x[0]),
        "packed \\[N\\]": lambda: gae(x, x, cu_seqlens=bounds),
        "mask has shape": lambda: gae(x, x, mask=torch.ones(3, 2)),
        "bootstrap_values": lambda: gae(x, x, bootstrap_values=torch.zeros(3)),
        "scores has": lambda: shaped_gae(torch.zeros(2), x[0], x[0], x[0], bounds, kl_coef=0.1),
        "shapes differ: \\(3": lambda: shaped_gae(torch.zeros(1), x[0], x[0], x[0, :2], bounds, kl_coef=0.1),
        "unknown KL": lambda: shaped_gae(torch.zeros(1), x[0], x[0], x[0], bounds, kl_coef=0.1, kl_kind="k9"),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
