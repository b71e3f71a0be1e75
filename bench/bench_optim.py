"""Time and bytes per weight of an AdamW step in each form that the engine has.

    python bench/bench_optim.py [--device cpu] [--samples 20] [--json bench/results/optim_cpu.json]

All forms step on the same weights and gradients, a sample of each in every round; the ratio is to torch's fused AdamW
on float32 weights in the same run. Only the update is timed, not the gradient norm before it. On a GPU the rate is
that of the least bytes that a form has to move.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import records
import torch
from environment import environment
from ppomax.engine.config import OptimConfig
from ppomax.engine.low_memory import MasterAdamW
from ppomax.engine.optim import Optimizer
from ppomax.kernels.adamw import BLOCK, Hyper, adamw_ref, join
from rich.console import Console
from rich.table import Table
from timing import cpu_times, cuda_times, relative_error
from torch import Tensor, nn

LR = 5e-7
SHAPES = {"cpu": [(1024, 2048)] * 4, "cuda": [(4096, 4096)] * 16}


class Form(NamedTuple):
    dtype: torch.dtype
    config: OptimConfig
    bytes_moved: float
    """Per weight: weight, low bits and moments read and written, the gradient read"""
    tolerance: float
    """Of the update's error against float64"""


SPLIT = 2 * (2 + 2) + 2
FORMS = {
    "float32 weights, float32 moments (torch)": Form(torch.float32, OptimConfig(lr=LR), 8 + 4 + 16, 0.01),
    "bfloat16 weights, float32 moments": Form(torch.bfloat16, OptimConfig(lr=LR), SPLIT + 16, 0.01),
    "bfloat16 weights, 8-bit moments": Form(
        torch.bfloat16, OptimConfig(lr=LR, moments="8bit"), SPLIT + 4 + 16 / BLOCK, 0.05
    ),
}


class Bench:
    """One form's weights, gradients and optimizer."""

    def __init__(self, form: Form, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, int], size: float) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * size).bfloat16().to(form.dtype)

        self.form = form
        self.weights = nn.ParameterList([normal(shape, 0.02) for shape in SHAPES[device]])
        self.gradients = [normal(shape, 1e-3) for shape in SHAPES[device]]
        self.optimizer = Optimizer(self.weights, form.config, 1000, None)
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient

    def step(self) -> None:
        adamw = self.optimizer.adamw
        if isinstance(adamw, MasterAdamW):
            adamw.step(LR, None)
        else:
            adamw.step()

    def error(self) -> float:
        """Of the update that two steps make, against float64."""
        weight, config = self.weights[0], self.form.config
        start = weight.detach().double()
        exact, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
        for step in (1, 2):
            self.step()
            exact, m, v = adamw_ref(exact, self.gradients[0], m, v, Hyper(step, LR, *config.betas, config.eps, 0.0))
        state = self.optimizer.adamw.state[weight]
        ours = join(weight.detach(), state["low"]) if "low" in state else weight.detach()
        return relative_error(ours.double() - start, exact - start)

    @property
    def bytes_held(self) -> float:
        """Per weight, of the live weights and states."""
        states = [x for state in self.optimizer.adamw.state.values() for x in state.values()]
        tensors = [*self.weights, *(x for x in states if isinstance(x, Tensor) and x.ndim)]
        return sum(x.untyped_storage().nbytes() for x in tensors) / self.count

    @property
    def count(self) -> int:
        return sum(weight.numel() for weight in self.weights)


def measure(device: str, samples: int) -> dict[str, Any]:
    benches = {name: Bench(form, device) for name, form in FORMS.items()}
    errors = {name: bench.error() for name, bench in benches.items()}
    for name, error in errors.items():
        assert error < FORMS[name].tolerance, f"{name}: the update is off by {error:.3g}"
    steps: dict[str, Callable[[], None]] = {name: bench.step for name, bench in benches.items()}
    times = (cuda_times if device == "cuda" else cpu_times)(steps, samples)
    first, results = next(iter(FORMS)), {}
    for name, bench in benches.items():
        milliseconds = median(times[name])
        results[name] = {
            "ms": milliseconds,
            "ns_per_weight": milliseconds * 1e6 / bench.count,
            "ratio": median(a / b for a, b in zip(times[name], times[first], strict=True)),
            "bytes_held_per_weight": bench.bytes_held,
            "bytes_moved_per_weight": FORMS[name].bytes_moved,
            "gb_per_second": FORMS[name].bytes_moved * bench.count / milliseconds / 1e6,
            "error": errors[name],
        }
    count = benches[first].count
    samples = {f"AdamW step, {count:,} weights": times}
    return {"weights": count, "forms": results, "environment": environment(), "samples_ms": samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    result = measure(arguments.device, arguments.samples)
    table = Table("", "ns/weight", "ratio", "bytes held", "GB/s", "error", title=f"{result['weights']:,} weights")
    for name, row in result["forms"].items():
        figures = (row["ns_per_weight"], row["ratio"], row["bytes_held_per_weight"], row["gb_per_second"])
        table.add_row(name, *(f"{figure:.2f}" for figure in figures), f"{row['error']:.1e}")
    Console().print(table)
    if arguments.json:
        records.write(arguments.json, result)


if __name__ == "__main__":
    main()
