"""GAE: against a loop written from the paper, packed and padded, masked, bootstrapped, long."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ppomax.kernels.gae import gae, gae_ref, shaped_gae, shaped_gae_ref
from ppomax.kernels.kl import kl_penalty
from torch import Tensor

pytestmark = pytest.mark.usefixtures("path", "poisoned")


@pytest.fixture
def small_blocks(path: str) -> Iterator[None]:
    """Triton blocks of 32 tokens and of 4 sequences, so that small inputs take several."""
    with ExitStack() as stack:
        if path == "triton":
            from ppomax.kernels.gpu.launch import overriding

            for name in ("gae", "shaped_gae"):
                stack.enter_context(overriding(name, {"BLOCK_T": 32, "BLOCK_S": 4, "num_warps": 1}))
        yield


@pytest.fixture
def fields(path: str) -> Callable[..., list[Tensor]]:
    """fields(2, *shape): so many random tensors, fp64 on the torch path and fp32 on the other."""
    dtype = torch.float64 if path == "torch" else torch.float32
    return lambda number, *shape: list(torch.randn(number, *shape, dtype=dtype))


def paper_gae(rewards: Tensor, values: Tensor, last: float, gamma: float, gae_lambda: float) -> Tensor:
    """arXiv 1506.02438, equation 16, as the double sum that it is: A_t = sum_l (gamma lambda)^l delta_{t+l}."""
    r, v, n = rewards.tolist(), values.tolist(), rewards.numel()
    after = [*v[1:], last]
    delta = [r[t] + gamma * after[t] - v[t] for t in range(n)]
    advantages = [sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
    return torch.tensor(advantages, dtype=torch.float64)


def column_loop(rewards: Tensor, values: Tensor, last: float | Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """What trainers run: a step in time for all sequences, in the inputs' dtype."""
    advantages, carry = torch.zeros_like(rewards), torch.zeros_like(rewards[..., 0])
    for t in reversed(range(rewards.shape[-1])):
        after = values[..., t + 1] if t + 1 < rewards.shape[-1] else last
        carry = rewards[..., t] + gamma * after - values[..., t] + gamma * gae_lambda * carry
        advantages[..., t] = carry
    return advantages


def by_sequence(
    one: Any, rewards: Tensor, values: Tensor, mask: Tensor, bounds: list[int], last: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of packed sequences by `one`, each with its masked tokens cut out; 0 in their places."""
    advantages, returns = torch.zeros(2, rewards.numel(), dtype=torch.float64 if one is paper_gae else rewards.dtype)
    for s, (start, stop) in enumerate(pairwise(bounds)):
        kept = [t for t in range(start, stop) if bool(mask[t])]
        if kept:
            end = 0.0 if last is None else float(last[s])
            advantages[kept] = one(rewards[kept], values[kept], end, **options)
            returns[kept] = advantages[kept] + values[kept]
    return advantages, returns


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("gamma", [1.0, 0.97])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 65, 197])
def test_is_the_papers(length: int, gae_lambda: float, gamma: float, fields: Any, no_worse: Any) -> None:
    rewards, values = fields(2, 2, length)
    flat = (rewards.flatten(), values.flatten(), torch.ones(2 * length), [0, length, 2 * length])
    options = {"gamma": gamma, "gae_lambda": gae_lambda}
    for last in (None, *fields(1, 2)):
        out = gae(rewards, values, bootstrap_values=last, **options)
        assert out.advantages.dtype == rewards.dtype
        plain, exact = (by_sequence(f, *flat, last, **options) for f in (column_loop, paper_gae))
        no_worse([x.flatten() for x in out], plain, exact)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("bootstrap", [False, True])
def test_masked_tokens_are_transparent(bootstrap: bool, fields: Any, no_worse: Any) -> None:
    """Each sequence equals the one with its masked tokens cut out, wherever they lie and whatever they hold."""
    rewards, values = fields(2, 5, 90)
    mask = torch.rand(5, 90) > 0.4
    mask[0, -40:], mask[1, :40], mask[2], mask[3] = False, False, False, True
    rewards[~mask], values[~mask] = torch.nan, torch.inf
    last = fields(1, 5)[0] if bootstrap else None
    out = gae(rewards, values, mask=mask, bootstrap_values=last, gamma=0.98)
    flat = (rewards.flatten(), values.flatten(), mask.flatten(), list(range(0, 451, 90)))
    plain, exact = (by_sequence(f, *flat, last, gamma=0.98, gae_lambda=0.95) for f in (column_loop, paper_gae))
    no_worse([x.flatten() for x in out], plain, exact)
    for x in out:
        assert torch.equal(x[~mask], torch.zeros_like(x[~mask]))


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    holes=st.sampled_from([0.0, 0.3, 1.0]),
    bootstrap=st.booleans(),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 1000),
)
def test_packed_equals_padded(
    lengths: list[int], holes: float, bootstrap: bool, index: torch.dtype, seed: int, fields: Any, no_worse: Any
) -> None:
    torch.manual_seed(seed)
    longest = max(*lengths, 1)
    rewards, values = fields(2, len(lengths), longest)
    present = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = present & (torch.rand(present.shape) >= holes)
    last = fields(1, len(lengths))[0] if bootstrap else None
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(index)
    padded = gae(rewards, values, mask=mask, bootstrap_values=last)
    packed = gae(rewards[present], values[present], mask=mask[present], cu_seqlens=bounds, bootstrap_values=last)
    exact = gae_ref(rewards, values, mask=mask, bootstrap_values=last)
    flat = (rewards[present], values[present], mask[present], bounds.tolist())
    plain = by_sequence(column_loop, *flat, last, gamma=1.0, gae_lambda=0.95)
    no_worse(packed, plain, [x[present] for x in exact])
    no_worse([x[present] for x in padded], plain, [x[present] for x in exact])
    assert not any(bool(x[~mask].any()) for x in padded)


@pytest.mark.parametrize("gae_lambda", [1.0, 0.95])
@pytest.mark.parametrize("length", [700, 8192])
def test_fp32_error_of_long_sequences(length: int, gae_lambda: float, no_worse: Any) -> None:
    rewards, values = torch.randn(2, 2, length)
    exact, plain = (
        column_loop(r, v, 0.0, 1.0, gae_lambda) for r, v in ((rewards.double(), values.double()), (rewards, values))
    )
    out = gae(rewards, values, gae_lambda=gae_lambda)
    no_worse(out, (plain, plain + values), (exact, exact + values))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_fp32_error_where_values_hardly_change(offset: float, no_worse: Any) -> None:
    """Differences of neighbouring values survive: nothing of the values' own size is summed up."""
    rewards, values = torch.zeros(1, 500), offset + torch.linspace(0, 0.1, 500)[None]
    rewards[0, -1] = offset
    plain, exact = (
        column_loop(r, v, 0.0, 1.0, 0.95) for r, v in ((rewards, values), (rewards.double(), values.double()))
    )
    no_worse([gae(rewards, values).advantages], [plain], [exact])


def test_undiscounted_advantage_is_the_sum_of_what_follows() -> None:
    rewards = torch.zeros(1, 20_000)
    rewards[0, -1] = 3.0
    out = gae(rewards, torch.ones(1, 20_000), gae_lambda=1.0)
    torch.testing.assert_close(out.advantages, torch.full((1, 20_000), 2.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.returns, torch.full((1, 20_000), 3.0), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kl_kind", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_shaped_gae(bootstrap: bool, kl_kind: Any, fields: Any, no_worse: Any) -> None:
    lengths = [5, 1, 0, 130, 7]
    bounds, n = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), sum(lengths)
    (scores,), (values, logprobs, noise) = fields(1, 5), fields(3, n)
    ref = logprobs + 0.1 * noise
    mask = torch.rand(n) > 0.3
    mask[5] = False  # the only token of the second sequence
    mask[-1] = False  # the score of the last one moves to an earlier token
    last = fields(1, 5)[0] if bootstrap else None
    steps = {"gamma": 0.99, "gae_lambda": 0.95}
    options: dict[str, Any] = {"mask": mask, "bootstrap_values": last, "kl_coef": 0.3, "kl_kind": kl_kind, **steps}
    out = shaped_gae(scores, logprobs, ref, values, bounds, **options)

    rewards = {}
    for dtype in (values.dtype, torch.float64):
        kl = torch.where(mask, kl_penalty(logprobs.to(dtype), ref.to(dtype), kl_kind), 0.0)
        rewards[dtype] = (-0.3 * kl, kl)
        for s, (start, stop) in enumerate(pairwise(bounds.tolist())):
            if kept := [t for t in range(start, stop) if mask[t]]:
                rewards[dtype][0][kept[-1]] += scores[s].to(dtype)
    packed = (mask, bounds.tolist(), last)
    plain = by_sequence(column_loop, rewards[values.dtype][0], values, *packed, **steps)
    exact = by_sequence(paper_gae, rewards[torch.float64][0], values.double(), *packed, **steps)
    no_worse(out[:4], [*plain, *rewards[values.dtype]], [*exact, *rewards[torch.float64]])
    assert float(out.count) == int(mask.sum())
    no_worse(out[5:], moments(plain[0][mask]), moments(exact[0][mask]))
    oracle = shaped_gae_ref(scores, logprobs, ref, values, bounds, **options)
    known = (*exact, *rewards[torch.float64], out.count.double(), *moments(exact[0][mask]))
    torch.testing.assert_close(tuple(oracle), known, rtol=1e-11, atol=1e-12)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, sum of squared distances from it)"""
    return x.mean(), (x - x.mean()).square().sum()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_of_advantages_far_from_zero(offset: float, no_worse: Any) -> None:
    """With lambda = 0 and no values the advantages are the rewards, whose mean may hide their spread."""
    lengths = [3, 0, 70, 1, 40, 12, 0, 5, 33]
    bounds, n = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    logprobs, zeros = offset + 0.1 * torch.randn(n), torch.zeros(n)
    out = shaped_gae(torch.zeros(9), logprobs, zeros, zeros, bounds, kl_coef=-1.0, gae_lambda=0.0)
    assert torch.equal(out.advantages, logprobs)
    assert float(out.count) == n
    no_worse(out[5:], moments(logprobs), moments(logprobs.double()))


@pytest.mark.usefixtures("small_blocks")
def test_same_bits_every_time() -> None:
    lengths = torch.randint(0, 60, (40,)).tolist()
    bounds, n = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    inputs = (torch.randn(40), *torch.randn(3, n), bounds)
    first = shaped_gae(*inputs, mask=torch.arange(n) % 5 > 0, kl_coef=0.1, kl_kind="k3")
    again = shaped_gae(*inputs, mask=torch.arange(n) % 5 > 0, kl_coef=0.1, kl_kind="k3")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


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
    for scores, bounds in ((torch.ones(1), torch.tensor([0, 0])), (empty, torch.tensor([0]))):
        shaped = shaped_gae(scores, empty, empty, empty, bounds, kl_coef=0.1)
        assert (float(shaped.count), float(shaped.mean), float(shaped.m2)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    rewards, values = torch.randn(2, 3, 70)
    out = gae(rewards, values.to(dtype), bootstrap_values=values[:, 0].to(dtype))
    expected = gae(rewards, values.to(dtype).float(), bootstrap_values=values[:, 0].to(dtype).float())
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_strided_inputs() -> None:
    rewards, values, last = torch.randn(70, 6).T[::2], torch.randn(3, 140)[:, ::2], torch.randn(6)[::2]
    mask = torch.arange(70).remainder(4).gt(0).expand(3, 70)
    strided = gae(rewards, values, mask=mask, bootstrap_values=last)
    plain = gae(*(x.clone(memory_format=torch.contiguous_format) for x in (rewards, values)),
                mask=mask.clone(), bootstrap_values=last.clone())  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))
    tokens, bounds = torch.randn(40, 3), torch.tensor([[0, 9], [13, 9], [40, 9]])[:, 0]
    out = shaped_gae(last[:2], *tokens.unbind(1), bounds, kl_coef=0.1)
    again = shaped_gae(last[:2].clone(), *tokens.T.contiguous(), bounds.clone(), kl_coef=0.1)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))


def test_no_gradient_flows_and_inputs_stay() -> None:
    rewards, values = torch.randn(2, 70), torch.randn(2, 70, requires_grad=True)
    before = rewards.clone()
    out = gae(rewards, values)
    assert not out.advantages.requires_grad
    assert torch.equal(rewards, before)


def test_autocast_changes_nothing() -> None:
    rewards, values = torch.randn(2, 3, 70)
    expected = gae(rewards, values)
    with torch.autocast(rewards.device.type, dtype=torch.bfloat16):
        assert torch.equal(gae(rewards, values).advantages, expected.advantages)


def test_compiles_in_one_graph() -> None:
    scores, logprobs, ref, values = torch.randn(3), *torch.randn(3, 20)
    bounds, mask = torch.tensor([0, 4, 4, 20], dtype=torch.int32), torch.arange(20) % 3 > 0

    def both() -> tuple[Tensor, ...]:
        shaped = shaped_gae(scores, logprobs, ref, values, bounds, mask=mask, kl_coef=0.1, kl_kind="k3")
        padded = gae(shaped.rewards.view(2, 10), values.view(2, 10), bootstrap_values=scores[:2])
        return (*shaped, *padded)

    expected = both()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")()
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))


def test_custom_ops_are_sound() -> None:
    tokens, bounds, mask = torch.randn(3, 9), torch.tensor([0, 4, 9]), torch.arange(9) % 4 > 0
    ops = torch.ops.ppomax
    torch.library.opcheck(ops.gae.default, (tokens, tokens * 2, mask.expand(3, 9), None, torch.randn(3), 0.9, 0.8))
    torch.library.opcheck(ops.gae.default, (tokens[0], tokens[1], None, bounds, None, 1.0, 0.95))
    shaped = (torch.randn(2), *tokens, bounds, mask, torch.randn(2), 0.1, "k3", 1.0, 0.95)
    torch.library.opcheck(ops.shaped_gae.default, shaped)


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
