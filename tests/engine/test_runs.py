"""The folder that a run owns: claimed once, recorded, read back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ppomax.engine.config import PPOConfig, RewardConfig, SFTConfig
from ppomax.engine.errors import InputError, StorageError
from ppomax.engine.runs import RunFolder, read_toml, version

INPUTS = {"policy": "runs/sft", "prompts": ["a.jsonl", "b.jsonl"], "critic": "", "template": "auto"}
CONFIG = PPOConfig(gamma=0.5, value_clip=None, reward=RewardConfig("scale", None))


def create(path: Path, **options: Any) -> RunFolder:
    return RunFolder.create(path, "ppo", INPUTS, CONFIG, **options)


def test_a_new_run_records_command_inputs_and_configuration(tmp_path: Path) -> None:
    create(tmp_path / "deep" / "run")
    run = RunFolder.open(tmp_path / "deep" / "run")
    assert run.inputs("ppo") == INPUTS
    assert run.config(PPOConfig) == CONFIG
    record = read_toml(run.record_file)
    assert (record["command"], record["version"]) == ("ppo", version())
    assert record["config"]["value_clip"] == "none"
    assert [path.name for path in run.path.iterdir()] == ["run.toml"]


def test_an_empty_folder_may_be_claimed(tmp_path: Path) -> None:
    assert create(tmp_path).inputs("ppo") == INPUTS


def test_a_run_is_not_replaced_unless_asked_to(tmp_path: Path, files_in: Callable) -> None:
    run = create(tmp_path / "run")
    (run.path / "config.json").write_text("a model")
    before = files_in(tmp_path)
    with pytest.raises(InputError) as caught:
        create(run.path)
    assert str(caught.value) == (
        f"{run.path} already holds a run: continue it with --resume {run.path}, replace it with --overwrite, or choose "
        "another --out"
    )
    assert files_in(tmp_path) == before
    RunFolder.create(run.path, "sft", {"model": "x"}, SFTConfig(), overwrite=True)
    assert list(files_in(run.path)) == ["run.toml"]
    assert run.inputs("sft") == {"model": "x"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_never_touched(tmp_path: Path, overwrite: bool, files_in: Callable) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    before = files_in(tmp_path)
    for name in ("folder", "file"):
        with pytest.raises(InputError, match=f"{name} is not empty and holds no run: choose another --out"):
            create(tmp_path / name, overwrite=overwrite)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("source", ["model", "data"])
def test_a_run_is_not_replaced_by_one_that_needs_it(tmp_path: Path, source: str, files_in: Callable) -> None:
    run = create(tmp_path / "run")
    inputs = {"model": "elsewhere", "data": ["elsewhere.jsonl"], "critic": ""}
    needed = run.path / "checkpoints" / "step-000001"
    inputs[source] = str(needed) if source == "model" else [str(needed)]
    before = files_in(tmp_path)
    with pytest.raises(InputError, match=f"run: --overwrite would delete {needed}, the new run's own {source}"):
        RunFolder.create(run.path, "sft", inputs, SFTConfig(), overwrite=True)
    assert files_in(tmp_path) == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        create(tmp_path / "file" / "run")


def test_a_record_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, text: str, encoding: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(StorageError, match=r"run\.toml: could not be written"):
        create(tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())


# Reading back


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    expected = f"{tmp_path}: holds no run \\(no run.toml\\), expected the --out folder of an earlier run"
    with pytest.raises(InputError, match=expected):
        RunFolder.open(tmp_path)


def test_the_run_of_another_command_is_named(tmp_path: Path) -> None:
    run = create(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}: a run of `ppomax ppo`, expected `ppomax sft`"):
        run.inputs("sft")


BROKEN = {
    "not TOML": ("command = ppo", "run.toml: Invalid value (at line 1, column 11)"),
    "without a command": (
        '[inputs]\nmodel = "x"\n[config]',
        "run.toml: no 'command' in it, expected the run.toml of a",
    ),
    "without inputs": ('command = "ppo"\n[config]', "run.toml: no 'inputs' in it, expected the run.toml of a run"),
    "without a configuration": ('command = "ppo"\n[inputs]', "run.toml: no 'config' in it, expected the run.toml of a"),
    "unknown field": ('command = "ppo"\n[inputs]\n[config]\ngama = 1', "run.toml: unknown field 'gama'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_record_is_named(tmp_path: Path, case: str) -> None:
    text, expected = BROKEN[case]
    (tmp_path / "run.toml").write_text(text)
    run = RunFolder.open(tmp_path)
    with pytest.raises(InputError) as caught:
        (run.inputs("ppo"), run.config(PPOConfig))
    assert str(caught.value).startswith(f"{tmp_path}/{expected}")


def test_a_binary_toml_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=f"^{tmp_path}/x.toml: 'utf-8' codec can't decode byte 0xff in position 0"):
        read_toml(tmp_path / "x.toml")


def test_a_missing_toml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{tmp_path}/x.toml: No such file or directory$"):
        read_toml(tmp_path / "x.toml")


# Checkpoints


@pytest.mark.parametrize(("keep", "kept"), [(1, [6]), (2, [4, 6]), (5, [2, 4, 6])])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int, kept: list[int]) -> None:
    run = create(tmp_path)
    for step in (2, 4, 6):
        run.save_checkpoint(step, {}, None, {}, keep)  # type: ignore[arg-type]
    names = [f"step-{step:06d}" for step in kept]
    assert [path.name for path in run.checkpoints] == names
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    assert run.latest_checkpoint() == tmp_path / "checkpoints" / names[-1]


def test_no_checkpoint_is_lost_when_the_next_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_in: Callable
) -> None:
    run = create(tmp_path)
    run.save_checkpoint(2, {}, None, {}, 1)  # type: ignore[arg-type]
    before = files_in(tmp_path)

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ppomax.engine.checkpoint.torch.save", fail)
    with pytest.raises(StorageError, match="step-000004: could not be written"):
        run.save_checkpoint(4, {}, None, {}, 1)  # type: ignore[arg-type]
    assert files_in(tmp_path) == before


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    run = create(tmp_path)
    (tmp_path / "checkpoints" / ".step-000004.draft").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no checkpoint yet, start it anew with --overwrite"):
        run.latest_checkpoint()
