"""The public names: all there, with docstrings, and nothing heavy behind them."""

import inspect
import subprocess
import sys

from ppomax.kernels import api

OPERATIONS = [
    "gae", "kl_penalty", "linear_cross_entropy", "linear_logprobs", "linear_ppo_loss", "logprobs_from_logits",
    "masked_mean", "masked_var", "masked_whiten", "paged_attention", "policy_loss", "ppo_loss", "sample", "shaped_gae",
    "value_loss", "write_kv",
]  # fmt: skip


def test_every_operation_is_exported_and_described() -> None:
    assert set(OPERATIONS) <= set(api.__all__)
    for name in api.__all__:
        assert hasattr(api, name)
    for name in OPERATIONS:
        assert inspect.getdoc(getattr(api, name)), name


def test_imports_nothing_heavier_than_torch() -> None:
    heavy = ["transformers", "tokenizers", "safetensors", "tyro", "rich", "tensorboard", "matplotlib"]
    code = f"import sys, ppomax.kernels.api; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
