"""Policy, reference, critic and reward model: Hugging Face folders in, Hugging Face folders out.

`CausalModel` and `ScalarModel` wrap unmodified transformers models. Both run the trunk over a packed batch and apply
their head to chosen rows only, so no logits and no values of prompt tokens are ever computed.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ..kernels.api import linear_logprobs
from .attention import ATTENTION, Attention, Varlen
from .batch import PackedBatch
from .config import RuntimeConfig
from .errors import InputError, first_line
from .exact import pad_to_tiles
from .linear import linear, speed_up, tiled_linear

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


@dataclass(frozen=True)
class Placement:
    """Device and precision of a model."""

    device: torch.device
    dtype: torch.dtype
    exact: bool = False
    """Arithmetic of `exact.py`."""

    @classmethod
    def of(cls, runtime: RuntimeConfig) -> Placement:
        """Resolve `auto`; raise InputError where the device does not exist."""
        name = runtime.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"RuntimeConfig.device = {runtime.device!r}: {str(error).splitlines()[0]}") from None
        if runtime.exact and device.type != "cpu":
            raise InputError(f"RuntimeConfig.exact = True is a mode of the CPU, and the device is {device}")
        if runtime.dtype == "auto":
            return cls(device, torch.float32 if device.type == "cpu" else torch.bfloat16, runtime.exact)
        return cls(device, getattr(torch, runtime.dtype), runtime.exact)


CPU = Placement(torch.device("cpu"), torch.float32)


class _Trunk(nn.Module):
    """The part that policy and critic share: the transformer under the head."""

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, *, exact: bool = False) -> None:
        super().__init__()
        # eval(): dropout anywhere would make old and new log-probs differ.
        self.model = model.eval()
        self.exact = exact
        speed_up(model)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

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
        return self.trunk(batch.tokens, batch.positions, Varlen(batch.lengths, exact=self.exact))


class CausalModel(_Trunk):
    """A causal language model: policy, reference, or the trunk that SFT trains."""

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


class ScalarModel(_Trunk):
    """A trunk with a bias-free scalar head: critic or reward model (a one-label sequence classifier)."""

    def read(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """float32 (float64 where the model is) scalars of the hidden states `[T, H]` at `rows`."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.index_select(0, rows).to(dtype), self.model.score.weight.to(dtype)).squeeze(-1)

    def values(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Values `[N]` of the states before each learned token, and `[S]` after each sequence's last token."""
        hidden = self.hidden(batch)
        return self.read(hidden, batch.rows), self.read(hidden, batch.last)

    def scores(self, batch: PackedBatch) -> Tensor:
        """`[S]` scalars at each sequence's last token."""
        return self.read(self.hidden(batch), batch.last)


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden W^T in float32 where they are halves: a logit of 20 rounded to bfloat16 is off by up to 0.06."""
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return linear(hidden, weight, None)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    tiles = [linear(hidden.float(), tile.float(), None) for tile in weight.split(4096)]  # no whole copy of the weight
    return torch.cat(tiles, 1)


Model = CausalModel | ScalarModel


def load_policy(folder: str | Path, placement: Placement = CPU) -> CausalModel:
    """A causal language model from a Hugging Face folder.

    Raises:
        InputError: no such folder, not a causal language model, or an architecture that packed batches do not fit.
    """
    _check_folder(folder)
    if _is_classifier(folder):
        raise InputError(f"{folder}: holds a sequence classifier, expected a causal language model")
    policy = CausalModel(_load(AutoModelForCausalLM, folder, placement), exact=placement.exact)
    _check_packing(policy, folder)
    return policy


def load_reward_model(folder: str | Path, placement: Placement = CPU) -> ScalarModel:
    """A one-label sequence classifier from a Hugging Face folder, as `ppomax rm` writes it.

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
    model = ScalarModel(loaded, exact=placement.exact)
    head = getattr(model.model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise InputError(f"{folder}: {type(model.model).__name__} has no bias-free linear head `score`, expected one")
    _check_packing(model, folder)
    return model


def load_critic(folder: str | Path, placement: Placement = CPU) -> ScalarModel:
    """A critic: the reward model in `folder`, or the trunk of the causal language model there with a zero head."""
    _check_folder(folder)
    if _is_classifier(folder):
        return load_reward_model(folder, placement)
    return scalar_from_causal(load_policy(folder, placement), std=0.0)


def scalar_from_causal(causal: CausalModel, std: float, generator: torch.Generator | None = None) -> ScalarModel:
    """Put a scalar head with N(0, std) weights on the trunk of `causal`, which the two then share."""
    config = type(causal.config).from_dict({**causal.config.to_dict(), "num_labels": 1})
    with torch.device("meta"):
        shell = AutoModelForSequenceClassification.from_config(config, attn_implementation=ATTENTION)
    base = causal.model.base_model
    setattr(shell, shell.base_model_prefix, base)
    weight = next(base.parameters())
    head = nn.Linear(config.get_text_config().hidden_size, 1, bias=False)
    with torch.no_grad():
        head.weight.normal_(0, 1, generator=generator).mul_(std)
    shell.score = head.to(device=weight.device, dtype=weight.dtype)
    return ScalarModel(shell, exact=causal.exact)


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


def _load(auto: Any, folder: str | Path, placement: Placement, **kwargs: Any) -> PreTrainedModel:
    try:
        model, info = auto.from_pretrained(
            str(folder),
            dtype=placement.dtype,
            attn_implementation=ATTENTION,
            local_files_only=True,
            output_loading_info=True,
            **kwargs,
        )
    except Exception as error:
        raise InputError(f"{folder}: not a model that transformers can load ({first_line(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{folder}: {len(missing)} weights are missing from the files, the first is {missing[0]}")
    if placement.device.type == "cpu":
        # Weights mapped from a file start at any address, and the last bit of a product depends on the alignment.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model.to(placement.device)


def _check_folder(folder: str | Path) -> None:
    if not (Path(folder) / "config.json").is_file():
        state = "holds no config.json" if Path(folder).is_dir() else "no such folder"
        raise InputError(f"{folder}: {state}, expected a Hugging Face model folder")


def _read_config(folder: str | Path) -> Any:
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder}/config.json: {first_line(error)}") from None


def _is_classifier(folder: str | Path) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in _read_config(folder).architectures or [])


@torch.no_grad()
def _check_packing(model: Model, folder: str | Path) -> None:
    """Run a short sequence in two packs and alone: raise InputError unless the engine computes what the model does.

    This catches what no configuration field tells for sure: layers that look across a sequence's start
    (convolutions, linear attention), attention of a kind unknown here (sinks, biases), and logits that are scaled or
    capped in a way unknown here.
    """
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 4, 5]], device=model.device)
    tokens %= model.model.get_input_embeddings().weight.shape[0]
    positions = torch.tensor([0, 1, 2, 0, 1], device=model.device)
    try:
        one, other = (model.trunk(pack, positions, Varlen([3, 2], exact=model.exact))[3:] for pack in tokens)
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


def _output_alone(model: Model, tokens: Tensor) -> Tensor:
    """What transformers computes for one sequence with its plain attention: logits, or hidden states under a score."""
    causal = isinstance(model, CausalModel)
    model.model.set_attn_implementation("eager")
    try:
        output = (model.model if causal else model.model.base_model)(input_ids=tokens[None], use_cache=False)
    finally:
        model.model.set_attn_implementation(ATTENTION)
    return (output.logits if causal else output.last_hidden_state)[0]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
