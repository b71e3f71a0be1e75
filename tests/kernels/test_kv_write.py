"""Writing keys and values: every slot, no slot, in place, on other dtypes."""

import pytest
import torch
from ppomax.kernels.kv_write import write_kv, write_kv_ref
from torch import Tensor

pytestmark = pytest.mark.usefixtures("path")


def pools(dtype: torch.dtype = torch.float32, heads: int = 2, dim: int = 3) -> tuple[Tensor, Tensor]:
    k_pool, v_pool = (torch.full((5, 4, heads, dim), torch.nan, dtype=dtype) for _ in range(2))
    return k_pool, v_pool


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("slots", [[0, 19, 7, -1, 8, -1], [3, 2, 1, 0, 4, 5], [-1] * 6], ids=str)
def test_matches_the_loop(slots: list[int], index: torch.dtype, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 6, 2, 3).to(dtype).float()  # of both dtypes: Triton's interpreter truncates to bf16
    ours, expected = pools(dtype), pools(dtype)
    mapping = torch.tensor(slots, dtype=index)
    write_kv(k, v, *ours, mapping)
    write_kv_ref(k, v, *expected, mapping)
    for a, b in zip(ours, expected, strict=True):
        assert same(a, b)
        assert int(a.isnan().any(-1).any(-1).sum()) == 20 - sum(s >= 0 for s in slots)


@pytest.mark.parametrize("shape", [(1, 64), (8, 80), (8, 128), (5, 256)], ids=str)
def test_heads_of_models(shape: tuple[int, int]) -> None:
    k, v = torch.randn(2, 3, *shape)
    ours, expected = pools(torch.float32, *shape), pools(torch.float32, *shape)
    mapping = torch.tensor([17, -1, 4])
    write_kv(k, v, *ours, mapping)
    write_kv_ref(k, v, *expected, mapping)
    assert all(same(a, b) for a, b in zip(ours, expected, strict=True))


def test_no_tokens() -> None:
    k_pool, v_pool = pools()
    write_kv(torch.zeros(0, 2, 3), torch.zeros(0, 2, 3), k_pool, v_pool, torch.zeros(0, dtype=torch.int32))
    assert bool(k_pool.isnan().all())


def test_strided_rows() -> None:
    """Keys arrive as views of a fused projection, or with heads before tokens."""
    qkv, slots = torch.randn(4, 6, 3), torch.tensor([4, 9, 0, 9, 11, 9, 2, 9])[::2]
    for k, v in (
        (qkv[:, 2:4], qkv[:, 4:]),
        (torch.randn(2, 4, 3).transpose(0, 1), torch.randn(3, 2, 4).permute(2, 1, 0)),
    ):
        ours = pools()
        write_kv(k, v, *ours, slots)
        assert torch.equal(ours[0].view(-1, 2, 3)[[4, 0, 11, 2]], k)
        assert torch.equal(ours[1].view(-1, 2, 3)[[4, 0, 11, 2]], v)
        assert int(ours[0].isnan().any(-1).any(-1).sum()) == 16


def test_slot_outside_the_pool(path: str) -> None:
    k, slots, (k_pool, v_pool) = torch.zeros(2, 2, 3), torch.tensor([1, 20]), pools()
    if path == "triton":
        write_kv(k, k, k_pool, v_pool, slots)
        assert int(k_pool.isnan().any(-1).any(-1).sum()) == 19
    else:
        with pytest.raises(ValueError, match="slot 20 is outside"):
            write_kv(k, k, k_pool, v_pool, slots)


def test_compiles_in_one_graph() -> None:
    k, v = torch.randn(2, 6, 2, 3)
    mapping = torch.tensor([0, 19, 7, -1, 8, -1])
    ours, expected = pools(), pools()
    write_kv(k, v, *expected, mapping)

    def write(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor) -> Tensor:
        write_kv(k * 1.0, v, k_pool, v_pool, mapping)
        return k_pool.nan_to_num().sum()

    torch.compile(write, fullgraph=True, backend="aot_eager")(k, v, *ours)
    assert all(same(a, b) for a, b in zip(ours, expected, strict=True))


def test_custom_op_is_sound() -> None:
    k_pool, v_pool = torch.zeros(2, 5, 4, 2, 3)
    torch.library.opcheck(
        torch.ops.ppomax.write_kv.default, (*torch.randn(2, 3, 2, 3), k_pool, v_pool, torch.tensor([3, -1, 7]))
    )


def test_wrong_arguments_raise() -> None:
    k_pool, v_pool = pools()
    k = torch.zeros(2, 2, 3)
    slots = torch.tensor([0, 1])
    for match, call in {
        "pools \\[blocks": lambda: write_kv(k[..., :2], k[..., :2], k_pool, v_pool, slots),
        "slot_mapping": lambda: write_kv(k, k, k_pool, v_pool, slots[:1]),
        "contiguous": lambda: write_kv(k, k, k_pool.transpose(0, 1), v_pool.transpose(0, 1), slots),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
