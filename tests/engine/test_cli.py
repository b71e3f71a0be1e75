"""The command line: help, defaults, and one clear line with exit code 2 for whatever a user can mend."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ppomax.engine import cli, sft
from ppomax.engine.checkpoint import load_state
from ppomax.engine.config import EvalConfig, PPOConfig, SFTConfig
from ppomax.engine.metrics import read_metrics
from ppomax.engine.presets import preset
from ppomax.engine.runs import RunFolder, version
from transformers import AutoModelForCausalLM

COMMANDS = ["demo", "sft", "rm", "ppo", "eval", "generate", "plan", "report", "export"]
NO_EXTRAS = {
    "judge": None, "ptx_data": None, "eval_data": None, "ptx_coef": 0, "eval_every": 0, "critic_pretrain_iterations": 0,
}  # fmt: skip


# Help, version, defaults


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, ppomax: Callable) -> None:
    outcome = ppomax(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"usage: ppomax {command} ")
    own = {
        "demo": ["--compare", "--seed"],
        "report": ["--out"],
        "export": ["--out", "--model", "--step"],
        "plan": ["--gpu", "--gpus", "--runtime.seed"],
    }
    for flag in own.get(command, ["--data", "--runtime.seed"]):
        assert flag in outcome.out
    assert ("--config FILE" in outcome.out) == (command == "plan" or command not in own)
    assert ("--preset {ppo-max,moss-en,moss-zh,vanilla}" in outcome.out) == (command in ("ppo", "plan"))


def test_help_shows_the_defaults_of_the_preset(ppomax: Callable) -> None:
    for name, coef in (("ppo-max", "0.05"), ("moss-zh", "0.1")):
        outcome = ppomax("ppo", "--preset", name, "--help")
        line = " ".join(outcome.out.split("--kl-coef FLOAT")[1].split("--")[0].split())
        assert f"(default: {coef})" in line.replace("│ │ ", "")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_overview_names_every_command(arguments: tuple[str, ...], ppomax: Callable) -> None:
    outcome = ppomax(*arguments)
    assert outcome.code == 0
    assert [line.split()[0] for line in outcome.out.splitlines() if line.startswith("  ")] == [*COMMANDS, "--version"]


def test_version(ppomax: Callable) -> None:
    assert ppomax("--version").out == f"ppomax {version()}\n"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, ppomax: Callable) -> Callable[..., Any]:
    """The command that a command line asks for, without running it."""

    def parse(command: str, *arguments: object) -> Any:
        commands: list[Any] = []
        monkeypatch.setattr(cli.COMMANDS[command], "run", lambda command: commands.append(command))
        assert ppomax(command, *arguments).code == 0
        return commands[0]

    return parse


PPO_FLAGS = ("--model", "m", "--reward", "r", "--data", "d", "--out", "o")


@pytest.mark.parametrize("name", ["ppo-max", "moss-en", "moss-zh", "vanilla"])
def test_a_preset_sets_the_defaults(name: str, parsed: Callable) -> None:
    for flags in (("--preset", name), (f"--preset={name}",)):
        assert parsed("ppo", *PPO_FLAGS, *flags).config == preset(name)
    changed = parsed(
        "ppo", "--preset", name, *PPO_FLAGS, "--gamma", "0.5", "--rollout.top-p", "1", "--value-clip", "None"
    )
    assert changed.config == preset(name, gamma=0.5, value_clip=None, **{"rollout.top_p": 1.0})


def test_without_a_preset_it_is_ppo_max(parsed: Callable) -> None:
    command = parsed("ppo", *PPO_FLAGS, "--data", "a", "b", "--judge", "j", "--on-bad", "skip")
    assert command.config == preset("ppo-max")
    assert (command.model, command.reward, command.out, command.critic) == (Path("m"), "r", Path("o"), None)
    assert (command.data, command.judge, command.on_bad) == ((Path("a"), Path("b")), "j", "skip")


def test_a_file_sets_the_defaults(tmp_path: Path, parsed: Callable) -> None:
    config = preset("vanilla", gamma=0.25, dual_clip=3.0)
    RunFolder.create(tmp_path / "run", "ppo", {}, config)
    for flags in (("--config", tmp_path / "run" / "run.toml"), (f"--config={tmp_path}/run/run.toml",)):
        assert parsed("ppo", *PPO_FLAGS, *flags).config == config
    assert parsed("ppo", *flags, *PPO_FLAGS, "--gamma", "0.5").config.gamma == 0.5
    (tmp_path / "plain.toml").write_text("epochs = 7\n[optim]\nlr = 0.5")
    command = parsed("sft", "--data", "d", "--out", "o", "--config", tmp_path / "plain.toml")
    assert (command.config.epochs, command.config.optim.lr, command.config.batch_size) == (
        7,
        0.5,
        SFTConfig().batch_size,
    )
    (tmp_path / "eval.toml").write_text("tie_margin = 0.5")
    flags = ("--model", "m", "--baseline", "b", "--judge", "j", "--data", "d", "--config", tmp_path / "eval.toml")
    assert parsed("eval", *flags).config == EvalConfig(tie_margin=0.5)


def test_a_run_can_be_repeated_from_its_record(
    tmp_path: Path, ppomax: Callable, arguments: Callable, figures_of: Callable
) -> None:
    assert ppomax(*arguments("ppo", tmp_path / "a", **NO_EXTRAS), "--preset", "vanilla").code == 0
    record = RunFolder.open(tmp_path / "a")
    assert record.config(PPOConfig).value_clip is None
    files = record.inputs("ppo")
    flags = ["--model", files["policy"], "--reward", files["reward"], "--data", *files["prompts"]]
    assert ppomax("ppo", *flags, "--out", tmp_path / "b", "--config", tmp_path / "a" / "run.toml").code == 0
    assert figures_of(tmp_path / "a") == figures_of(tmp_path / "b")


# Flags that cannot be

PPO = ("ppo", *PPO_FLAGS)
FLAGS: dict[str, tuple[tuple[str, ...], str]] = {
    "command": (("train",), "unknown command 'train'; expected one of demo, sft, rm, ppo, eval, generate, plan"),
    "missing": (("sft",), "Missing from ppomax sft: --data [PATH [PATH ...]] --out PATH (see ppomax sft --help)"),
    "unknown": (
        ("sft", "--data", "d", "--out", "o", "--epoch", "3"),
        "Unrecognized options: --epoch, 3; Perhaps you meant: --epochs INT (see ppomax sft --help)",
    ),
    "unknown and nothing like it": (
        ("demo", "--wings", "2"),
        "Unrecognized options: --wings, 2 (see ppomax demo --help)",
    ),
    "left over": (("demo", "fast"), "Unrecognized options: fast (see ppomax demo --help)"),
    "without a value": (
        (*PPO, "--critic"),
        "Missing value for argument '--critic'. Expected 1 values. (see ppomax ppo",
    ),
    "impossible value": ((*PPO, "--gamma", "2"), "PPOConfig.gamma = 2.0: expected a number >= 0 and <= 1"),
    "impossible value, nested": (
        (*PPO, "--rollout.top-p", "0"),
        "config.rollout: RolloutConfig.top_p = 0.0: expected a number > 0 and <= 1 (see ppomax ppo --help)",
    ),
    "impossible value, of one of two": (
        (*PPO, "--critic-optim.lr", "-1"),
        "config.critic-optim: OptimConfig.lr = -1.0: expected a number >= 0",
    ),
    "impossible pair": (
        (*PPO, "--policy-optim.betas", "0.9", "1.2"),
        "config.policy-optim: OptimConfig.betas = (0.9, 1.2): expected two numbers in [0, 1)",
    ),
    "half a pair": (
        (*PPO, "--policy-optim.betas", "0.9"),
        "Missing value for argument '--policy-optim.betas'. Expected 2 values.",
    ),
    "contradiction": (
        (*PPO, "--rollout.max-response", "4096"),
        "PPOConfig.max_sequence = 2048: expected more than rollout.max_response = 4096, or no prompt fits",
    ),
    "minibatches": (
        (*PPO, "--minibatch-size", "33"),
        "PPOConfig.minibatch_size = 33: expected a divisor of rollouts_per_iteration = 128",
    ),
    "text for a number": (
        (*PPO, "--kl-coef", "much"),
        "--kl-coef: could not convert string to float: 'much' (see ppomax ppo --help)",
    ),
    "half a step": ((*PPO, "--iterations", "1.5"), "--iterations: invalid literal for int() with base 10: '1.5'"),
    "neither none nor number": (
        (*PPO, "--value-clip", "off"),
        "--value-clip: no type matching {None}|FLOAT could be instantiated from ['off'].",
    ),
    "choice": (
        (*PPO, "--reward.transform", "whiten"),
        "invalid choice 'whiten' for argument '--reward.transform'. Expected one of ('normalize', 'scale', 'none').",
    ),
    "demo preset": (("demo", "--preset", "moss-en"), "invalid choice 'moss-en' for argument '--preset'."),
    "preset": ((*PPO, "--preset", "best"), "unknown preset 'best'; expected one of ppo-max, moss-en, moss-zh, vanilla"),
    "samples": (
        ("eval", "--model", "m", "--baseline", "b", "--judge", "j", "--data", "d", "--samples", "-1"),
        "samples = -1: expected a number >= 0",
    ),
    "preset without a name": ((*PPO, "--preset"), "--preset: expected a value after it"),
    "preset of a stage": (
        ("sft", "--data", "d", "--out", "o", "--preset", "vanilla"),
        "Unrecognized options: --preset",
    ),
    "preset and file": (
        (*PPO, "--preset", "vanilla", "--config", "run.toml"),
        "--config and --preset both set all defaults: give one of them",
    ),
    "no file": ((*PPO, "--config", "nowhere.toml"), "nowhere.toml: No such file or directory"),
    "resume and more": (
        ("ppo", "--resume", "run", "--iterations", "3"),
        "--resume goes on with the run's own settings, it takes no other option: --iterations 3",
    ),
    "resume without a folder": (("rm", "--resume"), "--resume: expected a value after it"),
    "resume what cannot be": (("demo", "--resume", "run"), "ppomax demo has no --resume"),
    "resume nothing": (
        ("sft", "--resume", "nowhere"),
        "nowhere: holds no run (no run.toml), expected the --out folder of an earlier run",
    ),
    "very long": ((*PPO, "--critics", "x" * 300), f"Unrecognized options: --critics, {'x' * 300}; Perhaps you meant"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_cannot_be(case: str, ppomax: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = FLAGS[case]
    assert ppomax(*arguments).complaint.startswith(expected)
    assert not any(tmp_path.iterdir())


def test_a_complaint_is_one_line_whatever_it_quotes(ppomax: Callable) -> None:
    complaint = ppomax("sft", "--data", "no\nsuch\nfile", "--out", "out").complaint
    assert complaint == "no such file: expected a readable file: No such file or directory"


@pytest.mark.parametrize("columns", [None, "40"])
def test_the_terminals_width_stays_as_it_was(
    columns: str | None, ppomax: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    complaint = ppomax("sft", "--wings", "2" * 100).complaint
    assert f"--wings {'2' * 100}" in complaint
    assert cli.os.environ.get("COLUMNS") == columns


CONFIG_FILES: dict[str, tuple[str, str]] = {
    "not TOML": ("gamma = ", "Invalid value (at end of document)"),
    "unknown field": ("[config]\ngama = 1", "unknown field 'gama'; expected one of iterations,"),
    "wrong type": ('[config]\ngamma = "a"', "gamma = 'a': expected float"),
    "of another command": ("[config]\nepochs = 2", "unknown field 'epochs'"),
    "no table": ("config = 3", "3: expected a table"),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_configuration_files_that_cannot_be(case: str, ppomax: Callable, tmp_path: Path) -> None:
    text, expected = CONFIG_FILES[case]
    (tmp_path / "run.toml").write_text(text)
    complaint = ppomax(*PPO, "--config", tmp_path / "run.toml").complaint
    assert complaint.startswith(f"{tmp_path}/run.toml")
    assert expected in complaint


def test_an_impossible_value_in_a_configuration_file(ppomax: Callable, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("gamma = 7")
    complaint = ppomax(*PPO, "--config", tmp_path / "run.toml").complaint
    assert complaint == "PPOConfig.gamma = 7.0: expected a number >= 0 and <= 1"


# Data that cannot be used: the commands that read it, the text, the complaint after the file's name

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
ALL = ("sft", "rm", "ppo")
DATA: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    "missing": (ALL, None, ": expected a readable file: No such file or directory"),
    "empty": (ALL, "", ": expected records, found an empty file"),
    "broken JSON": (ALL, json.dumps(GOOD) + '\n{"prompt": "a"\n', ":2: expected JSON, found an error:"),
    "broken JSON list": (ALL, '[["a", "b"],\n["c", "d"', ":2: expected JSON, found an error:"),
    "wrong fields": (ALL, '{"text": "a"}', ":1: expected a field 'messages', 'prompt' or 'chosen', found: text"),
    "wrong type": (ALL, '{"messages": [{"role": "user", "content": 3}]}', ":1: messages[0].content: expected a string"),
    "wrong role": (ALL, '{"messages": [{"role": "me", "content": "a"}]}', ":1: messages[0].role: expected 'system'"),
    "empty dialogue": (ALL, '{"messages": []}', ":1: messages: expected turns, found an empty list"),
    "empty answer": (("sft",), '[["a", ""]]', "[0]: assistant turn: expected text, found none"),
    "empty chosen": (("rm",), json.dumps({**GOOD, "chosen": " "}), ":1: chosen: expected a final answer, found empty"),
    "empty rejected": (("rm",), json.dumps({**GOOD, "rejected": ""}), ":1: rejected: expected a final answer, found"),
    "no difference": (("rm",), json.dumps({**GOOD, "chosen": "c"}), ":1: chosen, rejected: expected a difference"),
    "no pair": (("rm",), '{"messages": [{"role": "user", "content": "a"}]}', ":1: expected a pair, 'chosen' and"),
    "empty prompt": (("ppo",), '{"prompt": ""}', ":1: prompt: expected a user turn with text"),
    "too long": (("ppo",), json.dumps({"prompt": "a b " * 200}), ":1: last turn: expected at most 120 tokens, found"),
    "too long to learn": (
        ("sft", "rm"),
        json.dumps({**GOOD, "prompt": "a b " * 200}),
        ":1: last turn: expected at most 128 tokens, found",
    ),
    "not UTF-8": (ALL, "\udcff", ":1: expected UTF-8, found the byte 0xff"),
}
DATA_CASES = [(command, case) for case, (commands, _, _) in DATA.items() for command in commands]


@pytest.mark.parametrize(("command", "case"), DATA_CASES)
def test_data_that_cannot_be_used(
    command: str, case: str, tmp_path: Path, ppomax: Callable, arguments: Callable
) -> None:
    _, text, expected = DATA[case]
    data = tmp_path / "data.jsonl"
    if text is not None:
        data.write_bytes(text.encode("utf-8", "surrogateescape"))
    changes = {"data": data, "held_out": 0, **(NO_EXTRAS if command == "ppo" else {})}
    complaint = ppomax(*arguments(command, tmp_path / "out", **changes)).complaint
    assert complaint.startswith(f"{data}{expected}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["ptx_data", "eval_data"])
def test_the_other_files_of_ppo(flag: str, tmp_path: Path, ppomax: Callable, arguments: Callable) -> None:
    (tmp_path / "data").write_text("{")
    complaint = ppomax(*arguments("ppo", tmp_path / "out", **{flag: tmp_path / "data"})).complaint
    assert complaint.startswith(f"{tmp_path}/data:1: expected JSON, found an error")
    assert not (tmp_path / "out").exists()


def test_no_files_at_all(tmp_path: Path, ppomax: Callable, arguments: Callable) -> None:
    for command in ALL:
        complaint = ppomax(*arguments(command, tmp_path / "out", data=())).complaint
        assert complaint == "data: expected at least one file, found none"


def test_bad_records_are_skipped_where_asked_to(
    tmp_path: Path, ppomax: Callable, arguments: Callable, write_jsonl: Callable
) -> None:
    rows = [{**GOOD, "prompt": str(n)} for n in range(5)] + [{**GOOD, "chosen": ""}]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    changes = {"data": data, "max_steps": 1, "held_out": 0}
    complaint = ppomax(*arguments("rm", tmp_path / "out", **changes)).complaint
    assert complaint == f"{data}:6: chosen: expected a final answer, found empty text"
    assert ppomax(*arguments("rm", tmp_path / "out", **changes, on_bad="skip")).code == 0


# Models that cannot be used


def copy(source: Path, goal: Path, *without: str) -> Path:
    shutil.copytree(source, goal, ignore=shutil.ignore_patterns(*without))
    return goal


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, ": no such folder, expected a Hugging Face model folder"),
    "no configuration": (
        lambda folder: (folder / "config.json").unlink(),
        ": holds no config.json, expected a Hugging",
    ),
    "broken configuration": (lambda folder: (folder / "config.json").write_text("{"), ""),
    "unknown architecture": (lambda folder: set_config(folder, model_type="abacus"), "/config.json: "),
    "a classifier": (
        lambda folder: set_config(folder, architectures=["LlamaForSequenceClassification"]),
        ": holds a sequence classifier, expected a causal language model",
    ),
    "no language model": (lambda folder: set_config(folder, model_type="vit"), ": not a model that transformers can"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ": holds neither model.safetensors nor "),
    "cut weights": (cut_weights, "/model.safetensors: not a whole safetensors file ("),
    "other weights": (
        lambda folder: set_config(folder, num_hidden_layers=3),
        ": 9 weights are missing from the files, the first is model.layers.2.",
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        ": no tokenizer that transformers can load (",
    ),
}


@pytest.mark.parametrize("command", ["sft", "rm", "ppo", "generate", "eval"])
@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_used(
    command: str,
    case: str,
    tmp_path: Path,
    policy_folder: Path,
    world_files: dict,
    ppomax: Callable,
    arguments: Callable,
) -> None:
    spoil, expected = MODELS[case]
    folder = copy(policy_folder, tmp_path / "model")
    spoil(folder)
    out = tmp_path / "out"
    if command == "generate":
        line = ["generate", "--model", folder, "--prompt", "a", "--out", out]
    elif command == "eval":
        judge = ("--judge", "ppomax.engine.world:gold_rewards", "--data", world_files["held_out"], "--out", out)
        line = ["eval", "--model", policy_folder, "--baseline", folder, *judge]
    else:
        line = arguments(command, out, model=folder)
    complaint = ppomax(*line).complaint
    assert complaint.startswith(f"{folder}{expected}")
    assert not out.exists()


REWARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, ": no such folder, expected a Hugging Face model folder"),
    "no scalar head": (
        lambda folder: set_config(folder, architectures=["LlamaForCausalLM"]),
        ": holds no scalar head, expected a sequence classifier with one label (a reward model)",
    ),
    "two labels": (
        lambda folder: set_config(folder, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}),
        ": holds a classifier with 2 labels, expected a sequence classifier with one label (a reward model)",
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        ": no tokenizer that transformers can load (",
    ),
}


@pytest.mark.parametrize("case", REWARDS)
def test_reward_models_that_cannot_be_used(
    case: str, tmp_path: Path, reward_folder: Path, ppomax: Callable, arguments: Callable
) -> None:
    spoil, expected = REWARDS[case]
    folder = copy(reward_folder, tmp_path / "reward")
    spoil(folder)
    complaint = ppomax(*arguments("ppo", tmp_path / "out", reward=folder)).complaint
    assert complaint.startswith(f"{folder}{expected}")
    assert not (tmp_path / "out").exists()


def test_different_tokenizers(tmp_path: Path, foreign_folder: Path, ppomax: Callable, arguments: Callable) -> None:
    complaint = ppomax(*arguments("ppo", tmp_path / "out", reward=foreign_folder)).complaint
    assert complaint.startswith(
        f"the policy and the reward model in {foreign_folder} use different tokenizers (300 and"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sft", "rm", "ppo"])
def test_token_ids_outside_the_vocabulary(
    command: str, tmp_path: Path, narrow_folders: Path, ppomax: Callable, arguments: Callable
) -> None:
    complaint = ppomax(*arguments(command, tmp_path / "out", model=narrow_folders / "policy")).complaint
    expected = f"{narrow_folders}/policy: the tokenizer has token id 299, but the model only ids below 280"
    assert complaint == expected
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there(tmp_path: Path, ppomax: Callable, arguments: Callable) -> None:
    complaint = ppomax(*arguments("sft", tmp_path / "out", runtime__device="cuda:77")).complaint
    assert complaint.startswith("RuntimeConfig.device = 'cuda:77': ")
    complaint = ppomax(*arguments("sft", tmp_path / "out", runtime__device="abacus")).complaint
    assert "RuntimeConfig.device = 'abacus': expected 'auto', 'cpu', 'cuda' or 'cuda:N'" in complaint
    assert not (tmp_path / "out").exists()


# Reward functions

FUNCTIONS = """
import math

calls = 0

def nan(prompts, responses):
    return [0.0] * (len(responses) - 1) + [math.nan]

def infinite(prompts, responses):
    return [math.inf] * len(responses)

def short(prompts, responses):
    return [0.0]

def text(prompts, responses):
    return ["good"] * len(responses)

def nothing(prompts, responses):
    return None

def crash(prompts, responses):
    return 1 / 0

def one_argument(prompts):
    return []

def late(prompts, responses):
    global calls
    calls += 1
    return [float(len(response)) for response in responses] if calls != 4 else [math.nan] * len(responses)

number = 3
"""
CALLS: dict[str, str] = {
    "nan": "reward function nan: score 7 is nan, expected a finite float32",
    "infinite": "reward function infinite: score 0 is inf, expected a finite float32",
    "short": "reward function short: expected 8 scores, got 1",
    "text": "reward function text: expected 8 numbers, got ['good', 'good'",
    "nothing": "reward function nothing: expected 8 numbers, got None",
    "crash": "reward function crash: ZeroDivisionError: division by zero (",
    "one_argument": "reward function one_argument: TypeError: one_argument() takes 1 positional argument but 2 were",
    "number": "'{module}:number': expected a function, found int",
    "missing": "'{module}:missing': ",
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of reward functions in the current folder."""
    (tmp_path / "cwd").mkdir()
    name = f"functions_of_{abs(hash(tmp_path))}"
    (tmp_path / "cwd" / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return name


@pytest.mark.parametrize("function", CALLS)
def test_reward_functions_that_cannot_be_used(
    function: str, module: str, tmp_path: Path, ppomax: Callable, arguments: Callable
) -> None:
    line = arguments("ppo", tmp_path / "out", **{**NO_EXTRAS, "reward": f"{module}:{function}"})
    complaint = ppomax(*line).complaint
    assert CALLS[function].format(module=module) in complaint
    assert not (tmp_path / "out").exists()
    if function == "crash":
        assert f"{module}.py:22)" in complaint


def test_reward_functions_that_are_not_there(tmp_path: Path, ppomax: Callable, arguments: Callable) -> None:
    for name, expected in (("no_such_module_here:f", "'no_such_module_here:f': "), (":f", "expected module:function")):
        complaint = ppomax(*arguments("ppo", tmp_path / "out", **{**NO_EXTRAS, "reward": name})).complaint
        assert expected in complaint
        assert not (tmp_path / "out").exists()


def test_a_reward_function_that_fails_later(
    module: str, tmp_path: Path, ppomax: Callable, arguments: Callable, files_in: Callable
) -> None:
    """The run up to there stands, and goes on when the function is mended."""
    run = tmp_path / "out"
    outcome = ppomax(*arguments("ppo", run, **{**NO_EXTRAS, "reward": f"{module}:late"}))
    assert outcome.code == 2
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("ppomax: error:"))
    assert line == "ppomax: error: reward function late: score 0 is nan, expected a finite float32"
    assert outcome.err.splitlines()[-1] == line
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert not [name for name in files_in(run) if ".draft" in name]
    assert ppomax("ppo", "--resume", run).code == 0
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("command", ["generate", "eval", "plan"])
def test_an_output_that_cannot_be_written_is_known_before_the_work(
    command: str, tmp_path: Path, policy_folder: Path, world_files: dict, ppomax: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def begin(*arguments: object, **options: object) -> None:
        raise AssertionError("the work has begun")

    for name in ("generate.load_policy", "evaluation.load_policy", "plan.plan"):
        monkeypatch.setattr(f"ppomax.engine.{name}", begin)
    options = {
        "generate": ("--prompt", "a", "--out", tmp_path),
        "eval": ("--baseline", policy_folder, "--judge", "m:f", "--data", world_files["held_out"], "--out", tmp_path),
        "plan": ("--json", tmp_path),
    }
    complaint = ppomax(command, "--model", policy_folder, *options[command]).complaint
    assert complaint == f"{tmp_path}: expected the name of a file to write, found a folder"


# Run folders


@pytest.fixture
def finished(tmp_path: Path, ppomax: Callable, arguments: Callable) -> Path:
    """A finished run of `ppomax sft`."""
    assert ppomax(*arguments("sft", tmp_path / "run", max_steps=2)).code == 0
    return tmp_path / "run"


@pytest.mark.parametrize("command", ALL)
def test_a_folder_that_holds_a_run(
    command: str, finished: Path, ppomax: Callable, arguments: Callable, files_in: Callable
) -> None:
    before = files_in(finished)
    complaint = ppomax(*arguments(command, finished)).complaint
    assert complaint.startswith(
        f"{finished} already holds a run: continue it with --resume {finished}, replace it with"
    )
    assert files_in(finished) == before


def test_a_run_is_replaced_when_asked_to(
    finished: Path, ppomax: Callable, arguments: Callable, world_files: dict, policy_folder: Path
) -> None:
    assert ppomax(*arguments("rm", finished, max_steps=1), "--overwrite").code == 0
    assert RunFolder.open(finished).inputs("rm")["data"] == [str(world_files["pairs"])]
    complaint = ppomax(*arguments("ppo", finished, reward=finished), "--overwrite").complaint
    assert complaint == f"{finished}: --overwrite would delete {finished}, the new run's own reward"


@pytest.mark.parametrize("command", ALL)
def test_a_folder_that_holds_something_else(
    command: str, tmp_path: Path, ppomax: Callable, arguments: Callable, files_in: Callable
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    complaint = ppomax(*arguments(command, tmp_path), "--overwrite").complaint
    assert complaint == f"{tmp_path} is not empty and holds no run: choose another --out"
    assert ppomax(*arguments(command, tmp_path / "thesis.tex" / "run")).complaint.endswith(": Not a directory")
    assert files_in(tmp_path) == {"thesis.tex": b"years of work"}


def test_the_run_of_another_command(finished: Path, ppomax: Callable, files_in: Callable) -> None:
    before = files_in(finished)
    for command in ("rm", "ppo"):
        complaint = ppomax(command, "--resume", finished).complaint
        assert complaint == f"{finished}: a run of `ppomax sft`, expected `ppomax {command}`"
    assert files_in(finished) == before


SPOILT_RUNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no checkpoint": (
        lambda run: shutil.rmtree(run / "checkpoints"),
        ": holds no checkpoint yet, start it anew with --overwrite",
    ),
    "broken record": (lambda run: (run / "run.toml").write_text("command ="), "/run.toml: Invalid value (at end of"),
    "empty record": (lambda run: (run / "run.toml").write_text(""), "/run.toml: no 'command' in it, expected the"),
    "cut state": (
        lambda run: (run / "checkpoints/step-000002/state.pt").write_bytes(b"PK"),
        "/checkpoints/step-000002/state.pt: not a readable checkpoint (",
    ),
    "cut weights": (
        lambda run: cut_weights(run / "checkpoints/step-000002/policy"),
        "/checkpoints/step-000002/policy/model.safetensors: not a whole safetensors file (",
    ),
    "broken figures": (
        lambda run: (run / "metrics.jsonl").write_text("half\n{}\n"),
        "/metrics.jsonl:1: expected a JSON record with 'stage' and 'step'",
    ),
}


@pytest.mark.parametrize("case", SPOILT_RUNS)
def test_runs_that_cannot_be_resumed(case: str, finished: Path, ppomax: Callable, files_in: Callable) -> None:
    spoil, expected = SPOILT_RUNS[case]
    spoil(finished)
    before = files_in(finished)
    assert ppomax("sft", "--resume", finished).complaint.startswith(f"{finished}{expected}")
    assert files_in(finished) == before


# A full disk


@pytest.mark.parametrize("part", ["state", "tensors"])
def test_a_full_disk_while_a_checkpoint_is_written(
    part: str, tmp_path: Path, ppomax: Callable, arguments: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, saved = tmp_path / "run", []
    save = cli.sys.modules["torch"].save

    def fill(content: Any, place: Any) -> None:
        second = isinstance(place, Path) and saved  # of the checkpoints; others are places inside a file of tensors
        if second if part == "state" else saved and not isinstance(place, Path):
            raise OSError(28, "No space left on device")
        saved.extend([place] * isinstance(place, Path))
        save(content, place)

    monkeypatch.setattr("ppomax.engine.checkpoint.torch.save", fill)
    outcome = ppomax(*arguments("ppo", run, **NO_EXTRAS))
    assert outcome.code == 2
    lines = [line for line in outcome.err.splitlines() if line.startswith("ppomax: error:")]
    assert lines == [
        f"ppomax: error: {run}/checkpoints/step-000004: could not be written ([Errno 28] No space left on device); "
        "nothing of it was kept, what stood there still does"
    ]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert load_state(run / "checkpoints" / "step-000002")["step"] == 2
    assert not (run / "config.json").exists()
    monkeypatch.undo()
    assert ppomax("ppo", "--resume", run).code == 0
    assert AutoModelForCausalLM.from_pretrained(run).config.vocab_size == 300


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
from ppomax.engine.cli import main
main(sys.argv[1:])
"""


def test_files_that_grow_too_large_in_a_process_of_its_own(
    tmp_path: Path, ppomax: Callable, arguments: Callable, files_in: Callable, assert_equal_runs: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The weights do not fit: the checkpoint before stays, and from it the run goes on as if nothing had been."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    cli.sys.modules["torch"].manual_seed(0)
    assert ppomax(*arguments("sft", whole)).code == 0
    cli.sys.modules["torch"].manual_seed(0)
    step = sft._SFT.step
    calls: list[int] = []

    def interrupt(trainee: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(trainee)

    monkeypatch.setattr(sft._SFT, "step", interrupt)
    assert ppomax(*arguments("sft", run)).code == 130
    before = files_in(run / "checkpoints")
    line = [sys.executable, "-c", LIMITED, "sft", "--resume", str(run)]
    process = subprocess.run(line, capture_output=True, text=True, check=False)
    assert process.returncode == 2, process.stderr
    *progress, last = process.stderr.splitlines()
    assert last.startswith(f"ppomax: error: {run}/checkpoints/step-000004: could not be written (")
    assert "File too large" in last
    assert all(text.startswith("sft ") for text in progress)
    assert files_in(run / "checkpoints") == before
    assert {name.split("/")[1] for name in before} == {"policy", "state.pt", "tensors"}
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    monkeypatch.undo()
    assert ppomax("sft", "--resume", run).code == 0
    assert_equal_runs(whole, run)


def test_bad_input_in_a_process_of_its_own(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "ppomax.engine.cli", "sft", "--data", "nowhere.jsonl", "--out", "run"]
    process = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "ppomax: error: nowhere.jsonl: expected a readable file: No such file or directory\n"
    assert not any(tmp_path.iterdir())


def test_an_interrupted_command(tmp_path: Path, ppomax: Callable, arguments: Callable, monkeypatch: Any) -> None:
    def interrupt(trainee: Any) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(sft._SFT, "step", interrupt)
    outcome = ppomax(*arguments("sft", tmp_path / "run"))
    assert outcome.code == 130
    assert "Traceback" not in outcome.err


def test_a_reader_that_has_seen_enough(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `ppomax ppo --help | head`."""

    def closed(arguments: list[str]) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_dispatch", closed)
    monkeypatch.setattr(cli.os, "dup2", lambda *handles: None)
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 1
    assert capfd.readouterr() == ("", "")
