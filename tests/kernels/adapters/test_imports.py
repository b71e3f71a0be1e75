"""Adapters import without their trainers."""

import subprocess
import sys

ADAPTERS = ["nemo_rl", "openrlhf", "skyrl", "slime", "torchtune", "trl", "verl"]


def test_importing_adapters_imports_no_trainer() -> None:
    code = (
        f"import sys; from importlib import import_module\n"
        f"for name in {ADAPTERS}: import_module('ppomax.kernels.adapters.' + name)\n"
        f"print(sorted(set({[*ADAPTERS, 'transformers', 'ray']}) & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
