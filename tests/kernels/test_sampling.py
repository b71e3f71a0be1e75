"""Sampling: draws equal to the reference's, chi-square, borders and ties, log-probs, independence of rows, edges."""

from typing import Any

import pytest
import torch
from ppomax.kernels import sampling
from ppomax.kernels.philox import uniform
from ppomax.kernels.sampling import Sample, processed_probs_ref, sample, sample_ref
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
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}

every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
both_paths = pytest.mark.usefixtures("path")


def interpreted(path: str) -> bool:
    """Whether kernels are run slowly: some 50 ms a row."""
    return path == "triton" and not torch.cuda.is_available()


def streams(n: int, seed: int = 0) -> dict[str, Tensor]:
    return {"seeds": torch.arange(n) + 1000 * seed, "positions": torch.arange(n) * 7 % 50}


def spread_streams(n: int) -> dict[str, Tensor]:
    """Streams whose random numbers lie in the middle of n equal parts of [0, 1), as near as 100,000 seeds allow."""
    seeds = torch.arange(100_000)
    u = uniform(seeds, torch.zeros_like(seeds))
    order = u.argsort()
    middles = (torch.arange(n, dtype=u.dtype) + 0.5) / n
    chosen = order[torch.searchsorted(u[order], middles).clamp(max=len(seeds) - 1)]
    return {"seeds": chosen, "positions": torch.zeros(n, dtype=torch.int64)}


def seen_tokens(n: int, vocab: int) -> Tensor:
    """[n, 6] with repeats, paddings among them, and a row of paddings only."""
    seen = torch.randint(-1, vocab, (n, 6))
    seen[:, 3] = seen[:, 0]
    seen[0] = -1
    return seen


def per_row(options: dict[str, Any], n: int) -> dict[str, Any]:
    """The same options, for every second row off, as tensors."""
    on = torch.arange(n) % 2 == 0
    return {
        name: torch.where(on, torch.tensor(value), torch.tensor(OFF[name], dtype=torch.tensor(value).dtype))
        for name, value in options.items()
    }


def kept_tokens(logits: Tensor, **options: Any) -> list[int]:
    """What can be drawn from logits [V]: a draw for each of 8 random numbers spread over [0, 1)."""
    out = sample(logits.expand(8, -1), **options, **spread_streams(8))
    return sorted(set(out.tokens.tolist()))


def chi_square(counts: Tensor, probs: Tensor) -> float:
    expected = counts.sum() * probs
    assert float(counts[expected == 0].sum()) == 0, "a token outside the distribution was drawn"
    used = expected > 0
    return float(((counts - expected)[used] ** 2 / expected[used]).sum())


def critical(df: int) -> float:
    """Wilson-Hilferty: a chi-square of `df` exceeds this with probability 1e-4."""
    return df * (1 - 2 / (9 * df) + 3.72 * (2 / (9 * df)) ** 0.5) ** 3


@pytest.mark.parametrize("rowwise", [False, True], ids=["scalar", "per-row"])
@every_option
def test_frequencies_are_those_of_the_processed_distribution(options: dict, rowwise: bool, path: str) -> None:
    if interpreted(path) and (rowwise or len(options) < 2):
        pytest.skip("slow, and the draws are compared one by one below")
    draws, vocab = (48, 6) if interpreted(path) else (20_000, 14)
    logits = torch.randn(vocab) * 1.5
    seen = torch.tensor([2, 5, 2, -1])
    chosen = {name: torch.full((draws,), value) for name, value in options.items()} if rowwise else options
    out = sample(logits.expand(draws, vocab), seen=seen.expand(draws, 4), **chosen, **streams(draws))
    probs = processed_probs_ref(logits, seen=seen, **{**OFF, **options})
    df = max(int((probs > 0).sum()) - 1, 1)
    assert chi_square(torch.bincount(out.tokens, minlength=vocab).double(), probs) < critical(df)
    torch.testing.assert_close(out.behavior_logprobs, probs[out.tokens].log().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logprobs, logits.log_softmax(0)[out.tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("unseeing")
@every_option
def test_draws_without_looking(options: dict) -> None:
    logits, seen = torch.randn(30, 200) * 2, seen_tokens(30, 200)
    ours = sample(logits, seen=seen, **per_row(options, 30), **streams(30))
    exact = sample_ref(logits, seen=seen, **per_row(options, 30), **streams(30))
    assert torch.equal(ours.tokens, exact.tokens)
    torch.testing.assert_close(ours.behavior_logprobs.double(), exact.behavior_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rowwise", [False, True], ids=["scalar", "per-row"])
@pytest.mark.parametrize("vocab", [3, 50, 700, 3000])
@every_option
def test_draws_equal_the_reference(options: dict, vocab: int, rowwise: bool, path: str) -> None:
    n = 4 if interpreted(path) else 40
    logits = torch.randn(n, vocab) * torch.linspace(0.1, 4, n)[:, None]
    seen = seen_tokens(n, vocab)
    chosen = per_row(options, n) if rowwise else options
    ours = sample(logits, seen=seen, **chosen, **streams(n))
    exact = sample_ref(logits, seen=seen, **chosen, **streams(n))
    assert torch.equal(ours.tokens, exact.tokens.to(ours.tokens.device))
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@both_paths
@every_option
def test_logprobs_are_no_worse_than_plain_ones(options: dict, no_worse: Any) -> None:
    """Both log-probs of the drawn tokens against float64, beside those of a plain float32 softmax."""
    logits, seen = torch.randn(4, 900) * 4, seen_tokens(4, 900)
    out = sample(logits, seen=seen, **options, **streams(4))
    arguments = {**OFF, **options}
    exact, plain = [], []
    for r, token in enumerate(out.tokens.tolist()):
        p = processed_probs_ref(logits[r], seen=seen[r], **arguments)
        exact.append((logits[r].double().log_softmax(0)[token], p[token].log()))
        z = logits[r] if "repetition_penalty" not in options else penalised_once(logits[r], seen[r], options)
        kept = torch.where(p > 0, z / arguments["temperature"], -torch.inf)
        plain.append((logits[r].log_softmax(0)[token], kept.log_softmax(0)[token]))
    columns = [torch.stack([torch.stack(row) for row in rows]).unbind(1) for rows in (plain, exact)]
    no_worse([out.logprobs, out.behavior_logprobs], *columns)


def penalised_once(logits: Tensor, seen: Tensor, options: dict[str, Any]) -> Tensor:
    penalty = options["repetition_penalty"]
    mask = torch.zeros(logits.shape[0] + 1, dtype=torch.bool).index_fill_(0, seen + 1, True)[1:]
    return torch.where(mask, torch.where(logits >= 0, logits / penalty, logits * penalty), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_paths_draw_the_same_but_at_borders(dtype: torch.dtype, path: str) -> None:
    """Random numbers as near to borders of the cumulative distribution as 2^18 seeds offer: there rounding may decide,
    between the two tokens that meet; the border has to be within 1e-6 of the random number."""
    if path == "torch":
        pytest.skip("the other path is compared with it")
    n = 12
    logits = (torch.randn(300) * 2).to(dtype)
    probs = processed_probs_ref(logits, top_p=0.9, **{k: v for k, v in OFF.items() if k != "top_p"}, seen=None)
    cdf = probs.cumsum(0)
    seeds = torch.arange(1 << 18)
    u = uniform(seeds, torch.zeros_like(seeds)).double()
    distance = (u[:, None] - cdf[cdf < 0.999].unique()[None, :]).abs().amin(1)
    near = distance.argsort()[:n]
    options = sampling._Options(temperature=None, top_k=None, top_p=0.9, penalty=None, seen=None)
    tokens, *_ = sampling._sample_torch(logits.expand(n, -1), options, u[near])
    ours = sample(logits.expand(n, -1), top_p=0.9, seeds=seeds[near], positions=torch.zeros_like(near))
    for row in (ours.tokens != tokens).nonzero().flatten().tolist():
        lower, upper = sorted((int(ours.tokens[row]), int(tokens[row])))
        assert float(distance[near[row]]) < 1e-6
        assert float(probs[lower + 1 : upper].sum()) == 0.0
        assert min(float(probs[lower]), float(probs[upper])) > 0.0


@both_paths
def test_equal_logits_share_the_unit_interval() -> None:
    """With V = 2^14 equal logits all sums are exact: the token is floor(V u), also where V u is a whole number."""
    vocab, seeds = 1 << 14, torch.arange(100_000)
    place = uniform(seeds, torch.zeros_like(seeds)).double() * vocab
    seeds = torch.cat([spread_streams(4)["seeds"], (place == place.floor()).nonzero().flatten()[:4]])
    out = sample(torch.zeros(1, vocab).expand(8, -1), seeds=seeds, positions=torch.zeros_like(seeds))
    assert torch.equal(out.tokens, place[seeds].long())


@both_paths
def test_borders_of_top_p_and_top_k() -> None:
    """The smallest set that reaches p, ties by the lower id: a sort by probability alone, `<` for `<=`, or leaving the
    crossing token out show here."""
    logits = torch.tensor([0.125, 0.25, 0.125, 0.25, 0.125, 0.125]).log()
    expected = {0.2: [1], 0.3: [1, 3], 0.55: [0, 1, 3], 0.7: [0, 1, 2, 3], 0.99: [0, 1, 2, 3, 4, 5]}
    for top_p, kept in expected.items():
        assert kept_tokens(logits, top_p=top_p) == kept, top_p
    for top_k, kept in {1: [1], 2: [1, 3], 3: [0, 1, 3], 5: [0, 1, 2, 3, 4]}.items():
        assert kept_tokens(logits, top_k=top_k) == kept, top_k
    assert kept_tokens(logits, top_k=3, top_p=0.75) == [1, 3]  # of a mass of 0.625, as renormalised
    assert kept_tokens(logits, top_k=4, top_p=0.9) == [0, 1, 2, 3]
    for top_p, kept in {0.25: [0, 1], 0.5: [0, 1, 2, 3]}.items():  # reached exactly
        assert kept_tokens(torch.zeros(8), top_p=top_p) == kept
    for tied in (-0.7, -0.9, -1.5):  # all of what top-k keeps, whatever its mass is rounded to
        logits = torch.tensor([tied, 0.0, tied, tied, tied])
        assert kept_tokens(logits, top_k=3, top_p=1 - 1e-12) == [0, 1, 2]


@both_paths
@pytest.mark.parametrize(
    "options", [{"top_p": 0.9, "temperature": 2.0}, {"top_k": 500}, {"top_k": 700, "top_p": 0.5}], ids=str
)
def test_flat_distributions(options: dict, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More candidates than the kernel's buffer takes, so that it has to narrow the border down in passes."""
    if path == "triton":
        from ppomax.kernels.gpu import sampling as triton_path

        configuration, small = triton_path.configuration, {"sample_draw": {"CAPACITY": 32, "BLOCK_S": 2}}
        monkeypatch.setattr(
            triton_path, "configuration", lambda name, *a, **k: {**configuration(name, *a, **k), **small.get(name, {})}
        )
    rows = [torch.randn(1000), torch.randn(1000).round(), torch.zeros(1000), torch.randn(1000) - 300.0]
    logits = torch.stack(rows)
    ours = sample(logits, **options, **streams(4))
    exact = sample_ref(logits, **options, **streams(4))
    assert torch.equal(ours.tokens, exact.tokens)
    torch.testing.assert_close(ours.behavior_logprobs.double(), exact.behavior_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("vocab", [511, 4099])
def test_a_row_does_not_depend_on_its_neighbours(options: dict, vocab: int, path: str) -> None:
    n = 3 if interpreted(path) else 24
    logits, seen = torch.randn(n, vocab) * 3, seen_tokens(n, vocab)
    stream = streams(n)
    together = sample(logits, seen=seen, **options, **stream)
    for r in {0, 1, n // 2, n - 1}:
        row = slice(r, r + 1)
        alone = sample(logits[row], seen=seen[row], **options, **{k: v[row] for k, v in stream.items()})
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[row])
    if not interpreted(path):
        again = sample(logits, seen=seen, **options, **stream)
        assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))


@both_paths
def test_greedy() -> None:
    logits = torch.randn(6, 60)
    logits[2, 7] = logits[2, 30] = 9.0  # the lower id wins
    out = sample(logits, temperature=0.0, top_p=0.1, **streams(6))
    assert torch.equal(out.tokens, logits.argmax(1))
    assert int(out.tokens[2]) == 7
    assert torch.equal(out.behavior_logprobs, torch.zeros(6))
    torch.testing.assert_close(out.logprobs, logits.log_softmax(1).amax(1))
    mixed = sample(logits, temperature=torch.tensor([0.0, 1.0] * 3), top_p=torch.tensor(1.0), **streams(6))
    assert torch.equal(mixed.tokens[::2], out.tokens[::2])
    assert torch.equal(mixed.behavior_logprobs[::2], torch.zeros(3))
    plain = sample(logits, **streams(6))
    assert torch.equal(mixed.tokens[1::2], plain.tokens[1::2])


@both_paths
def test_repetition_penalty_is_ctrls_and_once_per_token() -> None:
    """Greedy tokens: 2 / 1.3 stays above 1.5 and 2 / 1.3^2 does not; -1 * 1.3 falls below -1.2; -inf stays."""
    logits = torch.tensor([[2.0, 1.5, -5.0], [-1.0, -1.2, -9.0], [0.0, -1.0, -torch.inf], [2.0, 1.5, 1.9]])
    seen = torch.tensor([[0, 0, -1], [0, -1, -1], [0, 2, 0], [-1, -1, -1]])
    greedy = {"temperature": 0.0, "seen": seen, **streams(4)}
    assert sample(logits, repetition_penalty=1.3, **greedy).tokens.tolist() == [0, 1, 0, 0]
    assert sample(logits, repetition_penalty=1.4, **greedy).tokens.tolist() == [1, 1, 0, 0]
    by_row = torch.tensor([1.4, 1.0, 1.4, 1.4])
    assert sample(logits, repetition_penalty=by_row, **greedy).tokens.tolist() == [1, 0, 0, 0]
    assert logits[0].tolist() == [2.0, 1.5, -5.0]


def test_penalised_logits() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    seen = torch.tensor([[0, 0, 1, -1, 0, 3]])
    assert sampling.penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, 0.0]]
    assert logits.tolist() == [[2.0, -2.0, 1.0, 0.0]]
    assert sampling.penalise(logits, torch.tensor([[-1, -1]]), 2.0).tolist() == logits.tolist()
    rowwise = sampling.penalise(logits.repeat(2, 1), seen.repeat(2, 1), torch.tensor([[1.0], [2.0]]))
    assert rowwise.tolist() == [[2.0, -2.0, 1.0, 0.0], [1.0, -4.0, 1.0, 0.0]]


@both_paths
@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9, "top_k": 50}, {"temperature": 1e-3}, {"temperature": 100.0}], ids=str
)
def test_extreme_logits(options: dict) -> None:
    """Columns of -inf, 1e4 beside -1e4, all mass in one token, and all logits far from 0."""
    logits = torch.full((4, 100), -torch.inf)
    logits[:2, 40:43] = torch.tensor([1e4, 1e4, -1e4])
    logits[2, 71] = -1e4
    logits[3] = 1e4 + torch.arange(100) / 64
    out = sample(logits, **options, **streams(4))
    assert bool(((out.tokens[:2] == 40) | (out.tokens[:2] == 41)).all())
    torch.testing.assert_close(out.logprobs[:2], torch.full((2,), 0.5).log())
    assert int(out.tokens[2]) == 71
    assert out.logprobs[2].tolist() == out.behavior_logprobs[2].tolist() == 0.0
    exact = sample_ref(logits[3:], **options, **{k: v[3:] for k, v in streams(4).items()})
    assert torch.equal(out.tokens[3:], exact.tokens)
    torch.testing.assert_close(out.logprobs[3:].double(), exact.logprobs, rtol=1e-5, atol=1e-5)


@both_paths
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3}, {"temperature": 0.0}], ids=str)
def test_broken_rows_stay_by_themselves(options: dict) -> None:
    """NaN and rows of nothing but -inf draw some token of the vocabulary with NaN log-probs; others are as alone."""
    logits = torch.randn(7, 150)
    logits[0, 3], logits[1], logits[2] = torch.nan, torch.nan, -torch.inf
    logits[3, 149], logits[4, 3] = -torch.nan, torch.inf
    logits[5, 64:128], logits[5, 100] = -torch.inf, torch.nan  # a group that no cut would list
    out = sample(logits, **options, **streams(7))
    assert bool(((out.tokens >= 0) & (out.tokens < 150)).all())
    for x in (out.logprobs, out.behavior_logprobs):
        assert x.isnan().tolist() == [True] * 6 + [False]
    alone = sample(logits[6:], **options, **{k: v[6:] for k, v in streams(7).items()})
    assert all(torch.equal(a, b[6:]) for a, b in zip(alone, out, strict=True))


@both_paths
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits(dtype: torch.dtype) -> None:
    """Read as they are: the same as their float32 copies, log-probs in float32."""
    logits = torch.randn(4, 200).to(dtype)
    half, full = sample(logits, top_p=0.9, **streams(4)), sample(logits.float(), top_p=0.9, **streams(4))
    assert torch.equal(half.tokens, full.tokens)
    assert [t.dtype for t in half] == [torch.int64, torch.float32, torch.float32]
    for a, b in zip(half[1:], full[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@both_paths
def test_large_vocabulary() -> None:
    logits = torch.randn(1, 151_937) * 3
    for options in ({}, {"top_k": 40, "top_p": 0.8}):
        ours, exact = sample(logits, **options, **streams(1)), sample_ref(logits, **options, **streams(1))
        assert torch.equal(ours.tokens, exact.tokens)
        torch.testing.assert_close(ours.logprobs.double(), exact.logprobs, rtol=1e-5, atol=1e-5)


@both_paths
def test_edges() -> None:
    out = sample(torch.zeros(0, 10), top_k=3, seen=torch.zeros(0, 2, dtype=torch.int64), **streams(0))
    assert [t.shape for t in out] == [(0,)] * 3
    one = sample(torch.zeros(1, 1), top_k=5, top_p=0.5, **streams(1))
    assert (int(one.tokens), float(one.logprobs), float(one.behavior_logprobs)) == (0, 0.0, 0.0)
    logits = torch.randn(3, 9)
    plain = sample(logits, **streams(3))
    nothing_seen = torch.zeros(3, 0, dtype=torch.int64)
    for options in ({"seen": nothing_seen, "repetition_penalty": 2.0}, {"top_k": 9}, {"top_k": 100}, {"top_p": 1.5}):
        assert torch.equal(sample(logits, **options, **streams(3)).tokens, plain.tokens), options


@both_paths
def test_strided_inputs() -> None:
    logits, seen = torch.randn(8, 2, 70)[::2, 1], seen_tokens(4, 70).repeat(1, 2)[:, :6]
    options = {"top_p": torch.tensor([0.5, 0.0, 0.9, 0.0])[::2].repeat_interleave(2), "repetition_penalty": 1.5}
    stream = {"seeds": torch.arange(8)[1::2], "positions": torch.arange(4, dtype=torch.int32)}
    contiguous = {name: x.long().contiguous() for name, x in stream.items()}
    ours = sample(logits, seen=seen, **options, **stream)
    plain = sample(logits.clone(), seen=seen.contiguous(), **options, **contiguous)
    turned = sample(logits.t().contiguous().t(), seen=seen.t().contiguous().t(), **options, **stream)
    for a, b, c in zip(ours, plain, turned, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@both_paths
@pytest.mark.parametrize("rowwise", [False, True], ids=["scalar", "per-row"])
def test_compiles_in_one_graph(rowwise: bool) -> None:
    logits, seen = torch.randn(3, 40), seen_tokens(3, 40)
    options = per_row(OPTIONS["all"], 3) if rowwise else OPTIONS["all"]

    def draw(x: Tensor) -> Sample:
        return sample(x * 1.0, seen=seen, **options, **streams(3))

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")(logits)
    for a, b in zip(compiled, draw(logits), strict=True):
        assert torch.equal(a, b)


@both_paths
def test_custom_op_is_sound() -> None:
    logits, seen = torch.randn(2, 20), torch.tensor([[3, -1], [0, 7]])
    stream = (torch.tensor([3, 4]), torch.tensor([0, 9]))
    by_row = (torch.tensor([0.7, 0.0]), torch.tensor([5, 0]), torch.tensor([0.9, 1.0]), torch.tensor([1.2, 1.0]))
    op = torch.ops.ppomax.sample.default
    torch.library.opcheck(op, (logits, 1.0, None, 0, None, 1.0, None, 1.0, None, None, *stream))
    t, k, p, c = by_row
    torch.library.opcheck(op, (logits, 1.0, t, 0, k, 1.0, p, 1.0, c, seen, *stream))


def test_wrong_arguments_raise() -> None:
    logits = torch.zeros(3, 10)
    for match, call in {
        "seeds": lambda: sample(logits, **streams(2)),
        "temperature has shape": lambda: sample(logits, temperature=torch.ones(2), **streams(3)),
        "seen has 2 rows": lambda: sample(logits, seen=torch.zeros(2, 4, dtype=torch.int64), **streams(3)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
