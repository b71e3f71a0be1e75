"""Attention over a paged cache: against float64, ragged, windowed, capped, with garbage in every slot not written."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ppomax.kernels import paged_attention as module
from ppomax.kernels.dispatch import interpreting
from ppomax.kernels.kv_write import write_kv
from ppomax.kernels.paged_attention import length_groups, paged_attention, paged_attention_ref
from torch import Tensor

pytestmark = pytest.mark.usefixtures("path")


class Cache:
    """Pools of NaN in which the sequences' keys and values lie in random blocks; table entries past them are wild."""

    def __init__(
        self, lengths: list[int], n_kv: int = 2, dim: int = 8, size: int = 4, dtype: torch.dtype = torch.float32
    ) -> None:
        blocks = [-(-n // size) for n in lengths]
        total = sum(blocks) + 3
        order = iter(torch.randperm(total).tolist())
        self.lengths, self.n_kv, self.dim, self.dtype = lengths, n_kv, dim, dtype
        self.k_pool = torch.full((total, size, n_kv, dim), torch.nan, dtype=dtype)
        self.v_pool = self.k_pool.clone()
        self.table = torch.full((len(lengths), max(*blocks, 1) + 1), 2**30, dtype=torch.int32)
        self.keys, self.values = [], []
        for s, n in enumerate(lengths):
            self.table[s, : blocks[s]] = torch.tensor([next(order) for _ in range(blocks[s])])
            self.keys.append(torch.randn(n, n_kv, dim).to(dtype))
            self.values.append(torch.randn(n, n_kv, dim).to(dtype))
            slots = self.slots(s, torch.arange(n))
            self.k_pool.view(-1, n_kv, dim)[slots] = self.keys[-1]
            self.v_pool.view(-1, n_kv, dim)[slots] = self.values[-1]
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)

    def slots(self, sequence: int, t: Tensor) -> Tensor:
        size = self.k_pool.shape[1]
        return self.table[sequence].long()[t // size] * size + t % size

    def queries(self, numbers: list[int], heads: int) -> Tensor:
        return torch.randn(sum(numbers), heads, self.dim).to(self.dtype)

    def check(self, numbers: list[int], heads: int, no_worse: Any, **options: Any) -> None:
        """`paged_attention` of so many queries per sequence against float64 and against each sequence by itself."""
        q = self.queries(numbers, heads)
        ours, exact = (self.run(f, q, numbers, **options) for f in (paged_attention, paged_attention_ref))
        assert ours.dtype == q.dtype
        no_worse([ours], [self.plain(q, numbers, **options)], [exact])

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
    "one busy": ([3, 0, 40, 5, 9, 1, 2], [0, 0, 7, 0, 0, 0, 0]),
    "ragged": ([0, 30, 4, 0, 1, 19, 2, 0, 60], [0, 11, 0, 0, 1, 17, 2, 0, 5]),
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
    Cache(lengths, heads[1]).check(queries, heads[0], no_worse, **options)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_and_block_sizes(dim: int, size: int, no_worse: Any) -> None:
    cache = Cache([70, 1, 33], 2, dim, size, torch.float16)
    cache.check([1, 1, 1], 8, no_worse)
    cache.check([6, 1, 0], 8, no_worse, window=40)


@pytest.mark.parametrize("heads", [(8, 1), (7, 1), (20, 1), (32, 8)], ids=str)
def test_tiles_of_many_rows(heads: tuple[int, int], no_worse: Any) -> None:
    """Prefill over a cached prefix, in tiles of up to 128 rows; a group of 20 heads is more than a small tile."""
    cache = Cache([90, 24, 50], heads[1], 16, 16, torch.float16)
    cache.check([41, 24, 3], heads[0], no_worse)
    cache.check([1, 1, 1], heads[0], no_worse, softcap=5.0)
    Cache([9, 3], heads[1], 16).check([2, 1], heads[0], no_worse)  # fp32: tiles of 16 rows where the group is smaller


def test_keys_before_the_window_may_be_gone() -> None:
    """Blocks that no query sees any more may have been given away: neither table nor pool is read there."""
    cache, queries = Cache([60, 21], 2, 16, 4), [3, 1]
    q = cache.queries(queries, 4)
    expected = cache.run(paged_attention, q, queries, window=10)
    for s, (length, n) in enumerate(zip(cache.lengths, queries, strict=True)):
        hidden = length - n - 10 + 1
        slots = cache.slots(s, torch.arange(hidden))
        for pool in (cache.k_pool, cache.v_pool):
            pool.view(-1, 2, 16)[slots] = torch.nan
        cache.table[s, : hidden // 4] = 2**30
    assert torch.equal(cache.run(paged_attention, q, queries, window=10), expected)


def test_long_context(no_worse: Any) -> None:
    Cache([3000, 17], 1, 16, 16).check([1, 1], 4, no_worse)


@pytest.mark.parametrize("options", [{}, {"window": 600}], ids=str)
@pytest.mark.parametrize("splits", [2, 8, 32])
def test_keys_split_over_programs(
    splits: int, options: dict, path: str, monkeypatch: pytest.MonkeyPatch, no_worse: Any
) -> None:
    if path == "torch":
        pytest.skip("torch splits nothing")
    from ppomax.kernels.gpu import paged_attention as triton_path

    monkeypatch.setattr(triton_path, "_splits", lambda *_: splits)
    cache = Cache([1100, 0, 3, 256, 257], 1, 16, 16)
    cache.check([2, 0, 1, 1, 2], 3, no_worse, **options)
    q = cache.queries([1, 0, 1, 1, 1], 3)
    first, again = (cache.run(paged_attention, q, [1, 0, 1, 1, 1], **options) for _ in range(2))
    assert torch.equal(first, again)


def test_few_sequences_split_their_keys(path: str) -> None:
    """From shapes alone: a program per multiprocessor and more while the block table leaves enough keys to each."""
    if path == "torch":
        pytest.skip("torch splits nothing")
    from ppomax.kernels.gpu.paged_attention import _splits

    device = torch.device("cpu")  # as four multiprocessors
    assert [_splits(programs, 4096, None, device) for programs in (1, 4, 8, 100)] == [8, 2, 1, 1]
    assert [_splits(1, capacity, None, device) for capacity in (16, 512, 1100)] == [1, 2, 4]
    assert _splits(1, 4096, 600, device) == 2


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_mixed_lengths_are_taken_in_groups(options: dict, monkeypatch: pytest.MonkeyPatch, no_worse: Any) -> None:
    lengths = [3, 200, 5, 1, 90, 2, 4]
    assert len(length_groups(lengths)) == 1
    monkeypatch.setattr(module, "_SMALL_CACHE", 0)
    assert sorted(s for group in length_groups(lengths) for s in group) == list(range(7))
    assert len(length_groups(lengths)) > 1
    Cache(lengths).check([1] * 7, 4, no_worse, **options)


def test_prefill_is_torchs_causal_attention() -> None:
    cache = Cache([13])
    q = torch.randn(13, 4, cache.dim)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, *(t.repeat_interleave(2, 1) for t in (cache.keys[0], cache.values[0])))),
        is_causal=True,
    ).transpose(0, 1)
    torch.testing.assert_close(cache.run(paged_attention, q, [13]), expected, rtol=1e-5, atol=1e-6)


def test_chunks_of_a_prompt_equal_the_whole() -> None:
    """Keys and values written as they come, by `write_kv`."""
    cache = Cache([20])
    q = torch.randn(20, 4, cache.dim)
    whole = cache.run(paged_attention, q, [20])
    start = 0
    for pool in (cache.k_pool, cache.v_pool):
        pool.fill_(torch.nan)
    for n in (7, 1, 12):
        cache.seq_lens[0] = start + n
        new = slice(start, start + n)
        slots = cache.slots(0, torch.arange(start, start + n))
        write_kv(cache.keys[0][new], cache.values[0][new], cache.k_pool, cache.v_pool, slots)
        part = cache.run(paged_attention, q[new], [n])
        torch.testing.assert_close(part, whole[new], rtol=1e-5, atol=1e-6)
        start += n


@pytest.mark.parametrize("pool", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_queries(pool: torch.dtype, no_worse: Any) -> None:
    cache = Cache([70, 1, 33], 2, 64, 16, pool)
    q = cache.queries([1, 1, 1], 8).bfloat16()
    out, exact = (cache.run(f, q, [1, 1, 1]) for f in (paged_attention, paged_attention_ref))
    assert out.dtype == torch.bfloat16
    if interpreting():  # which truncates to bf16 where a GPU rounds
        torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
    elif pool == torch.bfloat16:
        no_worse([out], [cache.plain(q, [1, 1, 1])], [exact])
    else:
        torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


def test_float64() -> None:
    cache = Cache([9, 4], dtype=torch.float64)
    q = cache.queries([1, 1], 4)
    exact = cache.run(paged_attention_ref, q, [1, 1])
    torch.testing.assert_close(cache.run(paged_attention, q, [1, 1]), exact, rtol=1e-12, atol=1e-14)


def test_strided_queries() -> None:
    """Queries arrive with heads before tokens, or with a stride in the last dimension."""
    cache = Cache([9, 7, 16])
    for q in (torch.randn(4, 9, 8).transpose(0, 1), torch.randn(8, 9, 4).permute(1, 2, 0)):
        out = cache.run(paged_attention, q, [3, 1, 5])
        assert out.is_contiguous()
        torch.testing.assert_close(out, cache.run(paged_attention, q.contiguous(), [3, 1, 5]), rtol=0, atol=1e-6)


def test_padding_rows_give_zeros(path: str) -> None:
    """A query of a sequence without tokens, as in a captured batch with rows to spare."""
    if path == "torch":
        pytest.skip("more queries than cached tokens raise")
    cache = Cache([5, 0, 3])
    out = cache.run(paged_attention, cache.queries([1, 1, 1], 4), [1, 1, 1])
    assert out.isfinite().all()
    assert not out[1].any()


def test_nothing_to_do() -> None:
    cache = Cache([3, 2])
    assert cache.run(paged_attention, torch.zeros(0, 4, 8), [0, 0]).shape == (0, 4, 8)


def test_compiles_in_one_graph() -> None:
    cache = Cache([9, 7, 16])
    q = cache.queries([3, 1, 5], 4)

    def attend(q: Tensor) -> Tensor:
        return cache.run(paged_attention, q * 1.0, [3, 1, 5], window=6) + 1.0

    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(q), attend(q))


def test_custom_op_is_sound() -> None:
    cache = Cache([9, 7])
    shared = (cache.k_pool, cache.v_pool, cache.table, cache.seq_lens, torch.tensor([0, 3, 4], dtype=torch.int32))
    op = torch.ops.ppomax.paged_attention.default
    torch.library.opcheck(op, (torch.randn(4, 4, 8), *shared, 0.3, 5, 20.0))
    torch.library.opcheck(op, (torch.randn(4, 4, 8).transpose(0, 1), *shared, 0.3, None, None))


def test_wrong_shapes_raise() -> None:
    cache = Cache([9, 4])
    q = cache.queries([1, 1], 4)
    for match, call in {
        "need q": lambda: cache.run(paged_attention, q[..., :7], [1, 1]),
        "do not divide": lambda: cache.run(paged_attention, q[:, :3], [1, 1]),
        "need block_table": lambda: cache.run(paged_attention, q, [1, 1, 1]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_wrong_lengths_raise_in_torch(path: str) -> None:
    if path == "triton":
        pytest.skip("lengths are not looked at")
    cache = Cache([9, 4])
    with pytest.raises(ValueError, match="ends at 3, there are 2"):
        cache.run(paged_attention, cache.queries([1, 1], 4), [1, 2])
    with pytest.raises(ValueError, match="5 queries, 4 cached"):
        cache.run(paged_attention, cache.queries([1, 5], 4), [1, 5])
    cache.seq_lens[0] = 99
    with pytest.raises(ValueError, match="room for"):
        cache.run(paged_attention, cache.queries([1, 1], 4), [1, 1])
