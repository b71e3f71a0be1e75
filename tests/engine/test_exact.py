"""The exact mode: a sequence decoded token by token has the bits of one forward pass, whatever runs beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppomax.engine.attention import Paged, Varlen
from ppomax.engine.batch import cumulative, pack
from ppomax.engine.config import RuntimeConfig
from ppomax.engine.errors import InputError
from ppomax.engine.exact import TILE, pad_to_tiles
from ppomax.engine.linear import linear, tiled_linear
from ppomax.engine.models import CausalModel, Placement
from torch import Tensor

FAMILIES = ["llama", "qwen2", "qwen2-window", "qwen3", "mistral", "gemma2"]
BLOCK = 4


def draw(length: int, seed: int) -> list[int]:
    return torch.randint(2, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def decode(policy: CausalModel, sequences: list[list[int]], prefilled: list[int]) -> list[Tensor]:
    """Hidden states of the sequences: so many tokens of each in one pass, then one token of each at a time."""
    text = policy.config.get_text_config()
    heads, width = text.num_key_value_heads, getattr(text, "head_dim", None) or text.hidden_size // 4
    blocks = -(-max(map(len, sequences)) // BLOCK)
    shape = (1 + blocks * len(sequences), BLOCK, heads, width)
    pools = [[torch.full(shape, torch.nan) for _ in range(text.num_hidden_layers)] for _ in range(2)]
    table = 1 + torch.arange(blocks * len(sequences), dtype=torch.int32).view(len(sequences), blocks)
    hidden: list[list[Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        running = [i for i, s in enumerate(sequences) if done[i] < len(s)]
        counts = [1 if done[i] else prefilled[i] for i in running]
        tokens = [t for i, n in zip(running, counts, strict=True) for t in sequences[i][done[i] : done[i] + n]]
        positions = torch.cat([torch.arange(done[i], done[i] + n) for i, n in zip(running, counts, strict=True)])
        owner = torch.repeat_interleave(torch.tensor(running), torch.tensor(counts))
        slots = table[owner, positions // BLOCK].long() * BLOCK + positions % BLOCK
        lengths = torch.tensor([done[i] + n for i, n in zip(running, counts, strict=True)], dtype=torch.int32)
        ends = cumulative(counts, torch.device("cpu"))
        attention = Paged(*pools, table[running], lengths, ends, slots, exact=policy.exact)
        out = policy.trunk(torch.tensor(tokens), positions, attention).split(counts)
        for i, n, rows in zip(running, counts, out, strict=True):
            hidden[i].append(rows)
            done[i] += n
    return [torch.cat(rows) for rows in hidden]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_has_the_bits_of_one_pass(family: str, new_policy: Any) -> None:
    policy = new_policy(family)
    policy.exact = True
    sequences = [draw(length, seed) for seed, length in enumerate([40, 3, 17, 33])]
    packed = pack(sequences, [[False] * len(s) for s in sequences], policy.device)
    expected = policy.hidden(packed).split(list(packed.lengths))
    alone = decode(policy, [sequences[2]], [5])
    crowd = decode(policy, sequences, [1, 2, 9, 32])
    assert torch.equal(alone[0], expected[2])
    for ours, theirs in zip(crowd, expected, strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_without_it_bits_may_differ_and_values_do_not(new_policy: Any) -> None:
    """The mode is needed, and it computes the same function."""
    policy, sequence = new_policy(), draw(40, 0)
    plain = policy.trunk(torch.tensor(sequence), torch.arange(40), Varlen([40]))
    single = decode(policy, [sequence], [1])[0]
    policy.exact = True
    exact = policy.trunk(torch.tensor(sequence), torch.arange(40), Varlen([40], exact=True))
    torch.testing.assert_close(exact, plain, rtol=1e-5, atol=1e-5)
    assert not torch.equal(single, plain), "one row at a time rounds as a whole sequence does: no need for the mode"


def test_training_gradients_are_those_of_the_plain_mode(new_policy: Any) -> None:
    sequence = draw(21, 3)
    batch = pack([sequence], [[False] * 9 + [True] * 12], torch.device("cpu"))
    gradients = []
    for exact in (False, True):
        policy = new_policy(dtype=torch.float64)
        policy.exact = exact
        policy.logprobs(batch)[0].sum().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    for plain, tiled in zip(*gradients, strict=True):
        torch.testing.assert_close(tiled, plain, rtol=1e-10, atol=1e-12)


def test_tiles() -> None:
    x = torch.randn(TILE + 1, 5)
    assert pad_to_tiles(x).shape == (2 * TILE, 5)
    assert torch.equal(pad_to_tiles(x[:TILE]), x[:TILE])
    layer = torch.nn.Linear(5, 7)
    with tiled_linear():
        tiled = linear(x.view(1, -1, 5), layer.weight, layer.bias)
    torch.testing.assert_close(tiled, layer(x).view(1, -1, 7))


def test_only_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Placement.of(RuntimeConfig(device="cpu", exact=True)).exact
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    with pytest.raises(InputError, match=r"RuntimeConfig\.exact = True is a mode of the CPU, and the device is cuda"):
        Placement.of(RuntimeConfig(device="cuda", exact=True))
