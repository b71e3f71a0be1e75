"""Packed and paged attention inside unmodified transformers models, against transformers' own on each sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ppomax.engine.attention import ATTENTION, Paged, Varlen, _attend, _one_by_one
from ppomax.engine.batch import PackedBatch, cumulative, pack
from ppomax.engine.kv_cache import KVCache
from ppomax.engine.models import CausalModel
from torch import Tensor

FAMILIES = ["llama", "qwen2", "qwen2-window", "qwen3", "mistral", "gemma2", "gemma2-uncapped"]
families = pytest.mark.parametrize("family", FAMILIES)
tied = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
LENGTHS = [7, 1, 12, 5]
CPU = torch.device("cpu")


def draw_sequences(lengths: list[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 61, (length,), generator=generator).tolist() for length in lengths]


def packed(sequences: list[list[int]]) -> PackedBatch:
    return pack(sequences, [[False] * len(sequence) for sequence in sequences], CPU)


def reference_attention(family: str) -> str:
    """In float64 sdpa is exact and eager rounds its weights to float32, but Gemma 2 has eager alone."""
    return "eager" if family.startswith("gemma2") else "sdpa"


def alone(model: Any, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Hidden states `[T, H]` and logits `[T, V]` of a plain transformers model, sequence by sequence."""
    outputs = [model(torch.tensor([sequence]), use_cache=False, output_hidden_states=True) for sequence in sequences]
    return torch.cat([out.hidden_states[-1][0] for out in outputs]), torch.cat([out.logits[0] for out in outputs])


def full_logits(policy: CausalModel, batch: PackedBatch) -> Tensor:
    """Logits `[T, V]` of the model's own head over our trunk."""
    keywords = {"position_ids": batch.positions[None], "use_cache": False, "attention": Varlen(batch.lengths)}
    return policy.model(batch.tokens[None], **keywords).logits[0]


@torch.no_grad()
@families
@tied
def test_fp64_equals_each_sequence_alone(family: str, tied: bool, new_policy: Any, plain: Any) -> None:
    policy = new_policy(family, dtype=torch.float64, tie_word_embeddings=tied)
    sequences = draw_sequences()
    hidden, logits = alone(plain(policy, reference_attention(family)), sequences)
    batch = packed(sequences)
    tolerance = 1e-6 if family == "gemma2-uncapped" else 1e-9  # ours is exact there, eager is not
    torch.testing.assert_close(policy.hidden(batch), hidden, rtol=0, atol=tolerance)
    torch.testing.assert_close(full_logits(policy, batch), logits, rtol=0, atol=tolerance)
    torch.testing.assert_close(policy.logits(hidden), logits.float(), rtol=0, atol=1e-5)


@torch.no_grad()
@families
def test_fp32_is_as_near_to_fp64_as_eager_is(family: str, new_policy: Any, plain: Any) -> None:
    policy, sequences = new_policy(family), draw_sequences()
    truth, _ = alone(plain(policy, reference_attention(family)).double(), sequences)
    eager, _ = alone(plain(policy), sequences)
    ours = policy.hidden(packed(sequences))
    error = (ours - truth).abs().max()
    assert 0 < error <= 2 * (eager - truth).abs().max()


@families
@tied
def test_gradients_equal_each_sequence_alone(family: str, tied: bool, new_policy: Any, plain: Any) -> None:
    policy = new_policy(family, dtype=torch.float64, tie_word_embeddings=tied)
    model, sequences = plain(policy, reference_attention(family)), draw_sequences()
    batch = packed(sequences)
    weights = torch.randn(sum(LENGTHS), 61, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (full_logits(policy, batch) * weights).sum().backward()
    (alone(model, sequences)[1] * weights).sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        scale = float(expected[name].grad.abs().max())
        assert parameter.grad.abs().max() > 0 or scale == 0, name
        # eager's gradients pass through a float32 softmax
        tolerance = 1e-8 if reference_attention(family) == "sdpa" else 1e-5
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=tolerance * max(scale, 1e-6))


@torch.no_grad()
def test_the_window_matters_here(new_policy: Any) -> None:
    """The sequences of these tests are long enough for a wrong window to show."""
    batch = packed(draw_sequences())
    for family in ("mistral", "qwen2-window", "gemma2"):
        narrow, wide = new_policy(family), new_policy(family, sliding_window=64)
        assert (narrow.hidden(batch) - wide.hidden(batch)).abs().max() > 1e-2


@torch.no_grad()
@families
def test_neighbours_change_nothing_to_the_last_bit(family: str, new_policy: Any) -> None:
    """With widths in multiples of 32: else torch computes the last elements of a tensor in another way (sin, silu)."""
    widths = {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    policy, (a, b, c, d) = new_policy(family, **widths, intermediate_size=96), draw_sequences()
    hidden = policy.hidden(packed([a, b, c, d])).split(LENGTHS)
    swapped = policy.hidden(packed([d, c, b, a])).split(LENGTHS[::-1])
    others = policy.hidden(packed([*draw_sequences([9, 4], seed=5), c])).split([9, 4, 12])
    for ours, theirs in zip(hidden, swapped[::-1], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(hidden[2], others[2])


@torch.no_grad()
@families
def test_neighbours_of_the_same_lengths_change_nothing(family: str, new_policy: Any) -> None:
    policy, sequences = new_policy(family), draw_sequences()
    hidden = policy.hidden(packed(sequences)).split(LENGTHS)
    for kept in range(len(LENGTHS)):
        others = draw_sequences(seed=7)
        others[kept] = sequences[kept]
        assert torch.equal(policy.hidden(packed(others)).split(LENGTHS)[kept], hidden[kept])


def paged(
    policy: CausalModel, sequences: list[list[int]], prompts: list[int], block_size: int, budget: int
) -> list[Tensor]:
    """Hidden states of sequences in a paged cache: prompts in chunks within the budget, then a token a step."""
    cache = KVCache.for_model(
        policy.config, block_size=block_size, max_sequences=len(sequences), max_tokens_per_sequence=64,
        dtype=policy.model.dtype, device=CPU,
    )  # fmt: skip
    for pool in (*cache.k_pools, *cache.v_pools):
        pool.fill_(torch.nan)
    for sequence, length in zip(sequences, prompts, strict=True):
        cache.manager.submit(np.array(sequence[:length]), np.array([len(sequence) - length + 1]))
    parts: list[list[Tensor]] = [[] for _ in sequences]
    step = cache.manager.plan(budget)
    while step.num_members:
        cache.apply(step)
        inputs = cache.inputs(step)
        attention = Paged(
            cache.k_pools, cache.v_pools, cache.block_table[inputs.rows], inputs.seq_lens, inputs.cu_seqlens,
            inputs.slot_mapping,
        )  # fmt: skip
        hidden = policy.trunk(inputs.tokens, inputs.positions, attention)
        for row, part in zip(inputs.rows, hidden.split(inputs.cu_seqlens.diff().tolist()), strict=True):
            parts[row].append(part)  # all have a row at once, the first the first
        lengths = {i: cache.manager.sequence(i).length for i in inputs.sample_ids.tolist()}
        following = [[*sequences[i], 0][length] for i, length in lengths.items()]
        step = cache.manager.step(np.array(following, np.int64), budget)
    assert cache.manager.statistics.hit_tokens == 0
    return [torch.cat(part) for part in parts]


@torch.no_grad()
@families
@pytest.mark.parametrize(("block_size", "budget"), [(1, 100), (4, 100), (4, 3), (16, 5)])
def test_paged_equals_packed(family: str, block_size: int, budget: int, new_policy: Any) -> None:
    policy = new_policy(family, dtype=torch.float64)
    lengths = [14, 9, 11]
    sequences = draw_sequences(lengths)
    expected = policy.hidden(packed(sequences)).split(lengths)
    for ours, theirs in zip(paged(policy, sequences, [1, 8, 5], block_size, budget), expected, strict=True):
        # packed soft-capped weights are rounded to float32, as eager's are
        tolerance = 1e-6 if family == "gemma2" else 1e-9
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_operation_of_compiled_graphs(window: int | None, softcap: float | None) -> None:
    """Equal to the calls one by one, gradients too."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (
        torch.randn(sum(LENGTHS), heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2, 4)
    )
    if softcap is not None:  # whose weights are rounded to float32 there, which gradients then pass through
        q, k, v, g = (x.float() for x in (q, k, v, g))
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    options = (cumulative(LENGTHS, CPU), 0.3, window, softcap)
    expected = Varlen(LENGTHS).attend(0, *inputs, scale=0.3, window=window, softcap=softcap)
    ours = _one_by_one(*inputs, *options)
    tolerance = 1e-12 if softcap is None else 1e-5
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)
    for one, other in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    torch.library.opcheck(_one_by_one, (*inputs, *options))


def call(**changes: Any) -> Any:
    """`_attend` on two tokens."""
    module = torch.nn.Module()
    module.layer_idx = 0
    heads = torch.randn(changes.pop("rows", 1), 2, 2, 4)
    keywords = {"attention_mask": None, "attention": Varlen([2]), **changes}
    return _attend(module, heads, heads, heads, keywords.pop("attention_mask"), **keywords)


def test_what_transformers_gets_back() -> None:
    out, weights = call()
    assert out.shape == (1, 2, 2, 4)
    assert weights is None


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attention": None}, "needs the keyword `attention`.*`policy.logprobs\\(batch\\)`"),
        ({"attention_mask": torch.ones(1, 1, 2, 2)}, "no attention mask"),
        ({"rows": 2}, "one row of packed sequences"),
        ({"dropout": 0.1}, "dropout 0.1 is not supported"),
    ],
    ids=["no-attention", "mask", "two-rows", "dropout"],
)
def test_wrong_calls(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(**changes)


def test_wrong_calls_of_a_model(new_model: Any) -> None:
    model, tokens = new_model(attention_dropout=0.1), torch.tensor([[2, 3, 4]])
    assert model.config._attn_implementation == ATTENTION
    with pytest.raises(ValueError, match="needs the keyword `attention`"):
        model(tokens)
    with pytest.raises(ValueError, match="no attention mask"):
        model(tokens, attention=Varlen([3]), attention_mask=torch.zeros(1, 1, 3, 3))
    model.train()
    with pytest.raises(ValueError, match=r"dropout 0\.1 is not supported"):
        model(tokens, attention=Varlen([3]))


def test_lengths_must_fit(new_policy: Any) -> None:
    batch = packed([[2, 3, 4]])
    with pytest.raises(RuntimeError, match="split"):
        new_policy().trunk(batch.tokens, batch.positions, Varlen([2]))
