"""The command line: `ppomax demo | sft | rm | ppo | eval | generate | plan | report | export`.

A thin edge: each command is a dataclass whose fields are its flags and whose `run` calls the engine. Bad input ends in
one line on the standard error and exit code 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .config import EvalConfig, GenerateConfig, PPOConfig, RewardModelConfig, SFTConfig, from_dict
from .errors import InputError
from .presets import PRESETS, preset
from .runs import RunFolder, read_toml, version

Style = Literal["auto", "chat", "en", "zh"]
OnBad = Literal["raise", "skip"]


@dataclass(frozen=True)
class Demo:
    """The whole job on a generated world, on a CPU, in minutes: SFT, reward model, critic pre-training, PPO, report."""

    preset: Literal["ppo-max", "vanilla"] = "ppo-max"
    """vanilla: the paper's collapsing baseline."""
    compare: bool = False
    """Train both, side by side, and draw them in one figure."""
    out: Path | None = None
    """New folder for its runs and report. Default: runs/demo, runs/demo-2, ..."""
    seed: int = 0
    """Of the world, the models and sampling."""

    def run(self) -> None:
        from .demo import DemoConfig, run_demo

        run_demo(DemoConfig(seed=self.seed), ("ppo-max", "vanilla") if self.compare else (self.preset,), self.out)


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning on dialogues. `--resume RUN` continues a run with the settings it was started with."""

    data: tuple[Path, ...]
    """Files of dialogues or pairs (the chosen side), plain or .gz."""
    out: Path
    """Run folder: the finished model, metrics, checkpoints."""
    config: Annotated[SFTConfig, tyro.conf.arg(name="")]
    model: str = "builtin:small"
    """Hugging Face folder, or builtin:tiny / builtin:small: a new model with a tokenizer trained on the data."""
    template: Style = "auto"
    """How dialogues become text; auto: the tokenizer's chat template, else en."""
    on_bad: OnBad = "raise"
    """What to do with a record that cannot be used (an empty answer, say)."""
    overwrite: bool = False
    """Replace a run that `out` already holds."""

    def run(self) -> None:
        from .sft import train_sft

        train_sft(
            self.config, model=self.model, data=self.data, out=self.out, template=self.template, on_bad=self.on_bad,
            overwrite=self.overwrite,
        )  # fmt: skip

    @staticmethod
    def resume(folder: Path) -> None:
        from .sft import resume_sft

        resume_sft(folder)


@dataclass(frozen=True)
class RewardModel:
    """Train a reward model on pairs. `--resume RUN` continues a run with the settings it was started with."""

    model: Path
    """Hugging Face folder of the language model to start from (the SFT model)."""
    data: tuple[Path, ...]
    """Files of pairs, plain or .gz."""
    out: Path
    """Run folder: the finished model, metrics, checkpoints."""
    config: Annotated[RewardModelConfig, tyro.conf.arg(name="")]
    template: Style = "auto"
    """How dialogues become text; auto: the tokenizer's chat template, else en."""
    on_bad: OnBad = "raise"
    """What to do with a record that cannot be used (two equal answers, say)."""
    overwrite: bool = False
    """Replace a run that `out` already holds."""

    def run(self) -> None:
        from .reward_model import train_reward_model

        train_reward_model(
            self.config, model=self.model, data=self.data, out=self.out, template=self.template, on_bad=self.on_bad,
            overwrite=self.overwrite,
        )  # fmt: skip

    @staticmethod
    def resume(folder: Path) -> None:
        from .reward_model import resume_reward_model

        resume_reward_model(folder)


@dataclass(frozen=True)
class PPO:
    """Train a policy with PPO against a reward. `--preset NAME` (default ppo-max) sets the defaults below;
    `--resume RUN` continues a run with the settings it was started with."""

    model: Path
    """Hugging Face folder of the policy to start from (the SFT model); also the frozen reference."""
    reward: str
    """Reward-model folder, or module:function."""
    data: tuple[Path, ...]
    """Files of prompts (of dialogues and pairs, their prompts), plain or .gz."""
    out: Path
    """Run folder: the finished policy and critic, metrics, checkpoints."""
    config: Annotated[PPOConfig, tyro.conf.arg(name="")]
    critic: Path | None = None
    """Folder to start the critic from. Default: the reward model, else (and with LoRA) the policy's trunk with a zero
    head."""
    ptx_data: tuple[Path, ...] = ()
    """Files of dialogues for PPO-ptx; needed unless --ptx-coef 0."""
    eval_data: tuple[Path, ...] = ()
    """Files of held-out prompts, answered every --eval-every iterations."""
    judge: str | None = None
    """A second reward (folder or module:function) that is measured and never optimised."""
    template: Style = "auto"
    """How dialogues become text; auto: the tokenizer's chat template, else en."""
    on_bad: OnBad = "raise"
    """What to do with a record that cannot be used."""
    overwrite: bool = False
    """Replace a run that `out` already holds."""

    def run(self) -> None:
        from .trainer import PPOTrainer

        PPOTrainer(
            self.config, policy=self.model, reward=self.reward, prompts=self.data, critic=self.critic,
            ptx=self.ptx_data, eval_prompts=self.eval_data, judge=self.judge, template=self.template,
            on_bad=self.on_bad, out=self.out, overwrite=self.overwrite,
        ).train()  # fmt: skip

    @staticmethod
    def resume(folder: Path) -> None:
        from .trainer import PPOTrainer

        PPOTrainer.resume(folder).train()


@dataclass(frozen=True)
class Eval:
    """Answer held-out prompts with a policy and a baseline; win / tie / lose by a reward model or functions."""

    model: Path
    """Hugging Face folder of the policy."""
    baseline: Path
    """Hugging Face folder to compare with (the SFT model); KL is against it."""
    judge: tuple[str, ...]
    """Reward-model folders or module:function."""
    data: tuple[Path, ...]
    """Files of prompts."""
    config: Annotated[EvalConfig, tyro.conf.arg(name="")]
    template: Style = "auto"
    """How dialogues become text; auto: the tokenizer's chat template, else en."""
    on_bad: OnBad = "raise"
    """What to do with a record that cannot be used."""
    samples: int = 3
    """Prompts whose answers are shown."""
    out: Path | None = None
    """Write the table and the samples to this Markdown file too."""

    def run(self) -> None:
        from .checkpoint import check_writable
        from .evaluation import evaluate
        from .models import load_tokenizer
        from .report import show_evaluation
        from .templates import Template

        if self.samples < 0:
            raise InputError(f"samples = {self.samples}: expected a number >= 0")
        if self.out is not None:
            check_writable(self.out)
        judges: dict[str, Any] = {judge: judge for judge in self.judge}
        evaluation = evaluate(
            self.model, self.baseline, self.data, judges, self.config, template=self.template, on_bad=self.on_bad
        )
        template = Template(load_tokenizer(self.model), self.template)
        show_evaluation(str(self.baseline), {str(self.model): evaluation}, template, self.samples, self.out)


@dataclass(frozen=True)
class Generate:
    """Answer prompts with a model."""

    model: Path
    """Hugging Face folder."""
    config: Annotated[GenerateConfig, tyro.conf.arg(name="")]
    prompt: tuple[str, ...] = ()
    """Texts to answer."""
    data: tuple[Path, ...] = ()
    """Files of prompts to answer."""
    template: Style = "auto"
    """How dialogues become text; auto: the tokenizer's chat template, else en."""
    on_bad: OnBad = "raise"
    """What to do with a record that cannot be used."""
    out: Path | None = None
    """Write JSONL (messages with the answer, as it finished) instead of text."""

    def run(self) -> None:
        from .generate import generate

        generate(
            self.config, model=self.model, texts=self.prompt, data=self.data, template=self.template,
            on_bad=self.on_bad, out=self.out,
        )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Draw the curves of PPO runs into one figure."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path = Path("curves.png")
    """The figure."""

    def run(self) -> None:
        from .report import plot_curves

        for folder in self.runs:
            RunFolder.open(folder)
        names = [folder.resolve().name for folder in self.runs]
        if len(set(names)) < len(names):
            names = [str(folder) for folder in self.runs]
        plot_curves(dict(zip(names, self.runs, strict=True)), self.out)
        print(self.out)


@dataclass(frozen=True)
class Plan:
    """What a PPO run will take: memory by phase, batches, FLOPs, time. And what to change where it does not fit."""

    model: str
    """Hugging Face folder of the policy (its config.json is enough), or 7b-shape."""
    config: Annotated[PPOConfig, tyro.conf.arg(name="")]
    gpu: str = "h200"
    """h200, h100-80, a100-80, a100-40, b200, l40s, rtx-4090, or cpu."""
    gpus: int = 1
    """How many of them; one process each."""
    gpus_per_machine: int = 8
    """The others are reached through the network."""
    network: float = 50.0
    """GB/s of each GPU to other machines, in one direction. The default is an assumption: 400 Gbit/s each."""
    reward: str | None = None
    """Reward-model folder, or `function`. Default: a reward model of the policy's shape."""
    critic: Path | None = None
    """Folder to start the critic from. Default: as in a run."""
    judge: str | None = None
    """Folder of a second reward model that is measured and never optimised (the reward's own takes nothing more)."""
    prompt_tokens: int | None = None
    """Of every sequence; --max-sequence follows. Default: what that allows."""
    response_tokens: int | None = None
    """Of every sequence; --rollout.max-response follows. Default: what that is."""
    json: Path | None = None
    """Write the plan to this file too."""

    def run(self) -> None:
        from .checkpoint import check_writable
        from .communication import Machines
        from .plan import plan_command

        if self.json is not None:
            check_writable(self.json)
        plan_command(
            self.config, self.model, self.gpu, gpus=self.gpus,
            machines=Machines(self.gpus_per_machine, self.network * 1e9), reward=self.reward,
            critic=None if self.critic is None else str(self.critic), judge=self.judge,
            prompt_tokens=self.prompt_tokens, response_tokens=self.response_tokens, out=self.json,
        )  # fmt: skip


@dataclass(frozen=True)
class Export:
    """Copy one model out of a run's checkpoint, as a Hugging Face folder (an adapter as one of peft)."""

    folder: tyro.conf.Positional[Path]
    """Run folder."""
    out: Path
    """New folder for the model."""
    model: str = ""
    """Its name in the checkpoint (critic, say). Default: the policy, or of a reward-model run the reward model."""
    step: int | None = None
    """Of the checkpoint. Default: the newest."""

    def run(self) -> None:
        from .export import export

        print(f"{export(self.folder, self.out, self.model, self.step)} -> {self.out}")


COMMANDS: dict[str, Any] = {
    "demo": Demo, "sft": SFT, "rm": RewardModel, "ppo": PPO, "eval": Eval, "generate": Generate, "plan": Plan,
    "report": Report, "export": Export,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "sft": SFTConfig, "rm": RewardModelConfig, "ppo": PPOConfig, "eval": EvalConfig, "generate": GenerateConfig,
    "plan": PPOConfig,
}  # fmt: skip


_SEVERAL = ("sft", "rm", "ppo")  # commands that several processes share


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `ppomax` command; exits with 0, 2 for bad input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
    except InputError as error:
        sys.exit(_complain(str(error)))
    except BrokenPipeError:  # the reader of the output (`head`, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        sys.exit(_complain(f"{name}{error.strerror or error}"))
    except KeyboardInterrupt:
        sys.exit(130)


def _dispatch(arguments: list[str]) -> None:
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(_overview())
    elif command == "--version":
        print(f"ppomax {version()}")
    elif command not in COMMANDS:
        raise InputError(f"unknown command {command!r}; expected one of {', '.join(COMMANDS)}")
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and command not in _SEVERAL:
        raise InputError(f"ppomax {command} runs in one process; torchrun is for {', '.join(_SEVERAL)}")
    elif (folder := _take(rest, "--resume")) is not None:
        _resume(command, folder, rest)
    else:
        _parse(command, rest).run()


def _overview() -> str:
    lines = ["usage: ppomax COMMAND [OPTIONS]   (ppomax COMMAND --help for its options)", ""]
    lines += [f"  {name:10}{cls.__doc__.splitlines()[0].split('. `')[0]}" for name, cls in COMMANDS.items()]
    return "\n".join([*lines, "", "  --version"])


def _resume(command: str, folder: str, rest: list[str]) -> None:
    if not hasattr(COMMANDS[command], "resume"):
        raise InputError(f"ppomax {command} has no --resume")
    if rest:
        raise InputError(f"--resume goes on with the run's own settings, it takes no other option: {' '.join(rest)}")
    COMMANDS[command].resume(Path(folder))


def _parse(command: str, rest: list[str]) -> Any:
    """The command's dataclass from its flags, over the defaults of --preset or of a --config file."""
    cls = COMMANDS[command]
    if command not in CONFIGS:
        return _from_flags(command, rest)
    extra = "--config FILE: defaults from the [config] table of a run.toml."
    if CONFIGS[command] is PPOConfig:
        extra += f" --preset {{{','.join(PRESETS)}}}: defaults from a preset of 7B settings."
    config = _base_config(command, rest)
    fields = cls.__dataclass_fields__.values()
    default = cls(**{f.name: config if f.name == "config" else _default(f) for f in fields})
    return _from_flags(command, rest, default=default, description=f"{cls.__doc__}\n{extra}")


def _from_flags(command: str, rest: list[str], **options: Any) -> Any:
    """The command's dataclass from its flags; InputError where tyro would draw a box on the standard error."""
    parse = partial(tyro.cli, COMMANDS[command], args=rest, prog=f"ppomax {command}", **options)
    if {"-h", "--help"} & set(rest):
        return parse()
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), _wide_terminal():
            return parse()
    except SystemExit as end:
        if end.code:
            raise InputError(f"{_without_box(shown.getvalue())} (see ppomax {command} --help)") from None
        print(shown.getvalue(), end="")
        raise


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """Keep tyro from breaking lines."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _without_box(text: str) -> str:
    """An error of tyro's in one line: no title, no frame (of plain ASCII, as no terminal shows it), no help."""
    _, *sections = re.split(r"^ *-+ *\n", text, flags=re.MULTILINE)
    kept = [section for section in sections if not re.match(r" *(Argument|For full) helptext", section)]
    messages = [re.sub(r"\n {10}.*", "", section) for section in kept]  # indented so far: the help of an option
    message = "; ".join(" ".join(message.split()) for message in messages)
    return message.removeprefix("Error parsing ")


def _default(field: Any) -> Any:
    return tyro.MISSING if field.default is dataclasses.MISSING else field.default


def _base_config(command: str, rest: list[str]) -> Any:
    file, name = _take(rest, "--config"), _take(rest, "--preset") if CONFIGS[command] is PPOConfig else None
    if file is not None and name is not None:
        raise InputError("--config and --preset both set all defaults: give one of them")
    if file is not None:
        table = read_toml(file)
        return from_dict(CONFIGS[command], table.get("config", table), file)
    return preset(name or "ppo-max") if CONFIGS[command] is PPOConfig else CONFIGS[command]()


def _take(arguments: list[str], flag: str) -> str | None:
    """Remove `flag VALUE` or `flag=VALUE` from the arguments; its value, None where it is not there."""
    for index, argument in enumerate(arguments):
        if argument == flag:
            if index + 1 == len(arguments):
                raise InputError(f"{flag}: expected a value after it")
            value = arguments[index + 1]
            del arguments[index : index + 2]
            return value
        if argument.startswith(f"{flag}="):
            del arguments[index]
            return argument.partition("=")[2]
    return None


def _complain(message: str) -> int:
    rank = int(os.environ.get("RANK", "0"))
    where = f" (process {rank})" if rank else ""
    print(f"ppomax: error{where}: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
