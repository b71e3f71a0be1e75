"""Weights between files and a device: read tensor by tensor with one file open at a time, written file by file.

Host memory beyond the model itself stays within one file (shard) and the few tensors that are on their way. A model
that several processes will share is not read when it is loaded: it is mapped, and each of its layers is read when it
arrives at the process's device (`arrive`).
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .attention import ATTENTION
from .errors import InputError
from .stored import StoredWeights

SHARD_SIZE = "5GB"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
Module = TypeVar("Module", bound=nn.Module)


class _Pending:
    """A stored tensor in the shape of safetensors' slices: transformers reads it, with [...], when its turn comes."""

    def __init__(self, stored: StoredWeights, name: str, detached: torch.dtype | None) -> None:
        """`detached`: the dtype of tensors to copy, see `_detached`."""
        self.stored, self.name, self.detached = stored, name, detached

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self.stored.read(self.name, index)
        return _detached(tensor) if tensor.dtype == self.detached else tensor


def _detached(tensor: Tensor) -> Tensor:
    """A copy of what was read, where nothing else (another device, another precision) asks for one.

    A view would keep the file mapped. And files hold tensors at any address, while the last bit of a product on a CPU
    depends on the alignment.
    """
    return tensor.clone()


def load_pretrained(
    auto: Any, folder: str | Path, device: torch.device, dtype: torch.dtype, *, mapped: bool = False, **options: Any
) -> Any:
    """`auto.from_pretrained`, straight onto `device` in `dtype`, with the files read by `StoredWeights`.

    `options` go into the configuration. Parameters are in `dtype`; buffers (rotary frequencies) are as a new model has
    them. With `mapped` parameters are views into the files instead, in the files' own precision where that is one
    (unless the model keeps weights in float32 by itself), until they `arrive`.

    Raises:
        InputError: files that are missing or broken, weights that are missing, weights of a wrong shape; with `mapped`
            a model that keeps weights in several precisions.
    """
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, **options)
    stored = StoredWeights(folder)
    # A class of transformers takes tensors in the place of a folder, its auto classes do not.
    shell = empty_model(auto, config, dtype)
    if mapped:
        device = torch.device("cpu")
        if not shell._keep_in_fp32_modules_strict:  # which only the dtype asked for tells from the others
            dtype = stored.dtype or dtype
    detached = dtype if device.type == "cpu" and not mapped else None
    model, info = type(shell).from_pretrained(
        None,
        config=shell.config,
        state_dict={name: _Pending(stored, name, detached) for name in stored.entries},
        dtype=dtype,
        device_map=None if device.type == "cpu" else {"": device},
        attn_implementation=ATTENTION,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below
    )
    stored.close()
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise InputError(_wrong_shape(stored, name, found, expected))
    if missing := sorted(info["missing_keys"]):
        raise InputError(_missing(stored, missing))
    if more := sorted(_of_more_layers(info["unexpected_keys"], model)):
        raise InputError(f"{stored.folder}: the files hold {more[0]}, but config.json has no such layer")
    if mapped:
        only_dtype(model, f"{folder}: ")
    if detached:
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.dtype != dtype:  # kept in a precision of their own
                tensor.data = _detached(tensor.data)
    model.config.name_or_path = str(folder)
    if model.can_generate():
        model.generation_config = _generation_config(folder)
    return model


def _generation_config(folder: str | Path) -> GenerationConfig:
    """As transformers finds it: older models have it in the model's configuration."""
    if (Path(folder) / GENERATION_CONFIG_NAME).is_file():
        return GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return GenerationConfig.from_pretrained(str(folder), "config.json", _from_model_config=True, local_files_only=True)


def _wrong_shape(stored: StoredWeights, name: str, found: Sequence[int], expected: Sequence[int]) -> str:
    file = stored.entries[name].file if name in stored.entries else stored.folder
    return f"{file}: {name} has the shape {list(found)}, expected {list(expected)}"


def _missing(stored: StoredWeights, names: Sequence[str]) -> str:
    return f"{stored.folder}: {len(names)} weights are missing from the files, the first is {names[0]}"


def _of_more_layers(unexpected: Iterable[str], model: nn.Module) -> list[str]:
    """Stored weights that only their numbers tell from the model's own."""
    known = {_NUMBER.sub("*", name) for name in model.state_dict()}
    return [name for name in unexpected if _NUMBER.sub("*", name) in known]


def empty_model(auto: Any, config: Any, dtype: torch.dtype) -> Any:
    """A new model of a configuration: parameters on the meta device in `dtype`, buffers real, on the CPU."""
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    model.tie_weights()
    return model


# In memory


def copy_of(model: Module, *, shared: bool = False) -> Module:
    """A model of its own with the same weights, on the same device, to be trained where `model` is frozen.

    `shared`: over the same memory, for weights that wait in their files until they `arrive`.
    """
    memory = {id(p): nn.Parameter(p.detach()) for p in model.parameters()} if shared else {}
    return copy.deepcopy(model, memory).requires_grad_(True)


def arrive(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give what the module has, but for what is sharded already, memory of its own on `device`, parameters in `dtype`.
    What is tied stays so."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device, dtype, copy=True)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device, copy=True)


def only_dtype(model: nn.Module, place: str = "") -> torch.dtype:
    """Of all weights, which FSDP2 gathers as one tensor. InputError, beginning with `place`, where it is not one."""
    first, *others = model.named_parameters()
    for name, parameter in others:
        if parameter.dtype != first[1].dtype:
            raise InputError(
                f"{place}{name} is in {parameter.dtype}, {first[0]} in {first[1].dtype}: expected one precision of all "
                "weights where several processes share them"
            )
    return first[1].dtype


def cast(model: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """Move a model, its parameters in `dtype`. `model.to(dtype)` would round its buffers (rotary frequencies) too."""
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


# Out


def save_weights(model: PreTrainedModel, folder: Path, *, max_shard_size: str = SHARD_SIZE, write: bool = True) -> None:
    """Write configuration and safetensors that `from_pretrained` loads, file by file, tied weights once.

    Weights that are sharded (DTensor) are gathered tensor by tensor: each process of the mesh has to call this, and
    one of them writes (`write`).
    """
    weights = model.state_dict()
    if not any(isinstance(weight, DTensor) for weight in weights.values()):
        if write:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    if write:
        model.save_pretrained(folder, state_dict={})  # all but the weights
    _save_sharded(model, folder, max_shard_size, write)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a model folder: safetensors and their index."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*-of-*.safetensors")
    return [path for name in names for path in folder.glob(name)]


def _without_ties(model: PreTrainedModel) -> dict[str, Tensor]:
    """Stored tensors by name; of tied ones the first, which transformers keeps too."""
    once: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (name, tensor.detach()))
    return dict(once.values())


def _save_sharded(model: PreTrainedModel, folder: Path, max_shard_size: str, write: bool) -> None:
    weights = _without_ties(model)
    whole = {name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, weight in weights.items()}
    plan = split_torch_state_dict_into_shards(whole, max_shard_size=max_shard_size)
    places: dict[str, str] = {}
    for file, names in plan.filename_to_tensors.items():
        shard = {}
        for name in names:
            tensor = weights[name]
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if write:
                shard[name] = tensor.cpu().contiguous()
        if write:
            stored = revert_weight_conversion(model, shard)  # names and shapes of files: experts one by one
            save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / file, {"format": "pt"})
            places |= dict.fromkeys(stored, file)
    if write and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": places}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
