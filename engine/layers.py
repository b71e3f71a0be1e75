"""What is done to the decoder layers of an unmodified model: recomputation in the backward pass, torch.compile, and
Liger's fused operations. All of it is put on the instances; other models of the class stay as they are.

Packed sequences, in training and scoring, take compiled layers; sampling never does. Recomputation acts where
gradients are taken. Neither holds anything of the weights, so both stay valid when these are updated in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Varlen
from .errors import InputError
from .linear import is_tiled, tiled_linear

_BACKEND = "inductor"
_MAX_GRAPHS = 64
# Products of matrices and fused attention, forward: what selective checkpointing keeps.
_KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "mkldnn::_linear_pointwise",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
        "ppomax::attention_one_by_one",
    }
)


@dataclass(frozen=True)
class LayerOptions:
    """The fields of `RuntimeConfig` of these names."""

    checkpointing: str = "none"
    compile: bool = False
    liger: bool = False


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model, first to last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def prepare_layers(model: PreTrainedModel, options: LayerOptions) -> None:
    """Give the model's decoder layers what `options` say; those that have it already keep it.

    Raises:
        InputError: transformers marks no decoder layers in this model, or Liger does not know it.
    """
    if options.liger:
        use_liger(model)
    if options.checkpointing == "none" and not options.compile:
        return
    layers = decoder_layers(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no decoder layers that can be checkpointed or compiled")
    for layer in layers:
        if "forward" not in vars(layer):
            layer.forward = MethodType(_forward(options.checkpointing, options.compile), layer)


@cache
def _forward(checkpointing: str, compiled: bool) -> Callable[..., Tensor]:
    """A layer's `forward`."""

    def forward(layer: nn.Module, hidden: Tensor, *others: Any, **options: Any) -> Tensor:
        run = _compiled() if compiled and isinstance(options.get("attention"), Varlen) else _run
        return run(checkpointing, layer, hidden, *others, **options)

    return forward


@cache
def _compiled() -> Callable[..., Tensor]:
    """`_run`, compiled once for each kind of layer: for all layers of that kind and any number of tokens."""
    # One kind takes two, with and without gradients; several models in a process are several kinds. Beyond: an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    return torch.compile(_run, backend=_BACKEND, dynamic=True, fullgraph=True)


def _run(checkpointing: str, layer: nn.Module, hidden: Tensor, *others: Any, **options: Any) -> Tensor:
    def layer_forward(hidden: Tensor) -> Tensor:
        return type(layer).forward(layer, hidden, *others, **options)

    if checkpointing == "none" or not torch.is_grad_enabled():
        return layer_forward(hidden)
    # What is computed again is computed outside of the caller's context.
    call = tiled_linear()(layer_forward) if is_tiled() else layer_forward
    again = partial(checkpoint, call, hidden, use_reentrant=False, preserve_rng_state=False)
    return again(context_fn=_keep_products) if checkpointing == "selective" else again()


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def check_liger(device: torch.device) -> None:
    """Raise InputError where Liger's kernels are not installed or do not run on the device."""
    if not find_spec("liger_kernel"):
        raise InputError("RuntimeConfig.liger = True needs liger-kernel: pip install 'ppomax[liger]'")
    if device.type != "cuda":
        raise InputError(f"RuntimeConfig.liger = True runs on a GPU, and the device is {device}")


def use_liger(model: PreTrainedModel) -> None:
    """Have this model's norms, rotary embeddings and gated feed-forwards run Liger's kernels.

    Liger changes the architecture's Python module as well, for all models of the class: that is undone. Its rotary
    embedding, a function of that module, is bound to this model's attention layers alone.

    Raises:
        InputError: an architecture that Liger does not know.
    """
    patches = import_module("liger_kernel.transformers.monkey_patch")
    kind = model.config.model_type
    if kind not in patches.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(f"RuntimeConfig.liger = True: Liger has no kernels for the architecture {kind!r}")
    source = import_module(type(model).__module__)
    plain: Any = vars(source).get("apply_rotary_pos_emb")
    with _restored(source):
        patches._apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
        fused: Any = vars(source).get("apply_rotary_pos_emb")
    if fused is not plain:
        for layer in decoder_layers(model):
            _bind_rotary(layer.self_attn, fused)


@contextmanager
def _restored(module: ModuleType) -> Iterator[None]:
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def _bind_rotary(attention: Any, fused: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Give one attention layer a `forward` that finds `fused` where its class finds `apply_rotary_pos_emb`."""

    def rotate(q: Tensor, k: Tensor, *angles: Any, **options: Any) -> tuple[Tensor, Tensor]:
        # Liger writes into q and k, which are outputs of products that selective checkpointing may keep.
        return fused(q.clone(), k.clone(), *angles, **options)

    plain = type(attention).forward
    names = {**plain.__globals__, "apply_rotary_pos_emb": rotate}
    forward = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    forward.__kwdefaults__ = plain.__kwdefaults__
    attention.forward = MethodType(forward, attention)
