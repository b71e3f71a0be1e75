"""Times launch configurations on the GPU at hand and writes the fastest into kernels/gpu/configs.json.

    python bench/tune.py [--only KERNEL ...] [--samples 50] [--out FILE] [--dry-run]

For each kernel and shape of `TUNINGS`, every candidate of `CANDIDATES` is first held against the operation in
float64, and the command ends without writing anything where one of them is wrong; candidates that do not fit the chip
are passed over. Then all are timed in turn, the present configuration twice among them. It stays unless another is
faster by 2 % and by more than its own two medians differ. Winners go under the chip's name, by shape.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeAlias

import torch
from candidates import CANDIDATES, TUNINGS, Config, Tuning
from ops import Inputs, Judged, Op, Provider, bound, copied
from ppomax.kernels.gpu.launch import chip_of, configuration, overriding
from rich.console import Console
from rich.table import Table as Printed
from suites import configured
from timing import Timer, cuda_times
from torch import Tensor

Entry: TypeAlias = dict[str, Any]  # a Config, and `up_to` where it is for shapes up to a size
Configs: TypeAlias = dict[str, dict[str, list[Entry]]]

LEAST_GAIN = 0.02
LINE = 110  # characters
PATH = Path(__file__).resolve().parent.parent / "kernels" / "gpu" / "configs.json"


class WrongResult(Exception):
    """A candidate computes something else."""


class Winner(NamedTuple):
    tuning: Tuning
    before: Config
    after: Config
    before_ms: float
    after_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="KERNEL", choices=sorted(CANDIDATES), default=sorted(CANDIDATES))
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument(
        "--out", type=Path, default=PATH, metavar="FILE", help="where the table goes; the committed one"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the winners and write nothing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/tune.py times kernels on a GPU, and torch sees none here")
    chip = chip_of(torch.device("cuda", torch.cuda.current_device()))
    try:
        ops = configured("cuda")
        winners = [tune(tuning, ops, arguments.samples) for tuning in TUNINGS if tuning.kernel in arguments.only]
    except WrongResult as error:
        sys.exit(f"{error}; nothing was written")
    show(winners, chip)
    if not arguments.dry_run:
        write(merged(json.loads(PATH.read_text()), chip, winners), arguments.out)


def tune(tuning: Tuning, ops: Sequence[Op], samples: int, timer: Timer = cuda_times) -> Winner:
    """Raises WrongResult where a candidate, or the present configuration, is wrong."""
    torch.manual_seed(0)
    kernel, op = tuning.kernel, next(op for op in ops if (op.name, op.shape) == (tuning.op, tuning.size))
    provider, inputs = op.providers[tuning.provider], op.inputs()
    judged = op.judge(**inputs)

    def works(config: Config) -> bool:
        return is_usable(kernel, config, op, provider, inputs, judged)

    before = configuration(kernel, next(x.device for x in inputs.values() if isinstance(x, Tensor)), **tuning.shape)
    if not works(before):
        raise WrongResult(f"the present configuration {before} of {kernel} does not run")
    others = [config for config in CANDIDATES[kernel] if config != before]
    usable = [before, *(config for config in others if works(config))]
    functions = {str(i): overridden(kernel, config, bound(provider, inputs)) for i, config in enumerate(usable)}
    times = timer({**functions, "again": functions["0"]}, samples)
    medians = {name: median(times[name]) for name in functions}
    best = pick(list(medians.values()), median(times["again"]))
    return Winner(tuning, before, usable[best], medians["0"], medians[str(best)])


def is_usable(kernel: str, config: Config, op: Op, provider: Provider, inputs: Inputs, judged: Judged) -> bool:
    """False where the chip has not the registers or shared memory for it; raises WrongResult where it is wrong."""
    try:
        results = overridden(kernel, config, bound(provider, copied(inputs)))()
    except RuntimeError:
        return False
    error = judged(results)
    if not error <= op.tolerance:
        raise WrongResult(f"{kernel} with {config}: {op.name}, {op.shape}, is off by {error:.2g}")
    return True


def overridden(kernel: str, config: Config, function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with overriding(kernel, config):
            return function()

    return run


def pick(medians: Sequence[float], again: float) -> int:
    """Index of the fastest; 0, the present one, unless the gain is above LEAST_GAIN and above the difference between
    its two medians, the second of which is `again`."""
    best = min(range(len(medians)), key=medians.__getitem__)
    present = min(medians[0], again)
    gain, noise = 1 - medians[best] / present, abs(medians[0] - again) / present
    return best if gain > max(LEAST_GAIN, noise) else 0


def merged(configs: Configs, chip: str, winners: Iterable[Winner]) -> Configs:
    """The table with the winners under the chip's name.

    What the chip has for other shapes of a kernel stays; where it had nothing, they come from the default.
    """
    result = {name: dict(kernels) for name, kernels in configs.items()}
    own = result.setdefault(chip, {})
    for winner in winners:
        kernel, up_to = winner.tuning.kernel, winner.tuning.up_to
        entry: Entry = {"up_to": up_to, **winner.after} if up_to else dict(winner.after)
        entries = own.get(kernel) or result["default"][kernel]
        places = [i for i, other in enumerate(entries) if other.get("up_to", {}) == up_to]
        place = places[0] if places else sum(_limits(other) < _limits(entry) for other in entries)
        own[kernel] = [*entries[:place], entry, *entries[place + len(places) :]]
    return result


def _limits(entry: Entry) -> tuple[bool, list[int]]:
    """Smaller shapes come first, the entry for all others last."""
    return "up_to" not in entry, list(entry.get("up_to", {}).values())


def write(configs: Configs, path: Path) -> None:
    """One entry a line; the file is whole at every moment."""
    draft = path.with_suffix(".draft")
    draft.write_text(rendered(configs))
    os.replace(draft, path)


def rendered(configs: Configs) -> str:
    chips = (f'  "{chip}": {{\n{_kernels(kernels)}\n  }}' for chip, kernels in configs.items())
    return "{\n" + ",\n".join(chips) + "\n}\n"


def _kernels(kernels: Mapping[str, list[Entry]]) -> str:
    def one(name: str, entries: list[Entry]) -> str:
        line = f'    "{name}": [{json.dumps(entries[0])}]'
        if len(entries) == 1 and len(line) < LINE:
            return line
        return f'    "{name}": [\n' + ",\n".join(map(_rendered_entry, entries)) + "\n    ]"

    return ",\n".join(one(name, entries) for name, entries in kernels.items())


def _rendered_entry(entry: Entry) -> str:
    line = f"      {json.dumps(entry)}"
    if len(line) < LINE or "up_to" not in entry:
        return line
    rest = {key: value for key, value in entry.items() if key != "up_to"}
    return f'      {{"up_to": {json.dumps(entry["up_to"])},\n       {json.dumps(rest)[1:]}'


def show(winners: Iterable[Winner], chip: str) -> None:
    table = Printed("kernel", "operation", "before", "ms", "after", "ms", "gain", title=chip)
    for w in winners:
        after = ("as before", "", "") if w.after == w.before else (
            json.dumps(w.after), f"{w.after_ms:.4f}", f"{1 - w.after_ms / w.before_ms:.1%}"
        )  # fmt: skip
        where = f"{w.tuning.op}, {w.tuning.size}"
        table.add_row(w.tuning.kernel, where, json.dumps(w.before), f"{w.before_ms:.4f}", *after)
    (Console() if sys.stdout.isatty() else Console(width=170)).print(table)


if __name__ == "__main__":
    main()
