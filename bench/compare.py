"""Two result files: what became faster or slower, as far as their samples can tell.

    python bench/compare.py OLD.json NEW.json [--fail-on slower] [--against PROVIDER] [--margin 0.03] [--force]

Reads the files of `bench_kernels.py`, `bench_kv_manager.py`, `bench_rollout.py`, `bench_optim.py`, `bench_adapters.py`
and `vs_trl.py`, and pytest-benchmark's. Of each case and provider in both: the ratio of new to old times with an
interval, and a verdict: slower or faster where all of the interval is beyond the margin, same where all of it is
within, else "cannot tell".

The ratio is the median of all pairs (one new, one old sample), and its interval holds the ratios that a Mann-Whitney
test of the samples does not reject. That test assumes no distribution but that a change scales it, is exact for a
handful of samples, where a bootstrap of their median is too narrow, and one disturbed sample moves it by a rank. It
sees the noise within the two runs alone: a machine that was slower throughout one of them looks like a change. For that
there is the margin, and `--against "torch eager"`: each sample is then taken relative to that provider's of the same
round. Between different machines or versions there is no verdict without `--force`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist, median
from typing import NamedTuple

import numpy as np
import records
from records import Record, Samples
from rich.console import Console
from rich.table import Table

MARGIN, CONFIDENCE = 0.03, 0.99
FASTER, SLOWER, SAME, UNKNOWN = "faster", "slower", "same", "cannot tell"
COLOURS = {FASTER: "green", SLOWER: "red", SAME: "dim", UNKNOWN: "yellow"}
FREE = {"date", "ppomax"}  # may differ between files that are compared
NAMED = 5  # of what only one file has
EXACT = 50  # samples up to which the test's distribution is counted out


class Change(NamedTuple):
    """Of one provider of a case; `ratio`, `low` and `high` are of the new times to the old."""

    case: str
    provider: str
    old_ms: float
    new_ms: float
    ratio: float
    low: float
    high: float

    def verdict(self, margin: float) -> str:
        if self.low > 1 + margin:
            return SLOWER
        if self.high < 1 / (1 + margin):
            return FASTER
        return SAME if self.low >= 1 / (1 + margin) and self.high <= 1 + margin else UNKNOWN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--fail-on", choices=[SLOWER], help="exit with 1 where a verdict is that, or none was possible")
    parser.add_argument("--against", metavar="PROVIDER", help="times relative to this provider's in the same round")
    parser.add_argument("--margin", type=float, default=MARGIN, help="changes up to this are none")
    parser.add_argument("--confidence", type=float, default=CONFIDENCE, help="of each interval")
    parser.add_argument("--force", action="store_true", help="verdicts even where machine or versions differ")
    arguments = parser.parse_args()
    if not (arguments.margin >= 0 and 0 < arguments.confidence < 1):
        parser.error("--margin: at least 0; --confidence: between 0 and 1")
    try:
        old, new = records.read(arguments.old), records.read(arguments.new)
        changes = compared(*(relative(r.samples, arguments.against) for r in (old, new)), arguments.confidence)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    differing = differences(old, new)
    comparable = arguments.force or not differing
    show(changes, arguments.margin if comparable else None, arguments.confidence)
    note(old, new, differing)
    if arguments.fail_on and not comparable:
        sys.exit("no verdicts, so nothing was held to --fail-on; see --force")
    sys.exit(int(bool(arguments.fail_on) and any(c.verdict(arguments.margin) == arguments.fail_on for c in changes)))


def compared(old: Samples, new: Samples, confidence: float = CONFIDENCE) -> list[Change]:
    """Raises ValueError where the two have nothing in common."""
    both = [(case, name) for case in new for name in new[case] if name in old.get(case, {})]
    if not both:
        raise ValueError("the files have no case and provider in common")
    return [change(case, name, old[case][name], new[case][name], confidence) for case, name in both]


def change(case: str, provider: str, old: Sequence[float], new: Sequence[float], confidence: float) -> Change:
    return Change(case, provider, median(old), median(new), *ratio(old, new, confidence))


def ratio(old: Sequence[float], new: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """(new / old, the ends of its interval): the Hodges-Lehmann estimate of the shift of the logarithms. The interval
    is from 0 to infinity where there are too few samples for the confidence."""
    pairs = np.sort(np.subtract.outer(np.log(new), np.log(old)), axis=None)
    cut = rejected(len(old), len(new), (1 - confidence) / 2)
    low, high = (pairs[cut - 1], pairs[-cut]) if cut else (-np.inf, np.inf)
    return tuple(float(np.exp(x)) for x in (np.median(pairs), low, high))


@lru_cache
def rejected(n: int, m: int, tail: float) -> int:
    """The largest k with P(U < k) <= tail, U being Mann-Whitney's statistic of n and m samples without a difference."""
    if max(n, m) > EXACT:
        spread = np.sqrt(n * m * (n + m + 1) / 12)
        return max(0, int(np.floor(n * m / 2 + 0.5 + spread * NormalDist().inv_cdf(tail))))
    counts = np.zeros(n * m + 1)
    counts[0] = 1.0
    for i in range(1, n + 1):  # the Gaussian binomial coefficient: products of (1 - x^(m + i)) / (1 - x^i)
        for u in range(n * m, m + i - 1, -1):
            counts[u] -= counts[u - m - i]
        for u in range(i, n * m + 1):
            counts[u] += counts[u - i]
    return int(np.searchsorted(np.cumsum(counts) / counts.sum(), tail, side="right"))


def relative(samples: Samples, provider: str | None) -> Samples:
    """The others' samples over those of `provider` in the same round; as they are where it is None."""
    if provider is None:
        return samples
    cases = {case: dict(times) for case, times in samples.items() if provider in times}
    if not cases:
        raise ValueError(f"--against: no case has a provider {provider!r}")
    bases = {case: times.pop(provider) for case, times in cases.items()}
    return {
        case: {name: [x / base for x, base in zip(values, bases[case], strict=False)] for name, values in times.items()}
        for case, times in cases.items()
    }


def differences(old: Record, new: Record) -> list[str]:
    """What differs of machine and versions; of named environments, in those that both have."""
    a, b = old.environment, new.environment
    both = {"", *({name.rpartition(": ")[0] for name in a} & {name.rpartition(": ")[0] for name in b})}
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    parts = {name: name.rpartition(": ") for name in names}
    return [
        f"{name}: {a.get(name)}, then {b.get(name)}"
        for name, (where, _, field) in parts.items()
        if where in both and field not in FREE
    ]


def show(changes: Sequence[Change], margin: float | None, confidence: float) -> None:
    """Without verdicts where `margin` is None."""
    table = Table("case", "provider", "old", "new", "new / old", f"{confidence:.0%} interval", "")
    for i, c in enumerate(changes):
        verdict = "" if margin is None else c.verdict(margin)
        interval = f"{c.low:.3f} to {c.high:.3f}" if np.isfinite(c.high) else "too few samples"
        case = "" if i and changes[i - 1].case == c.case else c.case
        cells = f"{c.old_ms:.4g}", f"{c.new_ms:.4g}", f"{c.ratio:.3f}", interval
        table.add_row(case, c.provider, *cells, f"[{COLOURS.get(verdict, 'dim')}]{verdict}[/]")
    (Console() if sys.stdout.isatty() else Console(width=150)).print(table)


def note(old: Record, new: Record, differing: Sequence[str]) -> None:
    def only(here: Record, there: Record) -> list[str]:
        return [f"{case} ({name})" for case, names in here.samples.items() for name in names
                if name not in there.samples.get(case, {})]  # fmt: skip

    for file, missing in (("old", only(old, new)), ("new", only(new, old))):
        if missing:
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            print(f"in the {file} file alone: {'; '.join(missing[:NAMED])}{more}")
    if differing:
        print(f"not the same machine or versions ({'; '.join(differing)}): ratios say nothing of a change in ppomax")


if __name__ == "__main__":
    main()
