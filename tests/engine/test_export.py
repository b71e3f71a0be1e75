"""A model out of a run's checkpoint: which one, as which files, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ppomax.engine import export as module
from ppomax.engine.checkpoint import save_checkpoint
from ppomax.engine.errors import InputError
from ppomax.engine.export import export
from ppomax.engine.models import load_policy, load_reward_model
from ppomax.engine.runs import RunFolder


@pytest.fixture
def run(tmp_path: Path, new_policy: Any, new_scalar: Any, tokenizer: Any, small_config: Callable[..., Any]) -> Path:
    """A run with checkpoints of steps 2 and 4, each of other weights."""
    run = RunFolder.create(tmp_path / "run", "ppo", {}, small_config("ppo"))
    for step in (2, 4):
        models = {
            "policy": new_policy(seed=step, vocab_size=300),
            "critic": new_scalar(seed=step, vocab_size=300),
        }
        save_checkpoint(run.path / "checkpoints" / f"step-{step:06d}", models, tokenizer, {"step": step})
    return run.path


def test_the_newest_policy(run: Path, tmp_path: Path, files_in: Callable[[Path], dict[str, bytes]]) -> None:
    out = tmp_path / "exported"
    assert export(run, out) == run / "checkpoints" / "step-000004" / "policy"
    assert files_in(out) == files_in(run / "checkpoints" / "step-000004" / "policy")
    load_policy(out)
    assert [path.name for path in tmp_path.iterdir() if path != run] == ["exported"]


def test_another_model_of_another_step(run: Path, tmp_path: Path, files_in: Callable[[Path], dict[str, bytes]]) -> None:
    export(run, tmp_path / "critic", model="critic", step=2)
    assert files_in(tmp_path / "critic") == files_in(run / "checkpoints" / "step-000002" / "critic")
    load_reward_model(tmp_path / "critic")


def test_of_a_reward_model_run_the_reward_model(
    tmp_path: Path, new_policy: Any, new_scalar: Any, tokenizer: Any, small_config: Callable[..., Any]
) -> None:
    run = RunFolder.create(tmp_path / "rm", "rm", {}, small_config("rm"))
    models = {"language_model": new_policy(vocab_size=300), "reward_model": new_scalar(vocab_size=300)}
    save_checkpoint(run.path / "checkpoints" / "step-000001", models, tokenizer, {"step": 1})
    export(run.path, tmp_path / "out")
    load_reward_model(tmp_path / "out")


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_weights_take_no_space_where_links_are(
    links: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError("Invalid cross-device link")

    if not links:
        monkeypatch.setattr(module.os, "link", refuse)
    export(run, tmp_path / "out")
    source = run / "checkpoints" / "step-000004" / "policy"
    shared = {path.name for path in (tmp_path / "out").iterdir() if path.samefile(source / path.name)}
    assert shared == ({"model.safetensors"} if links else set())


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options, match in (
        ({"model": "judge"}, "step-000004: holds no model 'judge', expected one of critic, policy$"),
        ({"step": 3}, "no checkpoint of step 3 in it; those that are kept: 2, 4$"),
    ):
        with pytest.raises(InputError, match=match):
            export(run, out, **options)
        assert not out.exists()
    with pytest.raises(InputError, match=r"holds no run \(no run\.toml\)"):
        export(tmp_path, out)
    out.mkdir()
    (out / "notes").write_text("kept")
    with pytest.raises(InputError, match="is not empty: choose another --out"):
        export(run, out)
    assert (out / "notes").read_text() == "kept"


def test_the_command(run: Path, tmp_path: Path, ppomax: Callable[..., Any]) -> None:
    outcome = ppomax("export", run, "--out", tmp_path / "out", "--model", "critic")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.split() == [str(run / "checkpoints" / "step-000004" / "critic"), "->", str(tmp_path / "out")]
    load_reward_model(tmp_path / "out")
    assert "holds no model 'x'" in ppomax("export", run, "--out", tmp_path / "more", "--model", "x").complaint
