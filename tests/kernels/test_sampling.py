"""Sampling: the random stream, the processed distributions (exactly, and by chi-square), ties, independence of rows."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.kernels import sampling
from ppomax.kernels.sampling import (
    cut_top_k,
    cut_top_p,
    philox_words,
    processed_probs_ref,
    sample,
    sample_ref,
    uniform,
)
from torch import Tensor

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.7},
    "tight top-p": {"top_p": 1e-6},
    "penalty": {"repetition_penalty": 1.8},
    "k then p": {"top_k": 6, "top_p": 0.6},
    "preset": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1},
    "all": {"temperature": 1.5, "top_k": 8, "top_p": 0.8, "repetition_penalty": 1.3},
}


TRITON_RAND = """
import torch, triton, triton.language as tl
from ppomax.kernels.sampling import uniform

@triton.jit
def rand(seed_ptr, offset_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, tl.rand(tl.load(seed_ptr + i), tl.load(offset_ptr + i)))

seeds = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**40 + 5, 2**62, -3] * 3)
positions = torch.tensor([0] * 7 + [1, 77, 2**31 - 1, 12, 13, 14, 15] + [2**32 + 1] * 7)
out = torch.empty(21)
rand[(21,)](seeds, positions, out)
assert torch.equal(out, uniform(seeds, positions)), (out, uniform(seeds, positions))
"""


def streams(n: int, seed: int = 0) -> dict[str, Tensor]:
    return {"seeds": torch.arange(n) + 1000 * seed, "positions": torch.arange(n) * 7 % 50}


def seen_tokens(n: int, vocab: int) -> Tensor:
    """[n, 6] with repeats, paddings among them, and a row of paddings only."""
    seen = torch.randint(-1, vocab, (n, 6))
    seen[:, 3] = seen[:, 0]
    seen[0] = -1
    return seen


def per_row(options: dict[str, Any], n: int) -> dict[str, Any]:
    """The same options, for every second row off, as tensors."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    on = torch.arange(n) % 2 == 0
    return {
        name: torch.where(on, torch.tensor(value), torch.tensor(off[name], dtype=torch.tensor(value).dtype))
        for name, value in options.items()
    }


def test_philox_known_answers() -> None:
    """The vectors published with Random123 (kat_vectors, philox4x32 10)."""
    counter = [[0, 0, 0, 0], [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]]
    key = [[0, 0], [0xFFFFFFFF] * 2, [0xA4093822, 0x299F31D0]]
    expected = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    words = philox_words(torch.tensor(counter).t(), torch.tensor(key).t())
    assert words.t().tolist() == expected


def test_uniform_is_tritons_rand(tmp_path: Path) -> None:
    """Bit for bit the numbers of tl.rand, here in the interpreter, which wants a process of its own."""
    pytest.importorskip("triton")
    script = tmp_path / "rand.py"
    script.write_text(TRITON_RAND)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, str(script)], env=environment, check=True)


def test_uniform_is_uniform() -> None:
    u = uniform(torch.arange(200_000), torch.zeros(200_000, dtype=torch.int64)).double()
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0
    counts = torch.histc(u, 64, 0, 1)
    assert chi_square(counts, torch.full((64,), 1 / 64, dtype=torch.float64)) < critical(63)
    across = uniform(torch.full((200_000,), 7), torch.arange(200_000)).double()
    assert chi_square(torch.histc(across, 64, 0, 1), torch.full((64,), 1 / 64, dtype=torch.float64)) < critical(63)
    assert abs(float(torch.corrcoef(torch.stack([u, across]))[0, 1])) < 0.01


def chi_square(counts: Tensor, probs: Tensor) -> float:
    expected = counts.sum() * probs
    assert float(counts[expected == 0].sum()) == 0, "a token outside the distribution was drawn"
    used = expected > 0
    return float(((counts - expected)[used] ** 2 / expected[used]).sum())


def critical(df: int) -> float:
    """Wilson-Hilferty: a chi-square of `df` exceeds this with probability 1e-4."""
    return df * (1 - 2 / (9 * df) + 3.72 * (2 / (9 * df)) ** 0.5) ** 3


@pytest.mark.parametrize("rowwise", [False, True], ids=["scalar", "per-row"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_frequencies_are_those_of_the_processed_distribution(options: dict, rowwise: bool) -> None:
    draws, vocab = 20_000, 14
    logits = torch.randn(vocab) * 1.5
    seen = torch.tensor([2, 5, 2, -1])
    chosen = {name: torch.full((draws,), value) for name, value in options.items()} if rowwise else options
    out = sample(logits.expand(draws, vocab), seen=seen.expand(draws, 4), **chosen, **streams(draws))
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    probs = processed_probs_ref(logits, seen=seen, **{**defaults, **options})
    df = max(int((probs > 0).sum()) - 1, 1)
    assert chi_square(torch.bincount(out.tokens, minlength=vocab).double(), probs) < critical(df)
    torch.testing.assert_close(out.behavior_logprobs, probs[out.tokens].log().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logprobs, logits.log_softmax(0)[out.tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("unseeing")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_draws_without_looking(options: dict) -> None:
    logits, seen = torch.randn(30, 200) * 2, seen_tokens(30, 200)
    ours = sample(logits, seen=seen, **per_row(options, 30), **streams(30))
    exact = sample_ref(logits, seen=seen, **per_row(options, 30), **streams(30))
    assert torch.equal(ours.tokens, exact.tokens)
    torch.testing.assert_close(ours.behavior_logprobs.double(), exact.behavior_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rowwise", [False, True], ids=["scalar", "per-row"])
@pytest.mark.parametrize("vocab", [3, 50, 700, 3000])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_draws_equal_the_reference(options: dict, vocab: int, rowwise: bool) -> None:
    n = 40
    logits = torch.randn(n, vocab) * torch.linspace(0.1, 4, n)[:, None]
    seen = seen_tokens(n, vocab)
    chosen = per_row(options, n) if rowwise else options
    ours = sample(logits, seen=seen, **chosen, **streams(n))
    exact = sample_ref(logits, seen=seen, **chosen, **streams(n))
    assert torch.equal(ours.tokens, exact.tokens)
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("vocab", [511, 4099])
def test_a_row_does_not_depend_on_its_neighbours(options: dict, vocab: int) -> None:
    n = 24
    logits, seen = torch.randn(n, vocab) * 3, seen_tokens(n, vocab)
    stream = streams(n)
    together = sample(logits, seen=seen, **options, **stream)
    for r in (0, 1, 13, 23):
        row = slice(r, r + 1)
        alone = sample(logits[row], seen=seen[row], **options, **{k: v[row] for k, v in stream.items()})
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[row])
    again = sample(logits, seen=seen, **options, **stream)
    assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))


def test_greedy() -> None:
    logits = torch.randn(10, 60)
    out = sample(logits, temperature=0.0, top_p=0.1, **streams(10))
    assert torch.equal(out.tokens, logits.argmax(1))
    assert torch.equal(out.behavior_logprobs, torch.zeros(10))
    torch.testing.assert_close(out.logprobs, logits.log_softmax(1).amax(1))
    mixed = sample(logits, temperature=torch.tensor([0.0, 1.0] * 5), **streams(10))
    assert torch.equal(mixed.tokens[::2], out.tokens[::2])
    assert torch.equal(mixed.behavior_logprobs[::2], torch.zeros(5))
    plain = sample(logits, **streams(10))
    assert torch.equal(mixed.tokens[1::2], plain.tokens[1::2])


def test_repetition_penalty_is_ctrls_and_once_per_token() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    seen = torch.tensor([[0, 0, 1, -1, 0, 3]])
    assert sampling.penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, 0.0]]
    assert logits.tolist() == [[2.0, -2.0, 1.0, 0.0]]
    assert sampling.penalise(logits, torch.tensor([[-1, -1]]), 2.0).tolist() == logits.tolist()
    rowwise = sampling.penalise(logits.repeat(2, 1), seen.repeat(2, 1), torch.tensor([[1.0], [2.0]]))
    assert rowwise.tolist() == [[2.0, -2.0, 1.0, 0.0], [1.0, -4.0, 1.0, 0.0]]


@pytest.mark.parametrize("bisect", [False, True], ids=["candidates", "bisection"])
def test_ties_go_to_the_lower_id(bisect: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if bisect:
        monkeypatch.setattr(sampling, "_CANDIDATES", ())
    p = torch.tensor([[0.125, 0.25, 0.125, 0.25, 0.125, 0.125]])
    for k, kept in {1: [1], 2: [1, 3], 3: [0, 1, 3], 5: [0, 1, 2, 3, 4], 6: range(6)}.items():
        assert cut_top_k(p, k).nonzero()[:, 1].tolist() == list(kept)
        assert cut_top_k(p, torch.tensor([[k]])).nonzero()[:, 1].tolist() == list(kept)
    for top_p, kept in {0.0: [1], 0.25: [1], 0.26: [1, 3], 0.5: [1, 3], 0.6: [0, 1, 3], 0.75: [0, 1, 2, 3]}.items():
        assert cut_top_p(p, top_p).nonzero()[:, 1].tolist() == list(kept), top_p
    assert torch.equal(cut_top_p(p, 1.0), p)
    assert torch.equal(cut_top_k(p, torch.tensor([[0]])), p)


def test_bisection_without_looking_is_the_same() -> None:
    """The form for other devices."""
    p = torch.softmax(torch.randn(5, 900) * 3, 1).bfloat16().float()
    for target in (0.2, 0.9):
        goal = torch.full((5, 1), target, dtype=torch.float64)

        def mass(p: Tensor, t: Tensor) -> Tensor:
            return torch.where(p >= t, p, 0.0).sum(1, keepdim=True, dtype=torch.float64)

        expected = sampling._threshold_of_mass(p, goal, (900,))
        assert torch.equal(sampling._largest_threshold(p, goal, mass), expected)
        assert torch.equal(sampling._threshold_of_mass(p, goal, ()), expected)


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("vocab", [40, 300, 5000])
def test_cuts_equal_a_full_sort(vocab: int, spread: float) -> None:
    """On probabilities rounded so that many are equal."""
    p = torch.softmax(torch.randn(6, vocab) * spread, 1).bfloat16().float()
    order = p.sort(dim=1, descending=True, stable=True)
    for top_p in (0.1, 0.5, 0.9, 0.999):
        mass = order.values.cumsum(1, dtype=torch.float64)
        keep = mass - order.values < top_p * mass[:, -1:]
        expected = torch.zeros_like(p).scatter(1, order.indices, torch.where(keep, order.values, 0.0))
        assert torch.equal(cut_top_p(p, top_p), expected)
        assert torch.equal(cut_top_p(p, torch.full((6, 1), top_p, dtype=torch.float64)), expected)
    for k in (1, 7, 39):
        expected = torch.zeros_like(p).scatter(1, order.indices[:, :k], order.values[:, :k])
        assert torch.equal(cut_top_k(p, k), expected)
        assert torch.equal(cut_top_k(p, torch.full((6, 1), k)), expected)


def test_extreme_logits() -> None:
    logits = torch.full((3, 100), -torch.inf)
    logits[:, 40:43] = torch.tensor([1e4, 1e4, -1e4])
    for options in ({}, {"top_p": 0.9, "top_k": 50}, {"temperature": 1e-3}, {"temperature": 100.0}):
        out = sample(logits, **options, **streams(3))
        assert bool(((out.tokens == 40) | (out.tokens == 41)).all())
        torch.testing.assert_close(out.logprobs, torch.full((3,), 0.5).log())


def test_half_precision_logits_and_dtypes() -> None:
    logits = torch.randn(5, 200).bfloat16()
    half, full = sample(logits, top_p=0.9, **streams(5)), sample(logits.float(), top_p=0.9, **streams(5))
    assert all(torch.equal(a, b) for a, b in zip(half, full, strict=True))
    assert [t.dtype for t in half] == [torch.int64, torch.float32, torch.float32]


def test_nothing_to_do() -> None:
    out = sample(torch.zeros(0, 10), **streams(0))
    assert [t.shape for t in out] == [(0,)] * 3
    one = sample(torch.zeros(1, 1), top_k=5, top_p=0.5, **streams(1))
    assert (int(one.tokens), float(one.logprobs), float(one.behavior_logprobs)) == (0, 0.0, 0.0)
    assert sample(torch.zeros(2, 9), seen=torch.zeros(2, 0, dtype=torch.int64), repetition_penalty=2.0, **streams(2))


def test_wrong_arguments_raise() -> None:
    logits = torch.zeros(3, 10)
    for match, call in {
        "seeds": lambda: sample(logits, **streams(2)),
        "temperature has shape": lambda: sample(logits, temperature=torch.ones(2), **streams(3)),
        "seen has 2 rows": lambda: sample(logits, seen=torch.zeros(2, 4, dtype=torch.int64), **streams(3)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
