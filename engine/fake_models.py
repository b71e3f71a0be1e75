"""The models of a run without contents: built from their configurations, computing only shapes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from .attention import ATTENTION, Varlen
from .config import LoRAConfig
from .errors import InputError, first_line
from .lora import add_adapters
from .models import CausalModel, Model, Placement, ScalarModel

AnyModel = TypeVar("AnyModel", CausalModel, ScalarModel)
JUDGES = ("reward", "judge")


@dataclass(frozen=True)
class Shapes:
    """The transformers configurations of a run's models, as JSON."""

    policy: str
    critic: str | None = None
    """None: the policy's trunk"""
    reward: str | None = None
    """None: a function, which has no weights"""
    judge: str | None = None
    """None: there is none, or it is a function or the reward model"""

    @classmethod
    def of(cls, policy: Any, critic: Any = None, reward: Any = None, judge: Any = None) -> Shapes:
        """From configuration objects."""
        return cls(_text(policy), *(None if config is None else _text(config) for config in (critic, reward, judge)))


def _text(config: Any) -> str:
    return str(config.to_json_string(use_diff=False))


@dataclass(frozen=True)
class Models:
    """Those of a run."""

    policy: CausalModel
    critic: ScalarModel
    reference: CausalModel
    reward: ScalarModel | None
    judge: ScalarModel | None

    def all(self) -> dict[str, Model]:
        """By name, those that there are."""
        return {name: model for name, model in vars(self).items() if model is not None}


def build(shapes: Shapes, place: Placement, lora: LoRAConfig) -> Models:
    """The models, on the device of `place`; to be called under `FakeTensorMode`."""
    judges = [_scalar(text, place) if text else None for text in (shapes.reward, shapes.judge)]
    if lora.rank:
        base = _causal(shapes.policy, place)
        policy, critic = add_adapters(base, lora, seed=0)
        return Models(policy, critic, base, *judges)
    critic = _scalar(shapes.critic or shapes.policy, place)
    return Models(_causal(shapes.policy, place), critic, _causal(shapes.policy, place), *judges)


def weights(models: Models, *, shared: bool) -> dict[str, int]:
    """Bytes of each model; what several share (`shared`: with LoRA the base) counts with the first that has it."""
    by_name = models.all()
    order = sorted(by_name, key=lambda name: name != "reference") if shared else list(by_name)
    seen: set[int] = set()
    sizes = {}
    for name in order:
        tensors = {id(x): x for x in (*by_name[name].parameters(), *by_name[name].buffers())}
        sizes[name] = sum(x.nbytes for key, x in tensors.items() if key not in seen)
        seen |= tensors.keys()
    return sizes


def products(model: Model) -> int:
    """Parameters of the matrices in the trunk, the embedding table left out."""
    table = model.model.get_input_embeddings().weight
    return sum(p.numel() for p in model.model.base_model.parameters() if p.ndim >= 2 and p is not table)


def _causal(text: str, place: Placement) -> CausalModel:
    return _at_once(CausalModel(_build(AutoModelForCausalLM, text, place), place))


def _scalar(text: str, place: Placement) -> ScalarModel:
    return _at_once(ScalarModel(_build(AutoModelForSequenceClassification, text, place, num_labels=1), place))


def _at_once(model: AnyModel) -> AnyModel:
    """On a CPU, where a call a sequence allocates what one call for all of them does, make that one call."""
    text, place = model.config.get_text_config(), model.placement
    special = [getattr(text, name, None) for name in ("sliding_window", "attn_logit_softcapping")]
    if place.device.type == "cpu" and not place.exact and special == [None, None]:
        model.packed = lambda lengths: Varlen([sum(lengths)])  # type: ignore[method-assign]
    return model


def _build(auto: Any, text: str, place: Placement, **values: Any) -> Any:
    config = AutoConfig.for_model(**{**json.loads(text), **values})
    if place.device.type == "meta":
        config.get_text_config().attn_logit_softcapping = None  # torch's kernel has none; it takes no memory
    try:
        with torch.device("meta"):
            model = auto.from_config(config, attn_implementation=ATTENTION, dtype=place.dtype)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{type(config).__name__}: not a model that can be planned ({first_line(error)})") from None
    return _filled(model, place.device)


def _filled(model: nn.Module, device: torch.device) -> nn.Module:
    """`model`, which is on "meta", with fake tensors on `device` for its own; what is tied stays so."""
    fresh: dict[int, Any] = {}

    def new(x: Tensor) -> Tensor:
        if id(x) not in fresh:
            made = torch.empty(x.shape, dtype=x.dtype, device=device)
            fresh[id(x)] = nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made
        return fresh[id(x)]

    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            table.update({name: new(x) for name, x in table.items() if x is not None})
    return model
