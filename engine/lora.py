"""LoRA: policy and critic as adapters on one frozen base, which is also the reference.

The three are trees of modules of their own over the same base parameters. So the base is in memory once, and no
adapter is ever switched on or off: a backward pass, a layer recomputed in it, or a captured graph belongs to one model
whatever ran in between. Adapters have the base's dtype; where that is bfloat16 the optimizer keeps their float32
masters (`low_memory.py`), as it does for full weights, and no activation is cast. Of several processes each has the
base whole, and they sum the adapters' gradients.
"""

from __future__ import annotations

import copy
import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import LoRAConfig
from .errors import InputError, first_line
from .linear import speed_up
from .models import CausalModel, Model, ScalarModel, scalar_from_causal
from .parallel import Ranks

_NAME = "default"  # of the adapter of a tree; peft's files do not mention it
_WEIGHTS = "adapter_model.safetensors"

AnyModel = TypeVar("AnyModel", CausalModel, ScalarModel, nn.Module)


def check_lora(config: LoRAConfig, critic: str) -> None:
    """Raise InputError where adapters cannot be trained; `critic` is the folder that the critic shall start from."""
    if find_spec("peft") is None:
        raise InputError(f"LoRAConfig.rank = {config.rank} needs the package peft: pip install 'ppomax[lora]'")
    if critic:
        raise InputError(
            f"critic = {critic!r} cannot be used with LoRAConfig.rank = {config.rank}: the critic is an adapter on the "
            "policy's own base and starts with a zero head"
        )


def adapt(
    base: CausalModel, config: LoRAConfig, seed: int, checkpoint: Path | None = None
) -> tuple[CausalModel, CausalModel, ScalarModel]:
    """(policy, reference, critic) from the policy that a run starts from, trained as far as `checkpoint` has them."""
    policy, critic = add_adapters(base, config, seed)
    if checkpoint:
        load_adapter(policy, checkpoint / "policy")
        load_adapter(critic, checkpoint / "critic")
    return policy, base, critic


def add_adapters(base: CausalModel, config: LoRAConfig, seed: int) -> tuple[CausalModel, ScalarModel]:
    """(policy, critic) as adapters on `base`, which is frozen and stays as it is: the reference.

    Both compute what `base` does until they are trained, the critic under a head of zeros.

    Raises:
        InputError: a target that is no linear layer of the decoder.
    """
    generator = torch.Generator().manual_seed(seed)
    policy, critic = _twin(base), scalar_from_causal(_twin(base), std=0.0, generator=generator)
    for model in (policy, critic):
        _inject(model, config, base.config.name_or_path)
        _draw(model, generator)
        speed_up(model.model)
    critic.model.score.requires_grad_(True)
    return policy, critic


def has_adapter(model: Model) -> bool:
    """Whether the model was made by `add_adapters`."""
    return hasattr(model.model, "peft_config")


def sum_gradients(model: Model, ranks: Ranks) -> None:
    """Over the processes, in at least float32. Each process has the base and the adapters whole."""
    if ranks.size == 1 or not has_adapter(model):
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    dtype = torch.promote_types(trained[0].dtype, torch.float32)
    own = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().to(dtype) for p in trained]
    for p, grad in zip(trained, ranks.sum(torch.cat(own)).split([p.numel() for p in trained]), strict=True):
        p.grad = grad.view_as(p).to(p.dtype)


def save_adapter(model: Model, folder: Path) -> None:
    """Write the adapter, and a critic's head, to an empty folder that peft loads."""
    state = {name: parameter.detach().cpu().contiguous() for name, parameter in _trained(model).items()}
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    model.model.peft_config[_NAME].save_pretrained(folder)


@torch.no_grad()
def load_adapter(model: Model, folder: Path) -> None:
    """Take over what `save_adapter` wrote.

    Raises:
        InputError: no adapter there, or one of another shape.
    """
    try:
        state = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: holds no adapter ({first_line(error)})") from None
    trained = _trained(model)
    if _shapes(state) != _shapes(trained):
        raise InputError(f"{folder}: the adapter there is of other layers, or of another rank, than this run's")
    for name, parameter in trained.items():
        parameter.copy_(state[name])


@torch.no_grad()
def merged(model: Model) -> Model:
    """`model` without its adapter: weights with their update added in at least float32, rounded once, in host memory.

    The other weights are those of `model`, which is left as it is.
    """
    plain: Any = _twin(model)
    del plain.model.peft_config
    for name, layer in _adapted_layers(plain.model):
        inner = layer.get_base_layer()
        inner.weight = nn.Parameter(_merged_weight(layer).cpu(), requires_grad=False)
        plain.model.set_submodule(name, inner)
    return plain


def _merged_weight(layer: Any) -> Tensor:
    weight = layer.get_base_layer().weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = layer.lora_A[_NAME].weight.to(dtype), layer.lora_B[_NAME].weight.to(dtype)
    update = layer.scaling[_NAME] * (b @ a)
    return (weight.to(dtype) + (update.t() if layer.fan_in_fan_out else update)).to(weight.dtype)


def _twin(model: AnyModel) -> AnyModel:
    """A copy of the modules over the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def _inject(model: Model, config: LoRAConfig, folder: str) -> None:
    """Put an adapter without memory on the linear layers of the model, which comes from `folder`; freeze the rest."""
    from peft import LoraConfig, inject_adapter_in_model

    causal = isinstance(model, CausalModel)
    settings = LoraConfig(
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",
        base_model_name_or_path=folder,
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rslora,
        target_modules=_targets(model, config),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.device("meta"):
        inject_adapter_in_model(settings, model.model, _NAME)
    settings.modules_to_save = None if causal else ["score"]


@torch.no_grad()
def _draw(model: Model, generator: torch.Generator) -> None:
    """Give a new adapter its memory: B is zero, A uniform as in every new `nn.Linear`, the same on all devices."""
    for _, layer in _adapted_layers(model):
        weight = layer.get_base_layer().weight
        for part in (layer.lora_A[_NAME], layer.lora_B[_NAME]):
            part.weight = nn.Parameter(torch.zeros(part.weight.shape, dtype=weight.dtype, device=weight.device))
        bound = layer.in_features**-0.5
        a = layer.lora_A[_NAME].weight
        a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))


def _targets(model: Model, config: LoRAConfig) -> list[str]:
    """The last parts of the names of the linear layers that get an adapter."""
    linear = (nn.Linear, Conv1D)
    names = {
        name.rpartition(".")[2] for name, module in model.model.base_model.named_modules() if isinstance(module, linear)
    }
    if "all-linear" in config.targets:
        return sorted(names)
    for target in config.targets:
        if target not in names:
            raise InputError(
                f"LoRAConfig.targets: {type(model.model).__name__} has no linear layer {target!r} in its decoder, "
                f"expected some of {', '.join(sorted(names))}, or all-linear"
            )
    return sorted(config.targets)


def _adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _trained(model: Model) -> dict[str, nn.Parameter]:
    """What is trained, under the names that peft's files have."""
    named = model.model.named_parameters()
    return {f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": p for name, p in named if p.requires_grad}


def _shapes(state: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
