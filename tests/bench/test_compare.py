"""The comparison of result files, on samples whose truth is known."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Write = Callable[..., Path]


@pytest.fixture
def compare(bench: Callable[[str], Any]) -> Any:
    return bench("compare")


def noisy(random: np.random.Generator, count: int, spread: float, scale: float = 1.0) -> list[float]:
    return (scale * np.exp(random.normal(0, spread, count))).tolist()


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 3), (4, 6), (5, 5)])
@pytest.mark.parametrize("tail", [0.005, 0.025, 0.1])
def test_the_rank_test_is_exact(compare: Any, n: int, m: int, tail: float) -> None:
    counts = Counter(sum(ranks) - n * (n - 1) // 2 for ranks in combinations(range(n + m), n))
    total = sum(counts.values())
    below = [sum(c for u, c in counts.items() if u < k) / total for k in range(n * m + 2)]
    assert compare.rejected(n, m, tail) == max(k for k, p in enumerate(below) if p <= tail)


def test_many_samples_join_the_exact_ones(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = compare.rejected(40, 45, 0.005)
    compare.rejected.cache_clear()
    monkeypatch.setattr(compare, "EXACT", 1)
    assert compare.rejected(40, 45, 0.005) == pytest.approx(exact, abs=2)
    compare.rejected.cache_clear()


@pytest.mark.parametrize(("count", "spread"), [(5, 0.02), (9, 0.3), (30, 0.05)])
def test_equal_distributions_are_rarely_told_apart(compare: Any, count: int, spread: float) -> None:
    """At a confidence of 95 % and no margin: one in twenty, here of 300, give or take its own noise."""
    random = np.random.default_rng(count)
    changes = [
        compare.change("case", "x", noisy(random, count, spread), noisy(random, count, spread), 0.95)
        for _ in range(300)
    ]
    wrong = sum(change.verdict(0.0) in ("faster", "slower") for change in changes)
    assert 1 <= wrong <= 27  # mean at most 15, standard deviation 3.8
    assert sum(change.verdict(0.03) in ("faster", "slower") for change in changes) <= wrong


@pytest.mark.parametrize(("count", "spread", "least"), [(5, 0.01, 190), (9, 0.02, 190), (30, 0.05, 190)])
def test_ten_percent_are_seen(compare: Any, count: int, spread: float, least: int) -> None:
    random = np.random.default_rng(count)
    verdicts = Counter(
        compare.change("case", "x", noisy(random, count, spread), noisy(random, count, spread, 1.1), 0.99).verdict(0.03)
        for _ in range(200)
    )
    assert verdicts["slower"] >= least
    assert verdicts["faster"] == verdicts["same"] == 0


def test_same_is_said_where_the_noise_allows_it(compare: Any) -> None:
    random = np.random.default_rng(0)
    quiet, loud = (compare.change("c", "x", noisy(random, 30, s), noisy(random, 30, s), 0.99) for s in (0.01, 0.2))
    assert (quiet.verdict(0.03), loud.verdict(0.03)) == ("same", "cannot tell")
    assert compare.change("c", "x", [1.0, 1.1], [5.0, 5.1], 0.99).verdict(0.03) == "cannot tell"  # too few


def test_one_disturbed_sample_changes_no_verdict(compare: Any) -> None:
    old, new = [1.0, 1.01, 0.99, 1.02, 1.0, 0.98] * 3, [1.2, 1.21, 1.19, 1.2, 1.18, 1.22] * 3
    assert compare.change("c", "x", old, [*new, 90.0], 0.99).verdict(0.03) == "slower"
    assert compare.change("c", "x", [*old, 90.0], new, 0.99).verdict(0.03) == "slower"
    assert compare.change("c", "x", new, old, 0.99).verdict(0.03) == "faster"


ENVIRONMENT = {"date": "2026-01-01", "cpu": "a CPU", "torch": "2.13", "ppomax": "0.1"}


@pytest.fixture
def write(tmp_path: Path, compare: Any) -> Write:
    """write(name, milliseconds of ours, of eager): a result file of one case."""

    def make(name: str, ours: Sequence[float], eager: Sequence[float], **environment: str) -> Path:
        samples = {"gae, 2 x 3": {"ppomax": list(ours), "torch eager": list(eager)}}
        path = tmp_path / f"{name}.json"
        compare.records.write(path, {"environment": ENVIRONMENT | environment, "samples_ms": samples})
        return path

    return make


def run(compare: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    return ended.value.code


STEADY = [1.0, 1.01, 0.99, 1.005, 0.995, 1.0]


def test_exit_status(compare: Any, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    old = write("old", STEADY, STEADY)
    slow = write("slow", [1.3 * x for x in STEADY], STEADY, date="2026-02-02", ppomax="0.2")
    assert run(compare, monkeypatch, old, slow) == 0
    assert "slower" in capsys.readouterr().out
    assert run(compare, monkeypatch, old, slow, "--fail-on", "slower") == 1
    assert run(compare, monkeypatch, slow, old, "--fail-on", "slower") == 0
    assert "faster" in capsys.readouterr().out


def test_a_slower_machine_is_not_a_slower_operation(
    compare: Any, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = write("old", STEADY, STEADY), write("new", *([1.3 * x for x in STEADY],) * 2)
    assert run(compare, monkeypatch, old, new, "--fail-on", "slower") == 1
    assert run(compare, monkeypatch, old, new, "--fail-on", "slower", "--against", "torch eager") == 0
    assert "no case has a provider 'TRL'" in str(run(compare, monkeypatch, old, new, "--against", "TRL"))


def test_other_machines_get_no_verdict(
    compare: Any, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    old, new = write("old", STEADY, STEADY), write("new", [1.3 * x for x in STEADY], STEADY, torch="2.12")
    assert run(compare, monkeypatch, old, new) == 0
    out = capsys.readouterr().out
    assert "slower" not in out
    assert "1.300" in out
    assert "torch: 2.13, then 2.12" in out
    assert "no verdicts" in str(run(compare, monkeypatch, old, new, "--fail-on", "slower"))
    assert run(compare, monkeypatch, old, new, "--fail-on", "slower", "--force") == 1


def test_files_of_pytest_benchmark(compare: Any, write: Write, tmp_path: Path) -> None:
    old = write("old", STEADY, STEADY)
    entry = {"group": "gae, 2 x 3", "name": "test_x", "fullname": "x", "extra_info": {"provider": "ppomax"}}
    stats = {"data": [x / 1e3 for x in STEADY]}
    report = {"machine_info": {"environment": ENVIRONMENT}, "benchmarks": [{**entry, "stats": stats}]}
    (tmp_path / "theirs.json").write_text(json.dumps(report))
    ours, theirs = compare.records.read(old), compare.records.read(tmp_path / "theirs.json")
    assert theirs.environment == ours.environment
    assert theirs.samples["gae, 2 x 3"]["ppomax"] == pytest.approx(STEADY)
    (change,) = compare.compared(ours.samples, theirs.samples)
    assert change.ratio == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "has no samples"),
        ('{"environment": {}}', "has no samples"),
        ('{"machine_info": {}, "benchmarks": [{"stats": {"min": 1}}]}', "saved without --benchmark-save-data"),
        ('{"samples_ms": {"gae, 9 x 9": {"ppomax": [1.0]}}}', "no case and provider in common"),
    ],
)
def test_what_cannot_be_compared_is_said(
    compare: Any, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "bad.json").write_text(content)
    assert message in str(run(compare, monkeypatch, write("old", STEADY, STEADY), tmp_path / "bad.json"))


def test_samples_are_kept_to_five_digits_on_one_line(bench: Callable[[str], Any], tmp_path: Path) -> None:
    records = bench("records")
    samples = {"case": {"x": [1.23456789, 123456.789]}}
    records.write(tmp_path / "new" / "r.json", {"environment": {}, "samples_ms": samples})
    text = (tmp_path / "new" / "r.json").read_text()
    assert '"x": [1.2346, 123460.0]' in text
    assert records.read(tmp_path / "new" / "r.json").samples == json.loads(text)["samples_ms"]
    assert records.thinned(list(range(1000)), 100) == list(range(0, 1000, 10))
