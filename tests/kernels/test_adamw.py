"""AdamW on split masters and 8-bit moments: against float64, against torch's own bit for bit, and where codes drift."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ppomax.kernels import adamw as kernel
from ppomax.kernels.adamw import BLOCK, Hyper, adamw_, adamw_ref, join, moments, new_state, split
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("path", "small_programs")
HYPER = Hyper(step=3, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1)
LIMIT = 0.1 / math.sqrt(0.05 * (1 - 0.9**2 / 0.95))
"""Largest |m| / sqrt(v) that AdamW can reach with HYPER's betas, by Cauchy and Schwarz."""
FORMS = {
    "split float32": (torch.bfloat16, False),
    "split 8-bit": (torch.bfloat16, True),
    "float32 8-bit": (torch.float32, True),
    "float32 float32": (torch.float32, False),
}
forms = pytest.mark.parametrize(("dtype", "eight_bit"), FORMS.values(), ids=FORMS.keys())


@pytest.fixture
def small_programs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and programs of 512 weights, so that small tensors take several."""
    monkeypatch.setattr(kernel, "CHUNK", 2 * BLOCK)
    if path == "triton":
        from ppomax.kernels.gpu import adamw as triton_path

        monkeypatch.setattr(triton_path, "configuration", lambda name, device: {"BLOCK_ROWS": 2, "num_warps": 1})


def trained(n: int, dtype: torch.dtype, eight_bit: bool, steps: int = 2, spread: float = 1.0) -> tuple[Tensor, Any]:
    """A weight of size 0.02 and its state after some steps; gradients differ by exp(spread) from one to the next."""
    master = torch.randn(n) * 0.02
    weight, low = split(master) if dtype == torch.bfloat16 else (master, None)
    state = new_state(weight, eight_bit=eight_bit)
    if low is not None:
        state["low"].copy_(low)
    size = torch.exp(spread * torch.randn(n)) * 1e-3
    for step in range(1, steps + 1):
        adamw_(weight, torch.randn(n) * size, state, HYPER._replace(step=step))
    return weight, state


def master_of(weight: Tensor, state: Any) -> Tensor:
    return join(weight, state["low"]) if "low" in state else weight


def copies(weight: Tensor, state: Any) -> tuple[Tensor, Any]:
    return weight.clone(), {name: x.clone() for name, x in state.items()}


class TestMaster:
    def test_every_finite_float_comes_back_and_the_weight_is_the_nearest(self) -> None:
        """All bfloat16 numbers with low bits around 0, around the tie, and random ones; halves go away from 0."""
        high = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)[:, None] << 16
        few = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
        low = torch.cat([few.expand(1 << 16, 6), torch.randint(0, 1 << 16, (1 << 16, 6), dtype=torch.int32)], 1)
        master = (high + low).flatten().view(torch.float32)
        master = master[master.isfinite()]
        weight, rest = split(master)
        assert torch.equal(join(weight, rest).view(torch.int32), master.view(torch.int32))
        finite = weight.isfinite()  # the largest masters round to infinity
        exact, nearest = master.double()[finite], master.bfloat16().double()[finite]
        error = (weight.double()[finite] - exact).abs()
        assert torch.equal(error, (nearest - exact).abs())
        ties = (master.view(torch.int32) & 0xFFFF) == 0x8000
        assert bool((weight.double().abs() > master.double().abs())[ties & finite].all())

    def test_moves_by_less_than_the_weight_can_show(self) -> None:
        """At lr 5e-7 the master of 0.02 moves while its weight stays; after enough steps the weight follows."""
        weight = torch.full((4,), 0.02, dtype=torch.bfloat16)
        state = new_state(weight)
        before, start = weight.clone(), master_of(weight, state)
        for step in range(1, 201):
            adamw_(weight, torch.ones(4), state, HYPER._replace(step=step, lr=5e-7, weight_decay=0.0))
            if step == 20:
                assert torch.equal(weight, before)
        torch.testing.assert_close(
            master_of(weight, state), start - 200 * 5e-7, rtol=0, atol=200 * 2.0**-30
        )  # half ulps
        assert torch.equal(weight, (start - 200 * 5e-7).bfloat16())
        assert not torch.equal(weight, before)


@forms
@pytest.mark.parametrize("n", [1, 255, 256, 257, 1300])
def test_one_step_against_float64(n: int, dtype: torch.dtype, eight_bit: bool, no_worse: Any) -> None:
    weight, state = trained(n, dtype, eight_bit)
    start = master_of(weight, state).clone()
    m, v = (x.clone() for x in moments(state))
    grad, scale = torch.randn(n, dtype=torch.bfloat16) * 1e-3, torch.tensor(0.3)
    exact = adamw_ref(start, grad.double() * float(scale), m, v, HYPER)
    plain = torch.nn.Parameter(start.clone())
    twin = torch.optim.AdamW([plain], lr=HYPER.lr, betas=(0.9, 0.95), eps=HYPER.eps, weight_decay=0.1, foreach=False)
    twin.state[plain] = {"step": torch.tensor(2.0), "exp_avg": m, "exp_avg_sq": v}
    plain.grad = grad.float() * scale
    twin.step()
    adamw_(weight, grad, state, HYPER, grad_scale=scale)
    no_worse([master_of(weight, state)], [plain.detach()], exact[:1])
    if not eight_bit:
        no_worse(moments(state), [m, v], exact[1:])


def test_codes_lie_next_to_what_they_stand_for() -> None:
    """ratio: to nearest; root: one of the two codes around it. The largest of a block is a scale, hence exact."""
    weight, state = trained(5 * BLOCK - 7, torch.bfloat16, True)
    m, v = (x.clone() for x in moments(state))
    grad = torch.randn(weight.numel()) * 1e-3
    _, m, v = adamw_ref(join(weight, state["low"]), grad, m, v, HYPER)
    adamw_(weight, grad, state, HYPER)
    for name, exact, levels, reach in (("ratio", m / v.sqrt(), 127, 0.5), ("root", v.sqrt(), 255, 1.0)):
        code, scale = state[name].double(), state["scales"][int(name == "root")].double()
        scale = scale.repeat_interleave(BLOCK)[: weight.numel()]
        wide = (2 * code.abs() + 1) * scale / levels**2
        error = (code * code.abs() * scale / levels**2 - exact).abs()
        assert bool((error <= wide * (reach + 1e-3)).all()), name
        assert bool((code.abs() == levels)[exact.abs() > 0.9999 * scale].all()), name


def test_roots_are_rounded_without_bias() -> None:
    """The mean of many roundings of nearly the same root is the root, of small ones too."""
    n = 64 * BLOCK
    weight = torch.zeros(n)
    for size in (0.5, 0.05, 0.004):
        state = new_state(weight, eight_bit=True)
        grad = size * (1 + 1e-4 * torch.rand(n))
        grad[::BLOCK] = 1.0  # the largest of each block
        adamw_(weight, grad, state, HYPER._replace(step=1))
        _, v = moments(state)
        kept = torch.ones(n, dtype=torch.bool)
        kept[::BLOCK] = False
        roots = v.sqrt()[kept].double() / math.sqrt(0.05)
        step = roots.unique().diff()
        assert step.numel() == 1, "two codes around the value"
        assert abs(float(roots.mean() - grad[kept].double().mean())) < 4 * float(step) / math.sqrt(kept.sum()), size


def run(grads: list[Tensor], beta2: float, eight_bit: bool) -> tuple[list[Tensor], Any]:
    """m / sqrt(v) as each step used it, and the state in the end: lr 1, weights set back to 0 each time."""
    weight = torch.zeros(grads[0].numel())
    state = new_state(weight, eight_bit=eight_bit)
    steps = []
    for t, grad in enumerate(grads, 1):
        # a step so late that nothing is left of the bias correction
        adamw_(weight, grad, state, Hyper(t + 10**6, 1.0, 0.9, beta2, 1e-30, 0.0))
        steps.append(-weight.clone())
        weight.zero_()
    return steps, state


def fading(steps: int, after: float, at: int) -> list[Tensor]:
    """Gradients of very unlike sizes; those of every other weight shrink by the factor `after` from step `at` on."""
    size = torch.exp(1.5 * torch.randn(2 * BLOCK))
    grads = [torch.randn(2 * BLOCK) * size for _ in range(steps)]
    for grad in grads[at:]:
        grad[::2] *= after
    return grads


@pytest.mark.parametrize("after", [1.0, 1e-3, 0.0])
def test_no_step_is_longer_than_adamw_can_make(after: float) -> None:
    """A stored m beside a v that was rounded towards 0 makes steps tens of times too long."""
    steps, _ = run(fading(80, after, at=30), 0.95, eight_bit=True)
    largest = float(torch.stack(steps).abs().max())
    assert 0.5 < largest < 1.02 * LIMIT


def test_the_second_moment_falls_when_gradients_do(path: str) -> None:
    """Rounded to nearest it would stay: at beta2 = 0.99 a step's decay is a fraction of a code."""
    if path == "triton" and not torch.cuda.is_available():
        pytest.skip("too many launches for the interpreter; the codes are compared in the other tests")
    grads = fading(700, 0.1, at=100)
    exact, ours = (moments(run(grads, 0.99, eight_bit)[1])[1][::2] for eight_bit in (False, True))
    ratio = (ours / exact).sqrt()
    assert 0.9 < float(ratio.median()) < 1.1
    assert float(ratio.quantile(0.95)) < 2


@pytest.mark.parametrize("faded", [0, 1], ids=["ratio", "root"])
def test_blocks_without_a_gradient_fade_to_zero_and_come_back(faded: int) -> None:
    """Neither a scale that underflows nor the first gradient after it makes NaN or a jump."""
    n = 2 * BLOCK
    weight = torch.zeros(n)
    state = new_state(weight, eight_bit=True)
    adamw_(weight, torch.randn(n), state, HYPER._replace(step=1))
    state["scales"][faded].mul_(1e-37)  # as after some thousand steps
    for step in range(2, 5):
        adamw_(weight, torch.zeros(n), state, HYPER._replace(step=step))
    assert all(bool(x.isfinite().all()) for x in (weight, state["scales"]))
    assert not bool(state["scales"][faded].any()), "what is too small for a scale is 0"
    assert not bool(moments(state)[faded].any())
    state["scales"].zero_()
    before = weight.clone()
    adamw_(weight, torch.full((n,), 1e-4), state, HYPER._replace(step=10**6))
    moved = (before * (1 - HYPER.lr * HYPER.weight_decay) - weight) / HYPER.lr
    torch.testing.assert_close(moved, torch.full((n,), 0.1 / math.sqrt(0.05)), rtol=0.1, atol=0)


@forms
def test_same_inputs_same_bits(dtype: torch.dtype, eight_bit: bool) -> None:
    weight, state = trained(700, dtype, eight_bit)
    twin, twin_state = copies(weight, state)
    grad = torch.randn(700)
    adamw_(weight, grad, state, HYPER)
    adamw_(twin, grad, twin_state, HYPER)
    assert torch.equal(weight, twin)
    assert all(torch.equal(state[name], twin_state[name]) for name in state)


@forms
def test_shapes_strides_and_neighbours(dtype: torch.dtype, eight_bit: bool) -> None:
    """A matrix with a transposed gradient steps as its flat twin does; memory beside it is not touched."""
    weight, state = trained(33 * 20, dtype, eight_bit)
    beside = {name: torch.cat([x.flatten(), torch.full_like(x.flatten(), 7)]) for name, x in state.items()}
    around = torch.cat([weight, torch.full_like(weight, 7)])
    grad = torch.randn(33, 20)
    shapes = {name: x.shape if name == "scales" else (33, 20) for name, x in state.items()}
    matrix = {name: beside[name][: x.numel()].view(shapes[name]) for name, x in state.items()}
    adamw_(around[: weight.numel()].view(33, 20), grad.t().contiguous().t(), matrix, HYPER)
    adamw_(weight, grad.flatten(), state, HYPER)
    for x, buffer in ((weight, around), *((state[name], beside[name]) for name in state)):
        assert torch.equal(x.flatten(), buffer[: x.numel()])
        assert bool((buffer[x.numel() :] == 7).all())


@forms
def test_an_empty_weight_is_no_trouble(dtype: torch.dtype, eight_bit: bool) -> None:
    weight = torch.zeros(0, 4, dtype=dtype)
    state = new_state(weight, eight_bit=eight_bit)
    adamw_(weight, torch.zeros(0, 4), state, HYPER)
    assert all(x.numel() == 0 for x in state.values())


@forms
def test_state_of_a_shape_without_memory(dtype: torch.dtype, eight_bit: bool) -> None:
    """On "meta", for planning: bytes per weight are 4 or 8 with float32 moments, 2 and a scale each with 8-bit ones."""
    weight = torch.empty(1024, 300, dtype=dtype, device="meta")
    state = new_state(weight, eight_bit=eight_bit)
    size = sum(x.numel() * x.element_size() for x in state.values()) / weight.numel()
    assert size == 2 * (dtype == torch.bfloat16) + (2 + 8 / BLOCK if eight_bit else 8)
    assert all(x.is_meta for x in state.values())


def test_what_does_not_fit_is_refused() -> None:
    weight, grad = torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 4)
    state = new_state(weight)
    with pytest.raises(ValueError, match=r"do not fit a weight \(4, 4\)"):
        adamw_(weight, grad[:2], state, HYPER)
    with pytest.raises(ValueError, match=r"do not fit a weight \(2, 4\)"):
        adamw_(weight[:2], grad[:2], state, HYPER)
    with pytest.raises(ValueError, match=r"contiguous weight in torch\.bfloat16"):
        adamw_(weight.t(), grad, state, HYPER)
    with pytest.raises(ValueError, match=r"contiguous weight in torch\.float32"):
        adamw_(weight.float(), grad, state, HYPER)
    with pytest.raises(ValueError, match=r"float32 or bfloat16, not torch\.float16"):
        new_state(weight.half())


@forms
def test_compiled_whole(dtype: torch.dtype, eight_bit: bool) -> None:
    weight, state = trained(300, dtype, eight_bit)
    twin, twin_state = copies(weight, state)
    grad, scale = torch.randn(300), torch.tensor(0.5)

    def step(weight: Tensor, state: Any) -> None:
        adamw_(weight, grad, state, HYPER, grad_scale=scale)

    step(weight, state)
    torch.compile(step, fullgraph=True, backend="aot_eager")(twin, twin_state)
    assert torch.equal(weight, twin)
    assert all(torch.equal(state[name], twin_state[name]) for name in state)


@forms
def test_custom_op_is_sound(dtype: torch.dtype, eight_bit: bool) -> None:
    weight, state = trained(300, dtype, eight_bit)
    first, second = (state[name] for name in (("ratio", "root") if eight_bit else ("exp_avg", "exp_avg_sq")))
    arguments = (weight, state.get("low"), torch.randn(300), first, second, state.get("scales"), None, *HYPER)
    torch.library.opcheck(torch.ops.ppomax.adamw_.default, arguments)


@pytest.mark.parametrize("clipped", [False, True])
def test_the_torch_path_is_torchs_adamw_to_the_last_bit(path: str, clipped: bool) -> None:
    """Master and moments after 30 steps, for a length that no chunk and no vector divides."""
    if path == "triton":
        pytest.skip("another order of rounding; held to float64 above")
    master = torch.randn(1501) * 0.02
    weight, low = split(master)
    state = new_state(weight)
    state["low"].copy_(low)
    plain = torch.nn.Parameter(master.clone())
    twin = torch.optim.AdamW([plain], lr=5e-7, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, fused=True)
    scale = torch.tensor(0.37) if clipped else None
    for step in range(1, 31):
        grad = torch.randn(1501, dtype=torch.bfloat16)
        plain.grad = grad.float() * scale if clipped else grad.float()
        twin.step()
        adamw_(weight, grad, state, Hyper(step, 5e-7, 0.9, 0.95, 1e-6, 0.1), grad_scale=scale)
    assert torch.equal(join(weight, state["low"]), plain.detach())
    assert not torch.equal(plain.detach(), master)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name], twin.state[plain][name])


class Largest(TorchDispatchMode):
    """Notes the largest new tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.elements = max(self.elements, out.numel())
        return out


@forms
def test_the_torch_path_makes_no_tensor_larger_than_a_chunk(path: str, dtype: torch.dtype, eight_bit: bool) -> None:
    if path == "triton":
        pytest.skip("the kernel makes none at all")
    weight, state = trained(40 * BLOCK, dtype, eight_bit)
    first, second = (state[name] for name in (("ratio", "root") if eight_bit else ("exp_avg", "exp_avg_sq")))
    tensors = (weight, state.get("low"), torch.randn(40 * BLOCK).bfloat16(), first, second, state.get("scales"))
    with Largest() as largest:
        kernel._step_torch(*tensors, None, HYPER)
    assert 0 < largest.elements <= kernel.CHUNK
