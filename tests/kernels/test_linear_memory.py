"""How much of the logits exists at once: chunk sizes on a CPU and a GPU, and all that a GPU would allocate."""

from typing import Any

import pytest
import torch
from ppomax.kernels import lm_head
from ppomax.kernels.gpu.launch import recording
from ppomax.kernels.ppo_terms import PolicyInputs, PolicyOptions
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VOCABULARIES = [512, 32_000, 128_256, 262_144]


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_kept_logits_of_a_cpu_are_bounded(vocab: int) -> None:
    head = lm_head.Head(torch.empty(vocab, 0), None, 1.0, None, torch.float32)
    for n_rows in (1, 1000, 10**6):
        rows = lm_head.chunk_rows(n_rows, head, "softmax")
        assert 1 <= rows <= n_rows
        assert 4 * rows * vocab <= max(lm_head.CHUNK_BYTES, 4 * lm_head.MIN_ROWS * vocab)
        tile = min(vocab, lm_head.TILE_COLUMNS) * lm_head.chunk_rows(n_rows, head, "nothing")
        assert tile <= max(lm_head.TILE_ELEMENTS, lm_head.MIN_ROWS * lm_head.TILE_COLUMNS)


@pytest.mark.parametrize("vocab", [*VOCABULARIES, 2_000_000])
@pytest.mark.parametrize("width", [4, 6, 24])
def test_chunks_of_a_gpu_are_bounded_and_even(vocab: int, width: int) -> None:
    most = max(lm_head.GPU_CHUNK_BYTES // (width * vocab), lm_head.GPU_MIN_ROWS)
    for n_rows in (1, 1000, 4096, 8192, 30_000, 10**6):
        rows = lm_head.gpu_chunk_rows(n_rows, vocab, width)
        n_chunks = -(-n_rows // rows)
        assert 1 <= rows <= min(n_rows, most)
        assert rows - n_rows / n_chunks < lm_head.GPU_ROW_MULTIPLE
        assert n_chunks == 1 or rows % lm_head.GPU_ROW_MULTIPLE == 0
        assert (n_chunks - 1) * (most - lm_head.GPU_ROW_MULTIPLE) < n_rows


def test_the_reference_shape_takes_4096_rows_at_once() -> None:
    """With fewer, adding to the weight's gradient would show."""
    assert lm_head.gpu_chunk_rows(8192, 128_256, 6) == 4096


class Allocations(TorchDispatchMode):
    """Bytes of each memory that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []  # held, so that no two share an address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in (*self.tensors, *tree_leaves((args, kwargs))) if _is_tensor(x)}
        new = (x for x in tree_leaves(out) if _is_tensor(x) and x.untyped_storage()._cdata not in known)
        self.tensors.extend(new)
        return out

    @property
    def sizes(self) -> list[int]:
        return [x.untyped_storage().nbytes() for x in self.tensors]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


@pytest.mark.parametrize("path", ["triton"], indirect=True)
@pytest.mark.parametrize("vocab", [128_256, 151_937])
@pytest.mark.parametrize("n_rows", [8192, 100_000])
def test_a_gpu_allocates_no_more_than_the_workspace(path: str, vocab: int, n_rows: int) -> None:
    from ppomax.kernels.gpu import linear

    width = 4096
    options = {"dtype": torch.bfloat16, "device": "meta"}
    hidden, weight = torch.empty(n_rows, width, **options), torch.empty(vocab, width, **options)
    labels, kept, row = (torch.empty(n_rows, dtype=t, device="meta") for t in (torch.int64, torch.bool, torch.float32))
    head = lm_head.Head(weight, None, 1.0, None, torch.float32)
    buffer = torch.empty(vocab, width, device="meta")
    inputs = PolicyInputs(row, row, None, None)
    with recording("sm_90") as launches, Allocations() as allocations:
        linear.policy(hidden, labels, kept, head, inputs, row, PolicyOptions(), [True, False, False], buffer)
    assert sum(launch.grid[0] for launch in launches) == n_rows
    copies = 2 * hidden.numel() * 2  # dX, and the rows that count of a chunk at a time
    rows = 16 * n_rows
    pitch = 1.001  # rows of the workspace are padded
    assert sum(allocations.sizes) <= pitch * lm_head.GPU_CHUNK_BYTES + copies + rows
