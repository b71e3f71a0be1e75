"""A tiny world, small runs, model folders that do not fit, and the command line called in process."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.engine.builtin import train_tokenizer
from ppomax.engine.checkpoint import load_state, save_model
from ppomax.engine.config import PPOConfig, RewardModelConfig, SFTConfig, from_dict
from ppomax.engine.metrics import read_metrics
from ppomax.engine.parallel import Ranks
from ppomax.engine.tensors import Stored
from ppomax.engine.world import World
from safetensors.torch import load_file

GOLD = "ppomax.engine.world:gold_rewards"
ON_CPU = {"device": "cpu", "save_every": 2}
ROLLOUT = {"max_response": 8, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "max_running": 8}
SMALL: dict[str, dict[str, Any]] = {
    "sft": {
        "max_steps": 6, "batch_size": 4, "max_sequence": 128, "held_out": 0.1, "eval_every": 3, "vocab_size": 300,
        "micro_batch_tokens": 256, "optim": {"lr": 3e-3}, "runtime": ON_CPU,
    },
    "rm": {
        "max_steps": 6, "batch_size": 4, "max_sequence": 128, "held_out": 0.1, "eval_every": 3,
        "micro_batch_tokens": 256, "optim": {"lr": 3e-3}, "runtime": ON_CPU,
    },
    "ppo": {
        "iterations": 4, "rollouts_per_iteration": 8, "minibatch_size": 4, "max_sequence": 128,
        "critic_pretrain_iterations": 2, "critic_pretrain_tolerance": 0.0, "ptx_batch_size": 4, "eval_every": 2,
        "micro_batch_tokens": 256, "policy_optim": {"lr": 1e-3}, "critic_optim": {"lr": 1e-3}, "rollout": ROLLOUT,
        "runtime": ON_CPU,
    },
}  # fmt: skip
CONFIGS: dict[str, Any] = {"sft": SFTConfig, "rm": RewardModelConfig, "ppo": PPOConfig}


@pytest.fixture(scope="session")
def world_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of dialogues (sft), pairs, prompts and held_out prompts."""
    sizes = {"sft": 60, "pairs": 60, "prompts": 24, "held_out": 12}
    return World(0).write_files(tmp_path_factory.mktemp("world"), sizes)


@pytest.fixture(scope="session")
def foreign_folder(tmp_path_factory: pytest.TempPathFactory, new_scalar: Any) -> Path:
    """A reward model with another tokenizer than `policy_folder` has."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = train_tokenizer(["quite other words than those of the policy"] * 3, 300)
    save_model(new_scalar(vocab_size=len(tokenizer)), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def narrow_folders(tmp_path_factory: pytest.TempPathFactory, new_policy: Any, new_scalar: Any, tokenizer: Any) -> Path:
    """`policy` and `reward` with fewer embeddings than their tokenizer has ids."""
    folder = tmp_path_factory.mktemp("narrow")
    for name, new in (("policy", new_policy), ("reward", new_scalar)):
        (folder / name).mkdir()
        save_model(new(vocab_size=len(tokenizer) - 20), tokenizer, folder / name)
    return folder


@pytest.fixture(scope="session")
def small_config() -> Callable[..., Any]:
    """The configuration of a small run of a command; nested tables are merged."""

    def make(command: str, **changes: Any) -> Any:
        values = dict(SMALL[command])
        for name, value in changes.items():
            merged = isinstance(value, dict) and name in values
            values[name] = {**values[name], **value} if merged else value
        return from_dict(CONFIGS[command], values)

    return make


@dataclass(frozen=True)
class Outcome:
    """What a call of `ppomax` left behind."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The error of a call that was refused: exit code 2 and one line, beside the plan of a run that had begun."""
        assert self.code == 2, (self.code, self.err)
        lines = [line for line in self.err.splitlines() if not line.startswith(("ppo on ", "ppo plan: "))]
        assert len(lines) == 1, lines
        assert lines[0].startswith("ppomax: error: ")
        return lines[0].removeprefix("ppomax: error: ")


@pytest.fixture
def ppomax(capsys: pytest.CaptureFixture) -> Callable[..., Outcome]:
    """The command line in process: `ppomax("sft", "--data", path)`."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code: Any = 0
        try:
            from ppomax.engine import cli  # which needs tyro: the tests on a GPU do without

            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def arguments(world_files: dict[str, Path], policy_folder: Path, reward_folder: Path) -> Callable[..., list[str]]:
    """The command line of a small run; `changes` are flags (None: left out) as Python names, dots as `__`."""
    inputs: dict[str, dict[str, Any]] = {
        "sft": {"model": policy_folder, "data": world_files["sft"]},
        "rm": {"model": policy_folder, "data": world_files["pairs"]},
        "ppo": {
            "model": policy_folder, "reward": reward_folder, "data": world_files["prompts"], "judge": GOLD,
            "ptx_data": world_files["sft"], "eval_data": world_files["held_out"],
        },
    }  # fmt: skip

    def make(command: str, out: Path, **changes: Any) -> list[str]:
        values = {"out": out, **inputs[command], **_flat(SMALL[command])}
        values |= {name.replace("__", "."): value for name, value in changes.items()}
        given = {name: value for name, value in values.items() if value is not None}
        return [command, *(part for name, value in given.items() for part in (_flag(name), *_words(value)))]

    return make


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    nested = {f"{a}.{b}": v for a, table in values.items() if isinstance(table, dict) for b, v in table.items()}
    return {**{name: value for name, value in values.items() if not isinstance(value, dict)}, **nested}


def _words(value: object) -> list[str]:
    return [str(part) for part in value] if isinstance(value, (list, tuple)) else [str(value)]


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Iterable[Any]], Path]:
    """Write records to a JSONL file."""

    def write(path: Path, records: Iterable[Any]) -> Path:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture(scope="session")
def figures_of() -> Callable[[Path], list[dict[str, Any]]]:
    """A run's records without the times."""

    def read(run: Path) -> list[dict[str, Any]]:
        records = read_metrics(run / "metrics.jsonl")
        return [{k: repr(v) for k, v in record.items() if not k.startswith("time/")} for record in records]

    return read


@pytest.fixture(scope="session")
def weights_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    """All weights in a run's finished models, by file and name."""

    def read(run: Path) -> dict[str, torch.Tensor]:
        files = [path.relative_to(run) for path in run.rglob("*.safetensors")]
        finished = [path for path in files if path.parts[0] != "checkpoints"]
        return {f"{path}:{name}": weight for path in finished for name, weight in load_file(run / path).items()}

    return read


@pytest.fixture(scope="session")
def files_in() -> Callable[[Path], dict[str, bytes]]:
    """Everything in a folder, drafts included: path -> content."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    return read


class First(Ranks):
    """One of two processes, alone: the other one seems to agree, and is told what was said when its turn comes."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=2)
        self.said: list[Any] = []

    def gather(self, items: Any) -> Any:
        self.said.append(items)
        return [*items, *items]


class Second(Ranks):
    """The other process, when the first one is done."""

    def __init__(self, first: First) -> None:
        super().__init__(rank=1, size=2)
        self.said = first.said

    def gather(self, items: Any) -> Any:
        return [*self.said.pop(0), *items]


@pytest.fixture
def two_processes() -> tuple[Ranks, Ranks]:
    """Two processes one after the other in this one: enough to see whether the second finds itself different."""
    first = First()
    return first, Second(first)


@dataclass(frozen=True)
class Stopped:
    """Two runs with the same command line: one never stopped, one stopped and resumed."""

    whole: Path
    resumed: Path


@pytest.fixture
def stop_and_resume(
    ppomax: Callable[..., Outcome], arguments: Callable, tmp_path: Path, figures_of: Callable
) -> Callable[..., Stopped]:
    """Run a command whole; run it again, interrupted in call `stop_at` of `owner.method`, and resume it."""

    def run(command: str, owner: type, method: str, stop_at: int, **changes: Any) -> Stopped:
        both = Stopped(tmp_path / "whole", tmp_path / "resumed")
        torch.manual_seed(0)
        assert ppomax(*arguments(command, both.whole, **changes)).code == 0
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, method, _interrupted(getattr(owner, method), stop_at))
            assert ppomax(*arguments(command, both.resumed, **changes)).code == 130
        assert len(figures_of(both.resumed)) < len(figures_of(both.whole))
        torch.manual_seed(1)
        assert ppomax(command, "--resume", both.resumed).code == 0
        return both

    return run


def _interrupted(function: Callable[..., Any], stop_at: int) -> Callable[..., Any]:
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return call


@pytest.fixture(scope="session")
def assert_equal_runs(figures_of: Callable, weights_of: Callable) -> Callable[[Path, Path], None]:
    """Two runs ended with the same bits: figures, finished models, the newest checkpoint's state."""

    def check(one: Path, other: Path) -> None:
        assert figures_of(one) == figures_of(other)
        assert sorted(path.name for path in (one / "checkpoints").iterdir()) == sorted(
            path.name for path in (other / "checkpoints").iterdir()
        )
        (last,) = (path.name for path in (one / "checkpoints").iterdir())
        for part in (".", f"checkpoints/{last}"):
            _assert_equal(weights_of(one / part), weights_of(other / part))
        with torch.random.fork_rng(devices=[]):
            _assert_equal(*(load_state(run / "checkpoints" / last) for run in (one, other)))

    return check


def _assert_equal(one: Any, other: Any, place: str = "") -> None:
    """Bit for bit, through nested dicts and lists."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            _assert_equal(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, (list, tuple)):
        _assert_equal(dict(enumerate(one)), dict(enumerate(other)), place)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, Stored):
        assert torch.equal(one.tensor(), other.tensor()), place
    else:
        assert one == other, place
