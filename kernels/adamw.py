"""AdamW in place over bfloat16 weights that keep a float32 master, with float32 or 8-bit moments.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w - lr wd w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)          arXiv 1711.05101, algorithm 2

**Master.** At lr 5e-7 a step is far below half a bfloat16 ulp of a weight of 0.02: the weight would never move. The
32 bits of the master are therefore split: `weight` is the master rounded to bfloat16 (to nearest, ties away from 0)
and `low` its 16 low bits as int16. Negative ones belong to a weight that was rounded up, so that

    bits(master) = (bits(weight) << 16) + low

holds exactly for every finite master.

**8-bit moments.** Kept are root = sqrt(v) as uint8 and ratio = m / sqrt(v) as int8, in blocks of 256 with one float32
scale each: `x = scale (c / levels)^2`, finest near 0, where most values of a block lie. The ratio and not m, because
it has the same size for every weight however unlike their gradients are, and because it is bounded: an error of its
code is an error of that size in the step and no more, where a stored m beside a v rounded down would make a step
many times too long. The ratio is rounded to nearest. The root is rounded at random with the right mean: nearest
would never let it fall where a step's decay, 1 - sqrt(b2), is less than half the distance of two codes. The random
number is a hash of the bits of v: the same inputs give the same bits.

On a GPU one Triton kernel does all of it in one pass (`gpu/adamw.py`). In torch the arithmetic is that of
`torch.optim`'s fused AdamW over `CHUNK` weights at a time, whose float32 copies are all the memory it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from .dispatch import uses_triton

BLOCK = 256
RATIO_LEVELS, ROOT_LEVELS = 127, 255
SMALLEST_SCALE = 1e-30  # a block with nothing larger is 0: below it levels^2 / scale would overflow
CHUNK = 1 << 17  # a multiple of BLOCK; a dozen float32 copies of it exist at a time at most: 6 MiB
HASH = (-1640531527, -2048144777)  # odd, of large order: 2^32 / golden ratio, and xxHash's second prime

_MOMENTS = ("exp_avg", "exp_avg_sq")

State = Mapping[str, Tensor]


class Hyper(NamedTuple):
    """What a step needs besides tensors; `step` counts from 1."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def adamw_ref(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, exp_avg, exp_avg_sq) after one step, in float64."""
    w, g, m, v = (x.double() for x in (weight, grad, exp_avg, exp_avg_sq))
    m = hyper.beta1 * m + (1 - hyper.beta1) * g
    v = hyper.beta2 * v + (1 - hyper.beta2) * g * g
    m_hat, v_hat = m / (1 - hyper.beta1**hyper.step), v / (1 - hyper.beta2**hyper.step)
    return w - hyper.lr * (hyper.weight_decay * w + m_hat / (v_hat.sqrt() + hyper.eps)), m, v


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (bfloat16, rounded to nearest; int16, the low bits)."""
    bits = master.view(torch.int32)
    low = bits.to(torch.int16)  # the 16 low bits, as a number in [-32768, 32767]
    return ((bits - low) >> 16).to(torch.int16).view(torch.bfloat16), low


def join(weight: Tensor, low: Tensor) -> Tensor:
    """float32 of which `split` made (weight, low)."""
    return ((weight.view(torch.int16).int() << 16) + low).view(torch.float32)


def new_state(weight: Tensor, *, eight_bit: bool = False) -> dict[str, Tensor]:
    """Zero state of a weight, on its device, of its shape unless said otherwise.

    low: int16, where the weight is bfloat16; then either exp_avg, exp_avg_sq: float32; or ratio: int8,
    root: uint8, scales: float32 `[2, ceil(elements / 256)]`, of ratio and root.

    Raises:
        ValueError: a weight that is neither float32 nor bfloat16.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"weights must be float32 or bfloat16, not {weight.dtype}")
    dtypes = {"ratio": torch.int8, "root": torch.uint8} if eight_bit else dict.fromkeys(_MOMENTS, torch.float32)
    if weight.dtype == torch.bfloat16:
        dtypes = {"low": torch.int16, **dtypes}
    state = {name: torch.zeros(weight.shape, dtype=dtype, device=weight.device) for name, dtype in dtypes.items()}
    if eight_bit:
        blocks = -(-weight.numel() // BLOCK)
        state["scales"] = torch.zeros(2, blocks, dtype=torch.float32, device=weight.device)
    return state


def moments(state: State) -> tuple[Tensor, Tensor]:
    """(exp_avg, exp_avg_sq) in float32, decoded where they are held in 8 bits."""
    if "scales" not in state:
        return state["exp_avg"], state["exp_avg_sq"]
    shape, flat = state["root"].shape, (state["ratio"].reshape(-1), state["root"].reshape(-1))
    m, v = _decode(*flat, state["scales"])
    return m.view(shape), v.view(shape)


def _blocks(x: Tensor) -> Tensor:
    """[blocks, 256] float32 of a flat tensor, the last block filled up with 0."""
    return torch.nn.functional.pad(x.float(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def _decode(ratio: Tensor, root: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(exp_avg, exp_avg_sq) of flat codes."""
    c, r = _blocks(ratio), _blocks(root)
    r = r.square_().mul_((scales[1] / ROOT_LEVELS**2)[:, None])
    c = c.mul_(c.abs()).mul_((scales[0] / RATIO_LEVELS**2)[:, None])
    n = ratio.numel()
    return c.mul_(r).view(-1)[:n], r.square_().view(-1)[:n]


def _encode(m: Tensor, v: Tensor, ratio: Tensor, root: Tensor, scales: Tensor) -> None:
    """Flat codes of (exp_avg, exp_avg_sq) into `ratio`, `root` and `scales`."""
    v, n = _blocks(v), v.numel()
    r = v.sqrt()
    u = _blocks(m) / torch.where(r > 0, r, 1.0)
    for x, codes, scale, levels, threshold in (
        (u, ratio, scales[0], RATIO_LEVELS, 0.5),
        (r, root, scales[1], ROOT_LEVELS, _uniform(v)),
    ):
        codes.copy_(_codes(x, scale, levels, threshold).view(-1)[:n])


def _codes(x: Tensor, scale: Tensor, levels: int, threshold: float | Tensor) -> Tensor:
    """Codes of blocks, as floats, and their scales into `scale`. A value goes to the upper of the two codes around
    it where it lies further than the share `threshold` of the way from the lower one."""
    size = x.abs()
    largest = size.amax(1)
    scale.copy_(torch.where(largest > SMALLEST_SCALE, largest, 0.0))
    y = size.mul_(torch.where(scale > 0, levels**2 / scale, 0.0)[:, None])
    c = y.sqrt().floor_()
    up = y.sub_(c * c) > (2 * c + 1).mul_(threshold)
    return c.add_(up).clamp_(max=levels).copysign_(x)


def _uniform(v: Tensor) -> Tensor:
    """Numbers in [0, 1) that are a hash of the bits of `v`."""
    h = v.view(torch.int32) * HASH[0]
    h = (h ^ (h >> 15)) * HASH[1]
    return ((h >> 8) & 0xFFFFFF) * 2.0**-24


def _step_torch(
    weight: Tensor,
    low: Tensor | None,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    scales: Tensor | None,
    grad_scale: Tensor | None,
    hyper: Hyper,
) -> None:
    """One step over flat tensors, chunk by chunk."""
    for start in range(0, weight.numel(), CHUNK):
        part, blocks = slice(start, start + CHUNK), slice(start // BLOCK, (start + CHUNK) // BLOCK)
        w = weight[part] if low is None else join(weight[part], low[part])
        g = grad[part].float()
        g = g if grad_scale is None else g * grad_scale
        if scales is None:
            _adamw(w, g, first[part], second[part], hyper)
        else:
            m, v = _decode(first[part], second[part], scales[:, blocks])
            _adamw(w, g, m, v, hyper)
            _encode(m, v, first[part], second[part], scales[:, blocks])
        if low is not None:
            high, rest = split(w)
            weight[part].copy_(high)
            low[part].copy_(rest)


def _adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Hyper) -> None:
    """torch's own step over float32 tensors, in place."""
    step = torch.tensor(hyper.step - 1.0, device=w.device)
    adam(
        [w], [g], [m], [v], [], [step], fused=True, decoupled_weight_decay=True, amsgrad=False, maximize=False,
        beta1=hyper.beta1, beta2=hyper.beta2, lr=hyper.lr, weight_decay=hyper.weight_decay, eps=hyper.eps,
    )  # fmt: skip


@torch.library.custom_op("ppomax::adamw_", mutates_args=("weight", "low", "first", "second", "scales"))
def _step(
    weight: Tensor,
    low: Tensor | None,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    scales: Tensor | None,
    grad_scale: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw_` on flat tensors."""
    hyper = Hyper(step, lr, beta1, beta2, eps, weight_decay)
    if uses_triton(weight, grad):
        from .gpu import adamw as triton_path

        triton_path.step(weight, low, grad, first, second, scales, grad_scale, hyper)
    else:
        _step_torch(weight, low, grad, first, second, scales, grad_scale, hyper)


@_step.register_fake
def _(*args: object) -> None:
    return None


@torch.no_grad()
def adamw_(weight: Tensor, grad: Tensor, state: State, hyper: Hyper, *, grad_scale: Tensor | None = None) -> None:
    """One AdamW step on `weight` and `state`, in place. Nothing waits for the device.

    Args:
        weight: float32 or bfloat16, contiguous.
        grad: of the weight's shape, float32 or bfloat16. It must be finite.
        state: of `new_state(weight)`.
        grad_scale: 0-dim float32, multiplies the gradient (in float32).

    Raises:
        ValueError: shapes or dtypes that do not fit, a weight that is not contiguous.
    """
    first, second = (state[name] for name in (("ratio", "root") if "scales" in state else _MOMENTS))
    low = state.get("low")
    if not all(x is None or x.shape == weight.shape for x in (grad, low, first, second)):
        raise ValueError(f"gradient {tuple(grad.shape)} and state do not fit a weight {tuple(weight.shape)}")
    if weight.dtype != (torch.float32 if low is None else torch.bfloat16) or not weight.is_contiguous():
        raise ValueError(f"this state is not that of a contiguous weight in {weight.dtype}")
    _step(
        weight.detach().view(-1),
        None if low is None else low.view(-1),
        grad.detach().reshape(-1),
        first.view(-1),
        second.view(-1),
        state.get("scales"),
        grad_scale,
        *hyper,
    )
