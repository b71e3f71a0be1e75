"""The memory of a policy update beside the weights does not grow with the vocabulary."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from ppomax.kernels import lm_head
from ppomax.kernels.api import linear_ppo_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sizes() -> dict[int, dict[str, int]]:
    return {}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its operations on the CPU's own path: not as `bench` has it, for Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return import_module("update_memory")


@pytest.fixture
def of(sizes: dict[int, dict[str, int]], module: ModuleType) -> Callable[[int], dict[str, int]]:
    """of(vocabulary): what an update over 1152 response tokens holds."""

    def measure(vocab: int) -> dict[str, int]:
        if vocab not in sizes:
            sizes[vocab] = module.one_vocabulary(vocab, CPU, rows=9)
        return sizes[vocab]

    return measure


def test_workspace_is_flat_where_a_chunk_is_full(of: Callable[[int], dict[str, int]]) -> None:
    small, large = of(10_000), of(36_000)
    assert large["logits"] > 4 * large["workspace"]
    assert 0.9 < large["workspace"] / small["workspace"] < 1.1


@pytest.mark.parametrize("vocab", [4096, 128_256])
def test_other_vocabularies_differ_by_a_chunk(of: Callable[[int], dict[str, int]], vocab: int) -> None:
    """A small one has fewer logits, a huge one keeps those of the fewest rows that a chunk may have."""
    chunk = max(lm_head.CHUNK_BYTES, 4 * lm_head.MIN_ROWS * vocab)
    assert abs(of(vocab)["workspace"] - of(10_000)["workspace"]) < chunk


@pytest.mark.parametrize("vocab", [4096, 128_256])
def test_gradients_exist_once(of: Callable[[int], dict[str, int]], vocab: int) -> None:
    """Embeddings and head: two tensors of the weight's size, no copy of either beside them."""
    assert of(vocab)["gradients"] <= 1.01 * of(vocab)["weights"]


def test_the_head_has_no_second_gradient(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a second micro-batch is added to the first one's while the chunk and the activations are there."""
    vocab = 20_000
    in_place = module.one_vocabulary(vocab, CPU, rows=4, micro_batches=2)
    monkeypatch.setattr("ppomax.engine.models._grown", lambda weight: None)
    added = module.one_vocabulary(vocab, CPU, rows=4, micro_batches=2)
    assert added["together"] - in_place["together"] > 0.9 * 4 * 64 * vocab


def test_the_counter_sees_inside_the_operations(module: ModuleType) -> None:
    """A chunk of logits is a workspace of the fused loss, which is not returned."""
    lives = []
    weight = torch.randn(500, 8, requires_grad=True)
    for kept in (weight, weight[:5]):
        live = module.LiveTensors({weight.shape})
        with live:
            hidden, old = torch.randn(300, 8, requires_grad=True), torch.zeros(300)
            linear_ppo_loss(hidden, kept, torch.zeros(300, dtype=torch.int64), old, old).loss.backward()
        lives.append(live.peak)
    assert lives[0] - lives[1] > 300 * 490 * 4
