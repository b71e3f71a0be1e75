"""Kernels of one program that apply the functions of `ppomax.kernels.gpu.rows` to vectors; loaded by test_rows.py."""

import triton
import triton.language as tl
from ppomax.kernels.gpu.rows import exp_minus_linear, exp_minus_one, kl_row, policy_row, tanh, value_row


@triton.jit
def kl(x_ptr, out_ptr, N: tl.constexpr, KIND: tl.constexpr):
    offs = tl.arange(0, N)
    value, slope = kl_row(tl.load(x_ptr + offs), KIND)
    tl.store(out_ptr + offs, value)
    tl.store(out_ptr + N + offs, slope)


@triton.jit
def policy(
    x_ptr, out_ptr, lower, upper, dual, log_ratio_clamp, entropy_coef, entropy_bound, kl_coef,
    N: tl.constexpr, BONUS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, N)
    results = policy_row(
        tl.load(x_ptr + offs), tl.load(x_ptr + N + offs), tl.load(x_ptr + 2 * N + offs),
        tl.load(x_ptr + 3 * N + offs), tl.load(x_ptr + 4 * N + offs), tl.load(x_ptr + 5 * N + offs),
        lower, upper, dual, log_ratio_clamp, entropy_coef, entropy_bound, kl_coef, BONUS, KIND,
    )  # fmt: skip
    for i in tl.static_range(7):
        tl.store(out_ptr + i * N + offs, results[i].to(tl.float32))


@triton.jit
def value(x_ptr, out_ptr, clip_eps, coef, N: tl.constexpr, CLIP: tl.constexpr):
    offs = tl.arange(0, N)
    results = value_row(
        tl.load(x_ptr + offs), tl.load(x_ptr + N + offs), tl.load(x_ptr + 2 * N + offs), clip_eps, coef, CLIP
    )
    for i in tl.static_range(3):
        tl.store(out_ptr + i * N + offs, results[i].to(tl.float32))


@triton.jit
def series(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, exp_minus_linear(x))
    tl.store(out_ptr + N + offs, exp_minus_one(x))
    tl.store(out_ptr + 2 * N + offs, tanh(x))
