"""Result files: written so that a difference can be read, read whichever command wrote them.

Ours hold {"environment", "samples_ms": {case: {provider: milliseconds of each sample}}} among other things. Samples of
the providers of a case alternate: those of one index are of one round. A pytest-benchmark file holds the same as a
benchmark each: its group is the case, `extra_info["provider"]` the provider, its data are seconds. Where a file
collects what was measured in several environments, {name: such a report}, cases and environments are read by name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

Samples: TypeAlias = dict[str, dict[str, list[float]]]
DIGITS = 5


class Record(NamedTuple):
    environment: dict[str, Any]
    samples: Samples  # milliseconds by case and provider


def write(path: Path, report: dict[str, Any]) -> None:
    """Indented, with lists of numbers on one line each; samples rounded to five digits."""
    text = json.dumps({name: _rounded(part) for name, part in _rounded(report).items()}, indent=1)
    text = re.sub(r"\[[\d\s.,eE+-]+\]", lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def _rounded(report: Any) -> Any:
    """As it is but for its samples."""
    if not isinstance(report, dict) or not report.get("samples_ms"):
        return report
    samples = {
        case: {name: [float(f"{x:.{DIGITS}g}") for x in times] for name, times in providers.items()}
        for case, providers in report["samples_ms"].items()
    }
    return report | {"samples_ms": samples}


def thinned(values: list[float], most: int = 200) -> list[float]:
    """So many of them at most, evenly spaced in time."""
    return values[:: -(-len(values) // most)]


def read(path: Path) -> Record:
    """Raises ValueError where the file is none of ours and not pytest-benchmark's, or holds no samples."""
    try:
        report = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(report, dict) and "benchmarks" in report:
        return _of_pytest(path, report)
    if isinstance(report, dict) and report.get("samples_ms"):
        return Record(report.get("environment", {}), report["samples_ms"])
    parts = report.items() if isinstance(report, dict) else ()
    several = {name: part for name, part in parts if isinstance(part, dict) and part.get("samples_ms")}
    if not several:
        raise ValueError(f'{path} has no samples: neither "samples_ms" nor "benchmarks"')
    return Record(
        {f"{name}: {field}": value for name, part in several.items() for field, value in part["environment"].items()},
        {f"{name}: {case}": times for name, part in several.items() for case, times in part["samples_ms"].items()},
    )


def _of_pytest(path: Path, report: dict[str, Any]) -> Record:
    samples: Samples = {}
    for benchmark in report["benchmarks"]:
        if "data" not in benchmark["stats"]:
            raise ValueError(f"{path} has no samples: it was saved without --benchmark-save-data")
        case = benchmark["group"] or benchmark["fullname"]
        name = benchmark["extra_info"].get("provider", benchmark["name"])
        samples.setdefault(case, {})[name] = [1e3 * seconds for seconds in benchmark["stats"]["data"]]
    machine = report["machine_info"]
    return Record(machine.get("environment", {"cpu": machine.get("cpu", {}).get("brand_raw"),
                                              "python": machine.get("python_version")}), samples)  # fmt: skip
