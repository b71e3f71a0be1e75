"""Policy, reference, critic and reward model: Hugging Face folders in, Hugging Face folders out.

`CausalModel` and `ScalarModel` wrap unmodified transformers models. Both run the trunk over a packed batch and apply
their head to chosen rows only, so no logits and no values of prompt tokens are ever computed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ..kernels.api import (
    LinearPPOLoss,
    ValueLoss,
    linear_cross_entropy,
    linear_logprobs,
    linear_ppo_loss,
    value_loss,
)
from .attention import ATTENTION, Attention, Varlen
from .batch import PackedBatch
from .config import RuntimeConfig
from .errors import InputError, first_line
from .exact import pad_to_tiles
from .flash import check_fits, resolve_packed
from .layers import LayerOptions, check_liger, prepare_layers
from .linear import linear, speed_up, tiled_linear
from .weights import arrive, copy_of, load_pretrained

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


@dataclass(frozen=True)
class Placement:
    """Device and precision of a model, and what runs it; all as resolved, nothing is `auto`."""

    device: torch.device
    dtype: torch.dtype
    exact: bool = False
    """Arithmetic of `exact.py`."""
    attention: str = "sdpa"
    """Of packed sequences: flash-attn, torch or sdpa (`flash.py`)."""
    deterministic: bool = False
    layers: LayerOptions = field(default_factory=LayerOptions)
    deferred: bool = False
    """Loaded weights wait in their files until `Ranks.shard` brings them here, layer by layer"""

    @classmethod
    def of(cls, runtime: RuntimeConfig) -> Placement:
        """Resolve `auto`; raise InputError where the device does not exist, or what is asked for does not run on it.

        With `runtime.deterministic` on a GPU, torch's switch for it is set, for the whole process.
        """
        name = runtime.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"RuntimeConfig.device = {runtime.device!r}: {str(error).splitlines()[0]}") from None
        if runtime.exact and device.type != "cpu":
            raise InputError(f"RuntimeConfig.exact = True is a mode of the CPU, and the device is {device}")
        default = torch.float32 if device.type == "cpu" else torch.bfloat16
        dtype = default if runtime.dtype == "auto" else getattr(torch, runtime.dtype)
        if runtime.liger:
            check_liger(device)
        if runtime.deterministic and device.type == "cuda":
            _use_fixed_algorithms()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels and graphs go to the current one
        return cls(
            device,
            dtype,
            runtime.exact,
            resolve_packed(runtime.attention, device, dtype),
            runtime.deterministic,
            LayerOptions(runtime.checkpointing, runtime.compile, runtime.liger),
        )


def _use_fixed_algorithms() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    switches: Any = torch.utils.deterministic
    switches.fill_uninitialized_memory = False  # nothing here reads what it has not written


CPU = Placement(torch.device("cpu"), torch.float32)


class _Trunk(nn.Module):
    """The part that policy and critic share: the transformer under the head."""

    model: PreTrainedModel
    entries: tuple[str, ...] = ()
    """Methods that need the weights and may be called from outside while those are sharded (`parallel.py`); the first
    takes a batch alone"""

    def __init__(self, model: PreTrainedModel, placement: Placement = CPU) -> None:
        super().__init__()
        # eval(): dropout anywhere would make old and new log-probs differ.
        self.model = model.eval()
        self.placement, self.exact = placement, placement.exact
        self.home: torch.device | None = placement.device if placement.deferred else None
        """Where it computes, if its weights may wait elsewhere"""
        speed_up(model)
        check_fits(placement.attention, model.config)
        prepare_layers(model, placement.layers)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.home or self.model.device

    def trunk(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Last hidden states `[T, H]` of packed tokens `[T]` at positions `[T]`."""
        if not self.exact:
            return self._run(tokens, positions, attention)
        with tiled_linear():
            return self._run(pad_to_tiles(tokens), pad_to_tiles(positions), attention)[: tokens.numel()]

    def _run(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        output = self.model.base_model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, attention=attention
        )
        return output.last_hidden_state[0]

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Last hidden states `[T, H]` of a packed batch."""
        return self.trunk(batch.tokens, batch.positions, self.packed(batch.lengths))

    def check_packing(self) -> None:
        """Raise InputError unless the engine computes what the model by itself does; without gradients."""
        _check_packing(self)

    def packed(self, lengths: Sequence[int]) -> Varlen:
        """How sequences of these lengths, packed, attend."""
        place = self.placement
        return Varlen(
            lengths, exact=self.exact, kernel=place.attention, device=self.device, deterministic=place.deterministic
        )


class CausalModel(_Trunk):
    """A causal language model: policy, reference, or the trunk that SFT trains."""

    entries = ("logprobs", "policy_loss", "cross_entropy", "check_packing")

    @property
    def head(self) -> dict[str, Any]:
        """weight `[V, H]`, bias `[V]` or None, and softcap of the LM head: keyword arguments of the fused losses."""
        head = self.model.get_output_embeddings()
        return {
            "weight": head.weight,
            "bias": getattr(head, "bias", None),
            "softcap": getattr(self.config, "final_logit_softcapping", None),
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits `[R, V]` of hidden states `[R, H]`, never rounded to less: one row per running sequence, in
        sampling only."""
        head = self.head
        with tiled_linear() if self.exact else nullcontext():
            logits = _product(hidden, head["weight"]).float()
        logits = logits if head["bias"] is None else logits + head["bias"]
        if head["softcap"] is not None:
            logits = head["softcap"] * torch.tanh(logits / head["softcap"])
        return logits

    def logprobs(self, batch: PackedBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies `[N]` float32 of the batch's learned tokens."""
        rows = self.hidden(batch).index_select(0, batch.rows)
        return linear_logprobs(rows, labels=batch.labels, temperature=temperature, **self.head)

    def policy_loss(self, batch: PackedBatch, **options: Any) -> LinearPPOLoss:
        """`linear_ppo_loss` of the batch's learned tokens; `options` are its own.

        To a float32 gradient that the LM head has already its new one is added in the forward pass, without a second
        tensor of that size: the loss then has to be used with an upstream gradient of 1.
        """
        head, rows = self.head, self.hidden(batch).index_select(0, batch.rows)
        return linear_ppo_loss(rows, labels=batch.labels, weight_grad=_grown(head["weight"]), **options, **head)

    def cross_entropy(self, batch: PackedBatch, normalizer: float) -> Tensor:
        """The sum over the batch's learned tokens of -log p, divided by `normalizer`."""
        rows = self.hidden(batch).index_select(0, batch.rows)
        return linear_cross_entropy(rows, labels=batch.labels, normalizer=normalizer, **self.head).loss


class ScalarModel(_Trunk):
    """A trunk with a bias-free scalar head: critic or reward model (a one-label sequence classifier)."""

    entries = ("values", "scores", "value_loss", "check_packing")

    def read(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """float32 (float64 where the model is) scalars of the hidden states `[T, H]` at `rows`."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.index_select(0, rows).to(dtype), self.model.score.weight.to(dtype)).squeeze(-1)

    def values(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Values `[N]` of the states before each learned token, and `[S]` after each sequence's last token."""
        hidden = self.hidden(batch)
        return self.read(hidden, batch.rows), self.read(hidden, batch.last)

    def value_loss(self, batch: PackedBatch, old_values: Tensor, returns: Tensor, **options: Any) -> ValueLoss:
        """`value_loss` of the states before each learned token; `options` are its own."""
        return value_loss(self.read(self.hidden(batch), batch.rows), old_values, returns, **options)

    def scores(self, batch: PackedBatch) -> Tensor:
        """`[S]` scalars at each sequence's last token."""
        return self.read(self.hidden(batch), batch.last)


def _grown(weight: Tensor) -> Tensor | None:
    """The gradient that more can be added to in place: there, whole, and of a precision to add up in."""
    grad = weight.grad
    if grad is None or isinstance(grad, DTensor) or grad.dtype not in (torch.float32, torch.float64):
        return None
    return grad


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden W^T in float32 where they are halves: a logit of 20 rounded to bfloat16 is off by up to 0.06."""
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return linear(hidden, weight, None)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    tiles = [linear(hidden.float(), tile.float(), None) for tile in weight.split(4096)]  # no whole copy of the weight
    return torch.cat(tiles, 1)


Model = CausalModel | ScalarModel
AnyModel = TypeVar("AnyModel", CausalModel, ScalarModel)


def load_policy(folder: str | Path, placement: Placement = CPU) -> CausalModel:
    """A causal language model from a Hugging Face folder.

    Args:
        placement: device and precision, float32 on the CPU unless given; `Placement.of(RuntimeConfig())` takes a GPU
            where there is one, and bfloat16 there.

    Raises:
        InputError: no such folder, not a causal language model, or an architecture that packed batches do not fit.
    """
    _check_folder(folder)
    if _is_classifier(folder):
        raise InputError(f"{folder}: holds a sequence classifier, expected a causal language model")
    policy = CausalModel(_load(AutoModelForCausalLM, folder, placement), placement)
    return _checked(policy)


def load_reward_model(folder: str | Path, placement: Placement = CPU) -> ScalarModel:
    """A one-label sequence classifier from a Hugging Face folder, as `ppomax rm` writes it; `placement` as in
    `load_policy`.

    Raises:
        InputError: no such folder, no scalar head in it, more than one label, or an architecture that packed batches
            do not fit.
    """
    _check_folder(folder)
    labels = _read_config(folder).num_labels
    if not _is_classifier(folder) or labels != 1:
        held = f"a classifier with {labels} labels" if _is_classifier(folder) else "no scalar head"
        raise InputError(f"{folder}: holds {held}, expected a sequence classifier with one label (a reward model)")
    loaded = _load(AutoModelForSequenceClassification, folder, placement, num_labels=1)
    model = ScalarModel(loaded, placement)
    head = getattr(model.model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise InputError(f"{folder}: {type(model.model).__name__} has no bias-free linear head `score`, expected one")
    return _checked(model)


def load_critic(folder: str | Path, placement: Placement = CPU) -> ScalarModel:
    """A critic: the reward model in `folder`, or the trunk of the causal language model there with a zero head;
    `placement` and errors as in `load_policy`."""
    _check_folder(folder)
    if _is_classifier(folder):
        return load_reward_model(folder, placement)
    return as_critic(load_policy(folder, placement))


def as_critic(model: Model) -> ScalarModel:
    """`model` where it is a scalar one, else a zero head on its trunk, which the two then share."""
    return model if isinstance(model, ScalarModel) else scalar_from_causal(model, std=0.0)


def scalar_from_causal(causal: CausalModel, std: float, generator: torch.Generator | None = None) -> ScalarModel:
    """Put a scalar head with N(0, std) weights on the trunk of `causal`, which the two then share."""
    config = type(causal.config).from_dict({**causal.config.to_dict(), "num_labels": 1})
    with torch.device("meta"):
        shell = AutoModelForSequenceClassification.from_config(config, attn_implementation=ATTENTION)
    base = causal.model.base_model
    setattr(shell, shell.base_model_prefix, base)
    weight = next(base.parameters())
    width = config.get_text_config().hidden_size
    head = torch.empty(1, width).normal_(0, 1, generator=generator).mul_(std)
    shell.score = nn.Linear(width, 1, bias=False, device="meta")
    place = causal.placement
    dtype = place.dtype if place.deferred else weight.dtype  # files may hold less bits than the head shall have
    shell.score.weight = nn.Parameter(head.to(weight.device, dtype))
    return ScalarModel(shell, causal.placement)


def trainable_copy(model: AnyModel, placement: Placement) -> AnyModel:
    """A model with the same weights and memory of its own on `placement`, to be trained where `model` is frozen."""
    waits = model.placement.deferred
    copied = copy_of(model, shared=waits)
    if waits and not placement.deferred:
        arrive(copied, placement.device, placement.dtype)
        copied.placement, copied.home = placement, None
    return copied


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; InputError where there is none."""
    _check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder}: no tokenizer that transformers can load ({first_line(error)})") from None


def check_same_tokenizer(policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, names: str) -> None:
    """Raise InputError unless both turn text into the same ids: rollouts are passed on as token ids."""
    ours, theirs = policy.get_vocab(), other.get_vocab()
    if ours == theirs and policy.eos_token_id == other.eos_token_id:
        return
    differing = len(ours.items() ^ theirs.items())
    raise InputError(
        f"{names} use different tokenizers ({len(ours)} and {len(theirs)} entries, {differing} differ, end tokens "
        f"{policy.eos_token!r} and {other.eos_token!r}): token ids of one mean nothing to the other"
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: _Trunk, folder: str | Path) -> None:
    """Raise InputError where the tokenizer has ids that the model has no embedding for."""
    size = model.model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise InputError(f"{folder}: the tokenizer has token id {largest}, but the model only ids below {size}")


def _load(auto: Any, folder: str | Path, placement: Placement, **options: Any) -> PreTrainedModel:
    try:
        return load_pretrained(auto, folder, placement.device, placement.dtype, mapped=placement.deferred, **options)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder}: not a model that transformers can load ({first_line(error)})") from error


def _check_folder(folder: str | Path) -> None:
    path = Path(folder)
    if (path / "config.json").is_file() and str(folder):
        return
    if (path / "run.toml").is_file():
        raise InputError(f"{folder}: a run that has not finished; --resume {folder} goes on with it")
    state = "holds no config.json" if path.is_dir() and str(folder) else "no such folder"
    of_hub = not path.parent.exists() and re.fullmatch(r"[\w-]+/[\w.-]+", str(folder))
    advice = f"; one of the Hub: `hf download {folder} --local-dir FOLDER` first" if of_hub else ""
    raise InputError(f"{str(folder) or repr('')}: {state}, expected a Hugging Face model folder{advice}")


def _read_config(folder: str | Path) -> Any:
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder}/config.json: {first_line(error)}") from None


def _is_classifier(folder: str | Path) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in _read_config(folder).architectures or [])


def _checked(model: AnyModel) -> AnyModel:
    """`model`, once it is known to fit; one that is deferred is checked when its weights are there."""
    if not model.placement.deferred:
        model.check_packing()
    return model


@torch.no_grad()
def _check_packing(model: _Trunk) -> None:
    """Run a short sequence in two packs and alone: raise InputError unless the engine computes what the model does.

    This catches what no configuration field tells for sure: layers that look across a sequence's start
    (convolutions, linear attention), attention of a kind unknown here (sinks, biases), and logits that are scaled or
    capped in a way unknown here.
    """
    folder = model.config.name_or_path
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 4, 5]], device=model.device)
    tokens %= model.model.get_input_embeddings().weight.shape[0]
    positions = torch.tensor([0, 1, 2, 0, 1], device=model.device)
    try:
        one, other = (model.trunk(pack, positions, model.packed([3, 2]))[3:] for pack in tokens)
        ours = model.logits(one) if isinstance(model, CausalModel) else one
        theirs = _output_alone(model, tokens[0, 3:])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{folder}: the architecture does not take packed attention ({first_line(error)})") from error
    fp32, name = one.dtype == torch.float32, type(model.model).__name__
    if _difference(one, other) > (1e-5 if fp32 else 1e-2):
        raise InputError(f"{folder}: in {name} packed sequences see each other, which this engine does not support")
    if (gap := _difference(ours, theirs)) > (1e-3 if fp32 else 5e-2):
        raise InputError(
            f"{folder}: packed outputs of {name} differ from the model's own by {gap:.2g} of the largest: an "
            "architecture that this engine does not support"
        )


def _output_alone(model: _Trunk, tokens: Tensor) -> Tensor:
    """What transformers computes for one sequence with its plain attention: logits, or hidden states under a score."""
    causal = isinstance(model, CausalModel)
    parts = (model.model, model.model.base_model)  # a trunk under another model's head has a configuration of its own
    for part in parts:
        part.set_attn_implementation("eager")
    try:
        output = parts[0 if causal else 1](input_ids=tokens[None], use_cache=False)
    finally:
        for part in parts:
            part.set_attn_implementation(ATTENTION)
    return (output.logits if causal else output.last_hidden_state)[0]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
