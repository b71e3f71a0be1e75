"""What the tests share: one thread, tiny models of several families, a tokenizer, model folders."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available() and find_spec("triton"):
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # Triton settles while it is imported whether to interpret its own kernels
        patch.setenv("TRITON_INTERPRET", "1")
        import_module("triton")
settings.register_profile("ppomax", deadline=None)  # a first call may take long: imports, caches
settings.load_profile("ppomax")

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_WINDOW = {"sliding_window": 5}
_GEMMA = {**_WINDOW, "head_dim": 16, "query_pre_attn_scalar": 40}  # a scale of its own
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", _WINDOW),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma2-uncapped": ("gemma2", {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def new_model() -> Callable[..., Any]:
    """new_model(family, auto_class=AutoModelForCausalLM, seed=0, dtype=torch.float32, **config): a transformers model.

    All its weights are random, norms and biases too, and large enough that its outputs differ clearly.
    """
    import transformers
    from ppomax.engine.attention import ATTENTION

    def build(
        family: str = "llama",
        auto_class: Any = transformers.AutoModelForCausalLM,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> Any:
        kind, options = _FAMILIES[family]
        config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **options, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto_class.from_config(config, attn_implementation=ATTENTION)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.15)
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def new_policy(new_model: Callable[..., Any]) -> Callable[..., Any]:
    """new_policy(family, seed=0, dtype=torch.float32, **config): a CausalModel."""
    from ppomax.engine.models import CausalModel

    return lambda family="llama", **options: CausalModel(new_model(family, **options))


@pytest.fixture(scope="session")
def new_scalar(new_policy: Callable[..., Any]) -> Callable[..., Any]:
    """new_scalar(family, seed=0, dtype=torch.float32, **config): a ScalarModel with a random head."""
    from ppomax.engine.models import scalar_from_causal

    def build(family: str = "llama", seed: int = 0, **options: Any) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return scalar_from_causal(new_policy(family, seed=seed, **options), std=0.3, generator=generator)

    return build


@pytest.fixture(scope="session")
def plain() -> Callable[..., Any]:
    """plain(model, attention="eager"): a copy of an engine's model as transformers runs it."""

    def twin(model: Any, attention: str = "eager") -> Any:
        model = copy.deepcopy(getattr(model, "model", model))
        for part in (model, model.base_model):  # which may have a configuration of its own
            part.set_attn_implementation(attention)
        return model

    return twin


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Generated sentences, the same ones each time."""
    draw = random.Random(0)
    words = ["red", "green", "stone", "river", "walks", "sings", "slowly", "under", "seven", "doors"]
    return [" ".join(draw.choices(words, k=draw.randint(3, 9))) + "." for _ in range(200)]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Any:
    """A byte-level tokenizer of 300 entries with `<pad>` (0) and `</s>` (1)."""
    from ppomax.engine.builtin import train_tokenizer

    return train_tokenizer(texts, 300)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory, new_policy: Any, tokenizer: Any) -> Path:
    """A Hugging Face folder of a tiny causal language model with the tokenizer. Not to be written to."""
    return _saved(tmp_path_factory, "policy", new_policy(vocab_size=len(tokenizer), seed=1), tokenizer)


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory: pytest.TempPathFactory, new_scalar: Any, tokenizer: Any) -> Path:
    """A Hugging Face folder of a tiny reward model with the tokenizer. Not to be written to."""
    return _saved(tmp_path_factory, "reward", new_scalar(vocab_size=len(tokenizer), seed=2), tokenizer)


def _saved(factory: pytest.TempPathFactory, name: str, model: Any, tokenizer: Any) -> Path:
    from ppomax.engine.checkpoint import save_model

    folder = factory.mktemp(name)
    save_model(model, tokenizer, folder)
    return folder
