"""Small models from nothing: a Llama of a few layers and a tokenizer trained on the data at hand."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .attention import ATTENTION
from .errors import InputError
from .models import CausalModel, Placement
from .weights import cast

# name -> (width, layers, heads, feed-forward width)
SHAPES = {"tiny": (96, 3, 4, 256), "small": (192, 4, 6, 512)}
PREFIX = "builtin:"


def is_builtin(model: str) -> bool:
    """True for `builtin:tiny` and its siblings."""
    return str(model).startswith(PREFIX)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer (any text can be encoded) with `<pad>` and `</s>`, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def new_model(name: str, tokenizer: PreTrainedTokenizerBase, placement: Placement, seed: int) -> CausalModel:
    """A freshly initialised `builtin:NAME` for the tokenizer's vocabulary."""
    shape = SHAPES.get(name.removeprefix(PREFIX))
    if shape is None:
        raise InputError(f"unknown built-in model {name!r}; expected one of {', '.join(PREFIX + n for n in SHAPES)}")
    width, layers, heads, feed_forward = shape
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=ATTENTION,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return CausalModel(cast(model, placement.device, placement.dtype), placement)
