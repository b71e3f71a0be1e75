"""Writing keys and values: every slot, no slot, in place, on other dtypes."""

import pytest
import torch
from ppomax.kernels.kv_write import write_kv, write_kv_ref


def pools(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((5, 4, 2, 3), torch.nan, dtype=dtype), torch.full((5, 4, 2, 3), torch.nan, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("slots", [[0, 19, 7, -1, 8, -1], [3, 2, 1, 0, 4, 5], [-1] * 6])
def test_matches_the_loop(slots: list[int], index: torch.dtype, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 6, 2, 3)
    ours, expected = pools(dtype), pools(dtype)
    mapping = torch.tensor(slots, dtype=index)
    write_kv(k, v, *ours, mapping)
    write_kv_ref(k, v, *expected, mapping)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))
        assert int(a.isnan().any(-1).any(-1).sum()) == 20 - sum(s >= 0 for s in slots)


def test_no_tokens() -> None:
    k_pool, v_pool = pools()
    write_kv(torch.zeros(0, 2, 3), torch.zeros(0, 2, 3), k_pool, v_pool, torch.zeros(0, dtype=torch.int32))
    assert bool(k_pool.isnan().all())


def test_strided_rows() -> None:
    """Keys arrive as views of a fused projection."""
    qkv = torch.randn(4, 6, 3)
    k, v = qkv[:, 2:4], qkv[:, 4:]
    ours = pools()
    write_kv(k, v, *ours, torch.tensor([4, 0, 11, 2]))
    assert torch.equal(ours[0].view(-1, 2, 3)[[4, 0, 11, 2]], k)
    assert torch.equal(ours[1].view(-1, 2, 3)[[4, 0, 11, 2]], v)


def test_wrong_arguments_raise() -> None:
    k_pool, v_pool = pools()
    k = torch.zeros(2, 2, 3)
    slots = torch.tensor([0, 1])
    for match, call in {
        "pools \\[blocks": lambda: write_kv(k[..., :2], k[..., :2], k_pool, v_pool, slots),
        "slot_mapping": lambda: write_kv(k, k, k_pool, v_pool, slots[:1]),
        "contiguous": lambda: write_kv(k, k, k_pool.transpose(0, 1), v_pool.transpose(0, 1), slots),
        "slot 20 is outside": lambda: write_kv(k, k, k_pool, v_pool, slots + 19),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
