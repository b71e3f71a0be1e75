"""One model out of a run's checkpoint, as a folder of its own that later checkpoints do not delete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .checkpoint import atomic_folder
from .errors import InputError
from .runs import RunFolder


def export(run: str | Path, out: str | Path, model: str = "", step: int | None = None) -> Path:
    """Copy a model from a checkpoint of `run` to the new folder `out`, file by file; returns the folder it came from.

    Weights are hard links where the file system has them: they take no space and no time.

    Args:
        model: its name in the checkpoint; default: the policy, or of a reward-model run the reward model.
        step: of the checkpoint; default: the newest.

    Raises:
        InputError: no run, no such checkpoint or model, or `out` holds something.
    """
    checkpoint = _checkpoint(RunFolder.open(run), step)
    names = sorted({path.parent.name for path in checkpoint.glob("*/*config.json")})
    wanted = model or ("policy" if "policy" in names else "reward_model")
    if wanted not in names:
        raise InputError(f"{checkpoint}: holds no model {wanted!r}, expected one of {', '.join(names)}")
    target = Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{out} is not empty: choose another --out")
    with atomic_folder(target) as draft:
        shutil.copytree(checkpoint / wanted, draft, copy_function=_copy, dirs_exist_ok=True)
    return checkpoint / wanted


def _checkpoint(run: RunFolder, step: int | None) -> Path:
    if step is None:
        return run.latest_checkpoint()
    for checkpoint in run.checkpoints:
        if checkpoint.name == f"step-{step:06d}":
            return checkpoint
    kept = ", ".join(str(int(path.name.removeprefix("step-"))) for path in run.checkpoints) or "none"
    raise InputError(f"{run.path}: no checkpoint of step {step} in it; those that are kept: {kept}")


def _copy(source: str, target: str) -> None:
    """Link weights, which nobody writes into; copy the small files, which somebody may edit."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)
