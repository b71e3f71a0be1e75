"""Optimizers for bfloat16 weights: the update that fp32 AdamW makes, in few bytes, saved, resumed and offloaded."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ppomax.engine import low_memory, sft
from ppomax.engine.config import OptimConfig, ScheduleConfig
from ppomax.engine.errors import InputError
from ppomax.engine.low_memory import MasterAdamW, Offload
from ppomax.engine.optim import Optimizer
from ppomax.engine.ppo import PPO
from ppomax.kernels.adamw import BLOCK, join
from torch import Tensor, nn

WIDTH, VOCAB, BATCH, LENGTH = 48, 256, 6, 24
CONFIG = OptimConfig(lr=5e-7, eps=1e-6)
EIGHT_BIT = OptimConfig(lr=5e-7, eps=1e-6, moments="8bit")
FORMS = {
    "split float32": (torch.bfloat16, CONFIG),
    "split 8-bit": (torch.bfloat16, EIGHT_BIT),
    "float32 8-bit": (torch.float32, EIGHT_BIT),
    "float32 float32": (torch.float32, CONFIG),
}
forms = pytest.mark.parametrize(("dtype", "config"), FORMS.values(), ids=FORMS.keys())


class Block(nn.Module):
    """A tied language model of one transformer layer: matrices N(0, 0.02), norms 1."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"embedding": (VOCAB, WIDTH), "qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH),
                  "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) * 0.02))
        self.norms = nn.ParameterList([torch.ones(WIDTH) for _ in range(3)])

    def loss(self, tokens: Tensor) -> Tensor:
        h = F.embedding(tokens[:, :-1], self.embedding)
        x = F.rms_norm(h, (WIDTH,), self.norms[0])
        q, k, v = F.linear(x, self.qkv).view(BATCH, LENGTH, 3, 3, 16).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)
        h = h + F.linear(x, self.out)
        h = h + F.linear(F.silu(F.linear(F.rms_norm(h, (WIDTH,), self.norms[1]), self.up)), self.down)
        logits = F.linear(F.rms_norm(h, (WIDTH,), self.norms[2]), self.embedding)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batch(generator: torch.Generator) -> Tensor:
    """Tokens by Zipf's law, so that rows of the embedding have unlike gradients; every other one can be foretold."""
    tokens = (VOCAB ** torch.rand(BATCH, LENGTH + 1, generator=generator)).long() - 1
    tokens[:, 1::2] = (7 * tokens[:, :-1:2] + 3) % VOCAB
    return tokens


def masters(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """The fp32 weights that are trained."""
    if not isinstance(optimizer.adamw, MasterAdamW):
        return [p.detach() for p in model.parameters()]
    states = [optimizer.adamw.state.get(p, {}) for p in model.parameters()]
    pairs = zip(model.parameters(), states, strict=True)
    return [join(p.detach(), state["low"]) if "low" in state else p.detach().float() for p, state in pairs]


class Stochastic:
    """fp32 AdamW on bfloat16 weights without a master: each step's result is rounded at random with the right mean."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.parameters = list(model.parameters())
        self.high = [nn.Parameter(p.detach().float()) for p in self.parameters]
        self.adamw = torch.optim.AdamW(
            self.high, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True
        )

    @torch.no_grad()
    def step(self) -> None:
        for p, high in zip(self.parameters, self.high, strict=True):
            high.grad, p.grad = p.grad.float(), None
        self.adamw.step()
        for p, high in zip(self.parameters, self.high, strict=True):
            bits = high.view(torch.int32) + torch.randint(0, 1 << 16, high.shape, dtype=torch.int32)
            p.copy_((bits & -(1 << 16)).view(torch.float32))
            high.copy_(p)


def test_the_update_of_fp32_adamw_over_300_steps() -> None:
    """Error of the accumulated update, relative to it, on the same bfloat16 gradients at lr 5e-7.

    Exact masters with exact moments lose nothing; 8-bit moments 0.5 %; without masters the update is lost, or
    drowned in noise.
    """
    torch.manual_seed(0)
    reference = Block()
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(p.bfloat16())  # so that all start from the same weights
    start = [p.detach().clone() for p in reference.parameters()]
    models = {name: Block().bfloat16() for name in ("split", "8bit", "plain", "stochastic")}
    plain = torch.optim.AdamW(
        models["plain"].parameters(), lr=CONFIG.lr, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=0.0, fused=True
    )
    optimizers: dict[str, Any] = {
        "reference": Optimizer(reference, CONFIG, 300, 1.0),
        "split": Optimizer(models["split"], CONFIG, 300, 1.0),
        "8bit": Optimizer(models["8bit"], EIGHT_BIT, 300, 1.0),
        "plain": plain,
        "stochastic": Stochastic(models["stochastic"], CONFIG),
    }
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        reference.loss(batch(generator)).backward()
        for p, *others in zip(reference.parameters(), *(model.parameters() for model in models.values()), strict=True):
            gradient = p.grad.bfloat16()
            p.grad = gradient.float()
            for other in others:
                other.grad = gradient.clone()
        for optimizer in optimizers.values():
            optimizer.step()
    update = torch.cat([(p - s).flatten() for p, s in zip(reference.parameters(), start, strict=True)]).detach()
    assert 2e-5 < float(update.square().mean().sqrt()) < 1.5e-4

    def error(weights: Any) -> float:
        ours = torch.cat([(p.float() - s).flatten() for p, s in zip(weights, start, strict=True)]).detach()
        return float((ours - update).norm() / update.norm())

    assert error(masters(models["split"], optimizers["split"])) == 0
    assert error(masters(models["8bit"], optimizers["8bit"])) < 0.01
    assert error(models["plain"].parameters()) > 0.95
    assert error(models["stochastic"].parameters()) > 1
    for name in ("split", "8bit"):
        trained = masters(models[name], optimizers[name])
        assert all(torch.equal(p, w.bfloat16()) for p, w in zip(models[name].parameters(), trained, strict=True)), name


@forms
def test_bytes_a_weight(dtype: torch.dtype, config: OptimConfig) -> None:
    """Of live tensors, weights included: 2 + 2 + 8 and 2 + 2 + 2.03 for a bfloat16 matrix."""
    model = nn.Linear(1024, 512, bias=False).to(dtype)
    optimizer = Optimizer(model, config, 10, 1.0)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    state = optimizer.adamw.state[model.weight]
    held = [model.weight, *(x for x in state.values() if isinstance(x, Tensor) and x.ndim)]
    assert model.weight.grad is None
    size = sum(x.untyped_storage().nbytes() for x in held) / model.weight.numel()
    expected = 4 + (2 + 8 / BLOCK if config.moments == "8bit" else 8)
    assert size == expected


def test_norms_keep_float32_moments() -> None:
    model = Block().bfloat16()
    optimizer = Optimizer(model, EIGHT_BIT, 10, None)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in model.parameters():
        assert ("scales" in optimizer.adamw.state[p]) == (p.ndim == 2)


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


SCHEDULED = {"lr": 1e-3, "weight_decay": 0.1, "schedule": ScheduleConfig("cosine", warmup=2, floor=0.1)}


@pytest.mark.parametrize("grad_clip", [None, 1.0])
def test_masters_are_fp32_adamws_to_the_last_bit(grad_clip: float | None) -> None:
    """With clipping, schedule and weight decay; the gradients are the same bfloat16 numbers."""
    config = OptimConfig(**SCHEDULED)
    model, twin = Block().bfloat16(), Block().bfloat16().float()
    ours, theirs = Optimizer(model, config, 8, grad_clip), Optimizer(twin, config, 8, grad_clip)
    for step in range(8):
        give_gradients(model, step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.float()
        assert ours.step() == theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(masters(model, ours), masters(twin, theirs), strict=True))


def test_the_norm_of_bfloat16_gradients_is_not_rounded_to_bfloat16() -> None:
    model = nn.Linear(64, 64, bias=False).bfloat16()
    optimizer = Optimizer(model, CONFIG, 8, 1.0)
    give_gradients(model, 0)
    exact = float(model.weight.grad.double().norm())
    norm = optimizer.step()["grad_norm"]
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(exact, rel=1e-6)


@forms
def test_a_step_without_a_finite_norm_changes_nothing(dtype: torch.dtype, config: OptimConfig) -> None:
    model = Block().to(dtype)
    optimizer = Optimizer(model, config, 8, 1.0)
    give_gradients(model, 0)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    give_gradients(model, 1)
    model.up.grad[3, 5] = math.inf
    assert optimizer.step()["skipped_steps"] == 1
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert all(int(state["step"]) == 1 for state in optimizer.adamw.state.values())


@forms
def test_a_parameter_without_a_gradient_is_left_alone(dtype: torch.dtype, config: OptimConfig) -> None:
    model = Block().to(dtype)
    optimizer = Optimizer(model, config, 8, 1.0)
    before = model.down.detach().clone()
    for step in range(2):
        give_gradients(model, step)
        model.down.grad = None
        optimizer.step()
    assert torch.equal(model.down, before)
    assert not optimizer.adamw.state.get(model.down)


@forms
def test_state_comes_back_to_the_last_bit(dtype: torch.dtype, config: OptimConfig) -> None:
    """Through a file, by way of the bfloat16 weights that a checkpoint's model folder holds."""

    def train(model: Block, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            give_gradients(model, step)
            if step < 5:
                model.norms[1].grad = None  # has no state yet when it is saved
            optimizer.step()

    model = Block().to(dtype)
    optimizer = Optimizer(model, config, 8, 0.7)
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Block().to(dtype)
    again.load_state_dict(saved["model"])
    resumed = Optimizer(again, config, 8, 0.7)
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(4, 8))
    train(again, resumed, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(masters(model, optimizer), masters(again, resumed), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_loading_takes_over_tensors_without_copying_them() -> None:
    model, again = Block().bfloat16(), Block().bfloat16()
    optimizer, resumed = Optimizer(model, EIGHT_BIT, 8, None), Optimizer(again, EIGHT_BIT, 8, None)
    give_gradients(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    resumed.load_state_dict(state)
    loaded = resumed.adamw.state[again.up]
    for name, x in optimizer.adamw.state[model.up].items():
        assert name == "step" or loaded[name].data_ptr() == x.data_ptr()


NAMES = {
    "split float32": "float32 moments of bfloat16 weights",
    "split 8-bit": "8-bit moments of bfloat16 weights",
    "float32 8-bit": "8-bit moments of float32 weights",
    "float32 float32": "float32 moments of float32 weights",
}


@pytest.mark.parametrize("expected", FORMS)
@pytest.mark.parametrize("saved", FORMS)
def test_state_of_another_form_is_refused(saved: str, expected: str) -> None:
    optimizers = []
    for dtype, config in (FORMS[saved], FORMS[expected]):
        model = nn.Linear(8, 8).to(dtype)
        optimizers.append(Optimizer(model, config, 8, 1.0))
        give_gradients(model, 0)
        optimizers[-1].step()
    if saved == expected:
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        return
    with pytest.raises(InputError) as error:
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert str(error.value) == (
        f"optimizer state: saved with {NAMES[saved]}, expected {NAMES[expected]} "
        "(OptimConfig.moments, RuntimeConfig.dtype)"
    )


def test_state_of_another_model_is_refused() -> None:
    one, two = nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8, bias=False).bfloat16()
    state = Optimizer(one, CONFIG, 8, 1.0).state_dict()
    with pytest.raises(InputError, match="of 2 parameters, expected 1"):
        Optimizer(two, CONFIG, 8, 1.0).load_state_dict(state)


def test_other_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"moments = '8bit': expected float32 or bfloat16 .* got torch.float64"):
        Optimizer(nn.Linear(4, 4).double(), EIGHT_BIT, 8, 1.0)


def test_offloading_is_nothing_on_a_cpu() -> None:
    assert Optimizer(nn.Linear(4, 4), OptimConfig(offload=True), 8, 1.0).offload is None


class Stream:
    """Stands for a CUDA stream: notes what waits for what."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Streams, pinned memory and copies between devices made of plain CPU ones; the log of their waits."""
    log: list[str] = []
    copying, computing = Stream(log, "copying"), Stream(log, "computing")
    monkeypatch.setattr(low_memory, "_copy_stream", lambda device: copying)
    monkeypatch.setattr(low_memory, "_pinned_like", torch.empty_like)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: log.append("kept"))
    return log


@forms
def test_offloaded_state_trains_alike(dtype: torch.dtype, config: OptimConfig, streams: list[str]) -> None:
    """Between steps the state is the host's; saved and resumed it goes on to the same bits."""
    model, twin = Block().to(dtype), Block().to(dtype)
    ours, theirs = Optimizer(model, config, 8, 1.0), Optimizer(twin, config, 8, 1.0)
    ours.offload = Offload(ours.adamw, torch.device("cpu"))
    for step in range(6):
        if step == 3:
            state = ours.state_dict()
            assert streams[-1] == "host waits for copying"
            ours = Optimizer(model, config, 8, 1.0)
            ours.offload = Offload(ours.adamw, torch.device("cpu"))
            ours.load_state_dict(state)
        del streams[:]
        if step % 2:
            ours.bring_in()
            inside = ours.adamw.state[model.up]
            assert not any(x is ours.offload.host[model.up, name] for name, x in tensors(inside))
        give_gradients(model, step)
        give_gradients(twin, step)
        ours.step()
        theirs.step()
        waits = [line for line in streams if line != "kept"]
        assert waits == ["computing waits for copying", "copying waits for computing"]
        assert streams[-1] == "kept"
        for p, state in ours.adamw.state.items():
            assert all(x is ours.offload.host[p, name] for name, x in tensors(state))
    ours.bring_in()
    assert all(torch.equal(a, b) for a, b in zip(masters(model, ours), masters(twin, theirs), strict=True))


def tensors(state: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, x) for name, x in state.items() if isinstance(x, Tensor)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@forms
def test_offloading_on_a_gpu(dtype: torch.dtype, config: OptimConfig) -> None:
    models = [Block().to("cuda", dtype) for _ in range(4)]
    optimizers = [
        Optimizer(model, OptimConfig(lr=1e-3, moments=config.moments, offload=n < 2), 8, 1.0)
        for n, model in enumerate(models)
    ]
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.bring_in()
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            optimizer.step()
    for n in (0, 1):
        states = [dict(tensors(state)) for state in optimizers[n].adamw.state.values()]
        assert all(x.is_pinned() for state in states for x in state.values())
        assert all(torch.equal(a, b) for a, b in zip(models[n].parameters(), models[2 + n].parameters(), strict=True))


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_a_bfloat16_run_stopped_and_resumed_equals_one_never_stopped(
    moments: str, stop_and_resume: Callable, assert_equal_runs: Callable
) -> None:
    """Weights come back from model folders, low bits and moments from the state beside them."""
    runs = stop_and_resume("sft", sft._SFT, "step", 6, runtime__dtype="bfloat16", optim__moments=moments)
    assert_equal_runs(runs.whole, runs.resumed)
    (checkpoint,) = (runs.resumed / "checkpoints").iterdir()
    form = torch.load(checkpoint / "state.pt")["optimizer"]["form"]
    assert form == f"{'8-bit' if moments == '8bit' else moments} moments of bfloat16 weights"


def test_ppo_in_bfloat16_with_8_bit_moments(stop_and_resume: Callable, assert_equal_runs: Callable) -> None:
    options = {f"{model}_optim__moments": "8bit" for model in ("policy", "critic")}
    runs = stop_and_resume("ppo", PPO, "iterate", 4, runtime__dtype="bfloat16", **options)
    assert_equal_runs(runs.whole, runs.resumed)
