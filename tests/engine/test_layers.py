"""Checkpointing, compilation and Liger's kernels change neither results nor other models."""

from __future__ import annotations

import copy
import importlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from ppomax.engine import layers
from ppomax.engine.attention import ATTENTION
from ppomax.engine.batch import PackedBatch, pack
from ppomax.engine.config import OptimConfig, RolloutConfig, RuntimeConfig
from ppomax.engine.errors import InputError
from ppomax.engine.layers import LayerOptions, check_liger, decoder_layers, prepare_layers, use_liger
from ppomax.engine.models import CPU, CausalModel, Placement, scalar_from_causal
from ppomax.engine.optim import Optimizer
from ppomax.engine.presets import PRESETS, preset
from ppomax.engine.rollout import RolloutEngine
from ppomax.engine.trainer import PPOTrainer
from torch import Tensor
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

HOST = torch.device("cpu")
MODES = ["none", "selective", "layer"]
PRODUCTS = {"aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"}
checkpointed = pytest.mark.parametrize("mode", ["selective", "layer"])


def batch_of(*lengths: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = [torch.randint(2, 61, (length,), generator=generator).tolist() for length in lengths]
    return pack(tokens, [[False] + [True] * (length - 1) for length in lengths], HOST)


def loss_of(model: Any, batch: PackedBatch) -> Tensor:
    outputs = model.logprobs(batch) if isinstance(model, CausalModel) else model.values(batch)
    return sum(output.square().sum() for output in outputs)  # type: ignore[return-value]


def gradients(model: Any, batch: PackedBatch) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def prepared(new_policy: Any, family: str = "llama", exact: bool = False, **options: Any) -> CausalModel:
    return CausalModel(new_policy(family).model, replace(CPU, exact=exact, layers=LayerOptions(**options)))


class Watch(TorchDispatchMode):
    """Counts operations, and the bytes of their results that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        self.calls[operation.name()] += 1
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    @property
    def live_bytes(self) -> int:
        return sum(size for storage, size in self.storages.values() if not storage.expired())


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "gemma2"])
@checkpointed
def test_gradients_have_the_same_bits(family: str, mode: str, new_policy: Any) -> None:
    """With and without oneDNN's product, which takes 16 rows; qwen2's products are followed by a bias."""
    ours, plain = prepared(new_policy, family, checkpointing=mode), new_policy(family)
    for batch in (batch_of(20, 1, 9), batch_of(5)):
        expected = gradients(plain, batch)
        assert any(gradient.abs().max() > 0 for gradient in expected.values())
        for name, gradient in gradients(ours, batch).items():
            assert torch.equal(gradient, expected[name]), name


@checkpointed
def test_gradients_of_a_critic(mode: str, new_policy: Any) -> None:
    """Its trunk is the policy's: what is done to it once is not done again."""
    policy = prepared(new_policy, checkpointing=mode)
    before = [layer.forward for layer in decoder_layers(policy)]
    critic = scalar_from_causal(policy, std=0.3, generator=torch.Generator().manual_seed(0))
    assert [layer.forward for layer in decoder_layers(critic)] == before
    plain = scalar_from_causal(new_policy(), std=0.3, generator=torch.Generator().manual_seed(0))
    expected = gradients(plain, batch_of(20, 9))
    assert all(torch.equal(g, expected[name]) for name, g in gradients(critic, batch_of(20, 9)).items())


def test_each_mode_keeps_less(new_policy: Any) -> None:
    batch, kept, watches = batch_of(20, 33, 9), {}, {}
    for mode in MODES:
        model = prepared(new_policy, checkpointing=mode)
        with Watch() as watches[mode]:
            hidden = model.hidden(batch)
            kept[mode] = watches[mode].live_bytes
        assert hidden.requires_grad
    assert kept["none"] > 1.5 * kept["selective"] > 1.5 * kept["layer"]


def test_what_is_computed_again(new_policy: Any) -> None:
    """Selective: no product of matrices and no attention, but norms. Whole layers: all of it."""
    batch, calls = batch_of(20, 33, 9), {}
    for mode in MODES:
        loss = loss_of(prepared(new_policy, checkpointing=mode), batch)
        with Watch() as watch:
            loss.backward()
        attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
        products = sum(watch.calls[name] for name in PRODUCTS)
        calls[mode] = {"products": products, "attention": watch.calls[attention], "norms": watch.calls["aten::rsqrt"]}
    assert calls["none"] == {**calls["none"], "attention": 0, "norms": 0}
    assert calls["selective"] == {**calls["none"], "norms": 2 * 2}
    assert calls["layer"]["products"] == calls["none"]["products"] + 2 * 7
    assert calls["layer"]["attention"] == 2 * 3


@checkpointed
def test_without_gradients_nothing_is_kept_for_later(mode: str, new_policy: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(layers, "checkpoint", lambda *_, **__: pytest.fail("called"))
    with torch.no_grad():
        prepared(new_policy, checkpointing=mode).hidden(batch_of(5, 3))


@checkpointed
def test_exact_arithmetic_is_computed_again_exactly(mode: str, new_policy: Any) -> None:
    plain, ours = (prepared(new_policy, exact=True, checkpointing=name) for name in ("none", mode))
    expected = gradients(plain, batch_of(20, 9))
    assert all(torch.equal(g, expected[name]) for name, g in gradients(ours, batch_of(20, 9)).items())
    rough = gradients(new_policy(), batch_of(20, 9))
    assert not all(torch.equal(rough[name], expected[name]) for name in rough), "the mode matters here"


@pytest.mark.parametrize("lora", [0, 4], ids=["full", "lora"])
def test_a_whole_iteration_has_the_same_bits(
    lora: int, policy_folder: Any, reward_folder: Any, world_files: Any, small_config: Any
) -> None:
    if lora:
        pytest.importorskip("peft")
    found = []
    for mode in MODES:
        changes: dict[str, Any] = {"iterations": 1, "critic_pretrain_iterations": 0, "eval_every": 0}
        changes |= {"runtime": {"checkpointing": mode}, "lora": {"rank": lora}}
        trainer = PPOTrainer(small_config("ppo", **changes), policy_folder, reward_folder, world_files["prompts"])
        (step,) = trainer
        metrics = {name: value for name, value in step.metrics.items() if not name.startswith("time/")}
        found.append((metrics, trainer.ppo.policy.state_dict(), trainer.ppo.critic.state_dict()))
    for metrics, *states in found[1:]:
        assert metrics == found[0][0]
        for state, expected in zip(states, found[0][1:], strict=True):
            assert all(torch.equal(weight, expected[name]) for name, weight in state.items())


def test_a_copy_runs_its_own_layers(new_policy: Any) -> None:
    model = prepared(new_policy, checkpointing="layer")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin.hidden(batch_of(5)).abs().max() > 0


@checkpointed
def test_layers_that_are_called_with_several_positions(mode: str) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = CausalModel(AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION))
    ours = CausalModel(copy.deepcopy(plain.model), replace(CPU, layers=LayerOptions(mode)))
    expected = gradients(plain, batch_of(20, 9))
    for name, gradient in gradients(ours, batch_of(20, 9)).items():
        assert torch.equal(gradient, expected[name]), name


def test_a_model_without_marked_layers() -> None:
    with pytest.raises(InputError, match="Linear has no decoder layers that can be checkpointed"):
        prepare_layers(torch.nn.Linear(2, 2), LayerOptions("layer"))  # type: ignore[arg-type]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled, and nothing that is stays so."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    layers._compiled.cache_clear()
    yield
    layers._compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    """Layers are traced, forward and backward, without code being generated, which takes long."""
    monkeypatch.setattr(layers, "_BACKEND", "aot_eager")


def graphs() -> int:
    """How many have been compiled."""
    return counters["stats"]["unique_graphs"]


BATCHES = [(20, 5, 33), (7, 9), (11,), (30, 2, 2, 2, 9)]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.slow), "selective"])
def test_compiled_layers(mode: str, new_policy: Any) -> None:
    """Two layers and batches of all sizes share a graph with gradients and one without, also after an update of the
    weights in place; sampling takes neither."""
    ours, plain = prepared(new_policy, checkpointing=mode, compile=True), new_policy()
    for lengths in BATCHES:
        assert_close(gradients(ours, batch_of(*lengths)), gradients(plain, batch_of(*lengths)))
    assert graphs() == 1
    with torch.no_grad():
        for model in (ours, plain):
            for parameter in model.parameters():
                parameter.mul_(1.1)
        for lengths in BATCHES:
            hidden, expected = (model.hidden(batch_of(*lengths)) for model in (ours, plain))
            torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert_close(gradients(ours, batch_of(9, 9)), gradients(plain, batch_of(9, 9)))
    assert graphs() == 2
    config = RolloutConfig(max_response=4, temperature=0.0, max_running=2)
    RolloutEngine(ours, config, [1], 16).generate([[5, 6, 7], [8]], [0, 1])
    assert graphs() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_updates_leave_weights_where_graphs_find_them(moments: Any, dtype: torch.dtype, new_policy: Any) -> None:
    """CUDA graphs hold the addresses of weights, compiled layers take them as they come."""
    policy = new_policy(dtype=dtype, hidden_size=256, intermediate_size=256, vocab_size=256)  # whole 8-bit blocks
    optimizer = Optimizer(policy, OptimConfig(lr=1e-2, moments=moments), 2, None)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in policy.named_parameters()}
    for _ in range(2):
        loss_of(policy, batch_of(5, 3)).backward()
        optimizer.step()
    for name, parameter in policy.named_parameters():
        address, value = before[name]
        assert parameter.data_ptr() == address, name
        assert not torch.equal(parameter, value), name


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode"), [("gemma2", "layer"), *(("llama", mode) for mode in MODES)])
@pytest.mark.usefixtures("fresh_compiler")
def test_layers_in_generated_code(family: str, mode: str, new_policy: Any) -> None:
    ours, plain = prepared(new_policy, family, checkpointing=mode, compile=True), new_policy(family)
    for lengths in BATCHES:
        assert_close(gradients(ours, batch_of(*lengths)), gradients(plain, batch_of(*lengths)))


@pytest.mark.usefixtures("traced")
def test_compiled_layers_on_flash_attention(new_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds and the longest sequence come from the batch and are no constants of the graph."""
    from ppomax.engine import attention

    def kernel(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, **options: Any) -> Tensor:
        options.pop("deterministic")
        out = attention._one_by_one(q, k, v, bounds, *options.values())
        return out + 0 * longest

    monkeypatch.setattr(attention, "packed", lambda _: kernel)
    placement = replace(CPU, attention="torch", layers=LayerOptions("layer", compile=True))
    ours, plain = CausalModel(new_policy().model, placement), new_policy()
    for lengths in BATCHES:
        assert_close(gradients(ours, batch_of(*lengths)), gradients(plain, batch_of(*lengths)))
    assert graphs() == 1


@pytest.fixture
def interpreted_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's kernels in Triton's interpreter, which lacks what they use of libdevice, and types of plain floats."""
    pytest.importorskip("liger_kernel")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    with pytest.MonkeyPatch.context() as patch:  # settled while the kernels are imported
        patch.setenv("TRITON_INTERPRET", "1")
        for name in ("triton.experimental.gluon", "liger_kernel.transformers"):
            importlib.import_module(name)
        rsqrt, tanh = _interpreted(_rsqrt), _interpreted(_tanh)
    import liger_kernel.ops.geglu as geglu
    import liger_kernel.ops.rms_norm as rms_norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._implicit_cvt

    def convert(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return plain(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    monkeypatch.setattr(rms_norm, "rsqrt", rsqrt)
    monkeypatch.setattr(geglu, "tanh", tanh)


def _rsqrt(x):  # type: ignore[no-untyped-def]
    return 1 / tl.sqrt(x)  # type: ignore[name-defined]  # noqa: F821


def _tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1  # type: ignore[name-defined]  # noqa: F821


def _interpreted(function: Any) -> Any:
    import triton
    import triton.language as tl

    function.__globals__["tl"] = tl
    return triton.jit(function)


@pytest.mark.usefixtures("interpreted_liger")
@pytest.mark.parametrize(("family", "mode"), [("llama", "none"), ("llama", "selective"), ("gemma2", "none")])
def test_ligers_kernels(family: str, mode: str, new_policy: Any) -> None:
    """Against the plain model; the model of the same class beside it stays plain."""
    ours, plain = new_policy(family), new_policy(family)
    batch, expected = batch_of(9, 4), gradients(plain, batch_of(9, 4))
    norm, attention = (type(decoder_layers(plain)[0].get_submodule(name)) for name in ("input_layernorm", "self_attn"))
    before = (norm.forward, attention.forward, plain.hidden(batch).detach())
    module = importlib.import_module(attention.__module__)
    names = dict(vars(module))
    use_liger(ours.model)
    prepare_layers(ours.model, LayerOptions(mode))
    assert dict(vars(module)) == names
    assert (norm.forward, attention.forward) == before[:2]
    assert torch.equal(plain.hidden(batch), before[2])
    ran = {type(node).__name__ for node in _nodes(ours.hidden(batch).grad_fn)}
    if mode == "none":
        assert {"LigerRMSNormFunctionBackward", "LigerRopeFunctionBackward"} <= ran
        assert {"LigerSiLUMulFunctionBackward", "LigerGELUMulFunctionBackward"} & ran
    torch.testing.assert_close(ours.hidden(batch), before[2], rtol=0, atol=1e-5 * float(before[2].abs().max()))
    assert_close(gradients(ours, batch), expected)


def _nodes(root: Any) -> set[Any]:
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return seen


def test_liger_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"liger = True needs liger-kernel: pip install 'ppomax\[liger\]'"):
        check_liger(torch.device("cuda"))


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_liger_needs_a_gpu_and_a_known_model(new_model: Any) -> None:
    check_liger(torch.device("cuda"))
    with pytest.raises(InputError, match="liger = True runs on a GPU, and the device is cpu"):
        Placement.of(RuntimeConfig(device="cpu", liger=True))
    model = new_model()
    model.config.model_type = "unheard"
    with pytest.raises(InputError, match="Liger has no kernels for the architecture 'unheard'"):
        use_liger(model)


@pytest.mark.parametrize("pair", [("exact", "compile"), ("exact", "liger"), ("compile", "liger")], ids="-".join)
def test_what_excludes_each_other(pair: tuple[str, str]) -> None:
    with pytest.raises(InputError, match=rf"RuntimeConfig\.{pair[1]} = True: expected False with {pair[0]} = True"):
        RuntimeConfig(**dict.fromkeys(pair, True))  # type: ignore[arg-type]


def test_presets_are_of_models_that_need_it() -> None:
    assert RuntimeConfig().checkpointing == "none"
    assert all(preset(name).runtime.checkpointing == "layer" for name in PRESETS)


def test_placement_carries_the_choice() -> None:
    for mode, compiled in itertools.product(MODES, (False, True)):
        runtime = RuntimeConfig(device="cpu", checkpointing=mode, compile=compiled)  # type: ignore[arg-type]
        placement = Placement.of(runtime)
        assert placement.layers == LayerOptions(mode, compiled, False)
        assert placement.attention == "sdpa"
