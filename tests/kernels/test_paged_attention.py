"""Attention over a paged cache: against float64, ragged, windowed, capped, with garbage in every slot not written."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ppomax.kernels import paged_attention as module
from ppomax.kernels.kv_write import write_kv
from ppomax.kernels.paged_attention import length_groups, paged_attention, paged_attention_ref
from torch import Tensor

BLOCK_SIZE = 4


class Cache:
    """Pools of NaN in which the sequences' keys and values lie in random blocks; table entries past them are wild."""

    def __init__(self, lengths: list[int], n_kv: int = 2, dim: int = 8) -> None:
        blocks = [-(-n // BLOCK_SIZE) for n in lengths]
        total = sum(blocks) + 3
        order = iter(torch.randperm(total).tolist())
        self.lengths, self.n_kv, self.dim = lengths, n_kv, dim
        self.k_pool = torch.full((total, BLOCK_SIZE, n_kv, dim), torch.nan)
        self.v_pool = self.k_pool.clone()
        self.table = torch.full((len(lengths), max(*blocks, 1) + 1), 2**30, dtype=torch.int32)
        self.keys, self.values = [], []
        for s, n in enumerate(lengths):
            self.table[s, : blocks[s]] = torch.tensor([next(order) for _ in range(blocks[s])])
            t = torch.arange(n)
            slots = self.table[s].long()[t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE
            self.keys.append(torch.randn(n, n_kv, dim))
            self.values.append(torch.randn(n, n_kv, dim))
            write_kv(self.keys[-1], self.values[-1], self.k_pool, self.v_pool, slots)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)

    def run(self, function: Any, q: Tensor, queries: list[int], **options: Any) -> Tensor:
        bounds = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
        options = {"scale": self.dim**-0.5, **options}
        return function(q, self.k_pool, self.v_pool, self.table, self.seq_lens, bounds, **options)

    def plain(self, q: Tensor, queries: list[int], **options: Any) -> Tensor:
        """Each sequence by itself with a dense mask, in the inputs' dtype."""
        out, start = [], 0
        window, cap = options.get("window"), options.get("softcap")
        for n, length, k, v in zip(queries, self.lengths, self.keys, self.values, strict=True):
            rows = q[start : start + n]
            start += n
            k, v = (x.repeat_interleave(q.shape[1] // self.n_kv, 1) for x in (k, v))
            z = torch.einsum("qhd,thd->hqt", rows, k) * options.get("scale", self.dim**-0.5)
            z = z if cap is None else cap * torch.tanh(z / cap)
            position, t = torch.arange(length - n, length)[:, None], torch.arange(length)
            hidden = (t > position) | (t <= position - (window or 10**9))
            out.append(torch.einsum("hqt,thd->qhd", z.masked_fill(hidden, -torch.inf).softmax(-1), v))
        return torch.cat(out)


CASES: dict[str, tuple[list[int], list[int]]] = {
    "decode": ([9, 1, 16, 5], [1, 1, 1, 1]),
    "prefill": ([9, 1, 16, 5], [9, 1, 16, 5]),
    "chunked": ([9, 7, 16, 5], [3, 1, 10, 2]),
    "some idle": ([9, 0, 16, 5, 3], [1, 0, 4, 0, 1]),
    "one": ([1], [1]),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 3},
    "wide window": {"window": 100},
    "softcap": {"softcap": 2.0},
    "all": {"window": 5, "softcap": 1.5, "scale": 0.7},
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case: Any, heads: tuple[int, int], options: dict, no_worse: Any) -> None:
    lengths, queries = case
    cache = Cache(lengths, heads[1])
    q = torch.randn(sum(queries), heads[0], cache.dim)
    ours = cache.run(paged_attention, q, queries, **options)
    exact = cache.run(paged_attention_ref, q, queries, **options)
    no_worse([ours], [cache.plain(q, queries, **options)], [exact])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_mixed_lengths_are_taken_in_groups(options: dict, monkeypatch: pytest.MonkeyPatch, no_worse: Any) -> None:
    lengths, queries = [3, 200, 5, 1, 90, 2, 4], [1] * 7
    cache = Cache(lengths)
    q = torch.randn(7, 4, cache.dim)
    assert len(length_groups(lengths)) == 1
    monkeypatch.setattr(module, "_SMALL_CACHE", 0)
    assert sorted(s for group in length_groups(lengths) for s in group) == list(range(7))
    assert len(length_groups(lengths)) > 1
    ours = cache.run(paged_attention, q, queries, **options)
    exact = cache.run(paged_attention_ref, q, queries, **options)
    no_worse([ours], [cache.plain(q, queries, **options)], [exact])


def test_prefill_is_torchs_causal_attention() -> None:
    cache = Cache([13])
    q = torch.randn(13, 4, cache.dim)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, *(t.repeat_interleave(2, 1) for t in (cache.keys[0], cache.values[0])))),
        is_causal=True,
    ).transpose(0, 1)
    torch.testing.assert_close(cache.run(paged_attention, q, [13]), expected, rtol=1e-5, atol=1e-6)


def test_chunks_of_a_prompt_equal_the_whole() -> None:
    cache = Cache([20])
    q = torch.randn(20, 4, cache.dim)
    whole = cache.run(paged_attention, q, [20])
    start = 0
    for n in (7, 1, 12):
        cache.seq_lens[0] = start + n
        part = cache.run(paged_attention, q[start : start + n], [n])
        torch.testing.assert_close(part, whole[start : start + n], rtol=1e-5, atol=1e-6)
        start += n


def test_dtypes() -> None:
    cache = Cache([9, 4])
    q = torch.randn(2, 4, cache.dim)
    exact = cache.run(paged_attention_ref, q, [1, 1])
    out = cache.run(paged_attention, q.bfloat16(), [1, 1])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
    cache.k_pool, cache.v_pool = cache.k_pool.double(), cache.v_pool.double()
    torch.testing.assert_close(cache.run(paged_attention, q.double(), [1, 1]), exact, rtol=1e-12, atol=1e-14)


def test_nothing_to_do() -> None:
    cache = Cache([3, 2])
    assert cache.run(paged_attention, torch.zeros(0, 4, 8), [0, 0]).shape == (0, 4, 8)


def test_wrong_arguments_raise() -> None:
    cache = Cache([9, 4])
    q = torch.randn(2, 4, cache.dim)
    for match, call in {
        "need q": lambda: cache.run(paged_attention, q[..., :7], [1, 1]),
        "do not divide": lambda: cache.run(paged_attention, q[:, :3], [1, 1]),
        "need block_table": lambda: cache.run(paged_attention, q, [1, 1, 1]),
        "ends at 3, there are 2": lambda: cache.run(paged_attention, q, [1, 2]),
        "5 queries, 4 cached": lambda: cache.run(paged_attention, torch.randn(6, 4, 8), [1, 5]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    cache.seq_lens[0] = 99
    with pytest.raises(ValueError, match="room for"):
        cache.run(paged_attention, q, [1, 1])
