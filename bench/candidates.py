"""What `tune.py` tries: the configurations of each kernel, and where it times them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

from ops import OURS
from suites import H, N, V

Config: TypeAlias = dict[str, int]


class Tuning(NamedTuple):
    """A kernel's configuration for the shapes up to `up_to` (all others where that is empty), found by timing
    `provider` of an operation of `suites.configured`, at whose shape `configuration` is asked with `shape`."""

    kernel: str
    op: str
    size: str
    shape: dict[str, int]
    up_to: dict[str, int]
    provider: str = OURS


def _grid(**values: Iterable[int]) -> list[Config]:
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def _blocks(name: str, sizes: Iterable[int], warps: Iterable[int] = (4, 8)) -> list[Config]:
    return _grid(**{name: sizes}, num_warps=warps, num_stages=(1,))


_ROWS = _blocks("BLOCK_V", (1024, 2048, 4096, 8192, 16384), (4, 8, 16))
_SEQUENCES = _grid(BLOCK_T=(256, 512, 1024, 2048, 4096, 8192), BLOCK_S=(512,), num_warps=(4, 8, 16), num_stages=(1,))
_ELEMENTS = _blocks("BLOCK_N", (256, 512, 1024, 2048, 4096))
CANDIDATES: dict[str, list[Config]] = {
    "logprobs_forward": _ROWS,
    "logprobs_backward": _ROWS,
    "logprobs_merge": _blocks("BLOCK_N", (16, 32, 64), (1, 2)),
    "linear_rows": _ROWS,
    "linear_logprobs": [{"fused": 0}, {"fused": 1}],
    "linear_statistics": _grid(
        BLOCK_N=(128, 256), BLOCK_V=(128, 256), BLOCK_H=(32, 64), GROUP=(8,), TMA=(0, 1), num_warps=(4, 8),
        num_stages=(3, 4),
    ),
    "linear_merge": _grid(BLOCK_N=(16, 32, 64), BLOCK_P=(16, 32, 64), num_warps=(4,), num_stages=(1,)),
    "ppo_forward": [*_ELEMENTS, *({**config, "maxnreg": 128} for config in _ELEMENTS)],
    "ppo_backward": _ELEMENTS,
    "kl_kernel": _ELEMENTS,
    "whiten_moments": _ELEMENTS,
    "whiten_elements": _ELEMENTS,
    "whiten_backward": _ELEMENTS,
    "gae": _SEQUENCES,
    "shaped_gae": _SEQUENCES,
    "paged_attention": _grid(
        BLOCK_M=(16, 32, 64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(3, 5, 7)
    ),
    "paged_attention_merge": _grid(num_warps=(1, 2, 4), num_stages=(1,)),
    "kv_write": _blocks("BLOCK_C", (256, 512, 1024), (1, 2, 4)),
    "sample_groups": _grid(
        GROUP=(64, 128, 256), BLOCK_G=(16, 32, 64, 128), BLOCK_L=(256,), num_warps=(4, 8), num_stages=(1,)
    ),
    "sample_draw": _grid(BLOCK_S=(16, 32), CAPACITY=(1024, 2048, 4096), num_warps=(4, 8, 16), num_stages=(1,)),
    "adamw_step": _blocks("BLOCK_ROWS", (1, 2, 4, 8, 16)),
}  # fmt: skip


def _tunings() -> Iterator[Tuning]:
    head, tokens, ppo = f"N={N} H={H} V={V}", f"{N * 128} tokens", "linear_ppo_loss forward + backward"
    for vocab, up_to in ((4096, {"vocab": 8192}), (V, {})):
        shape, size = {"vocab": vocab}, f"N={N} V={vocab}"
        yield Tuning("logprobs_forward", "logprobs_from_logits forward", size, shape, up_to)
        yield Tuning("logprobs_backward", "logprobs_from_logits forward + backward", size, shape, up_to)
    yield Tuning("logprobs_merge", "logprobs_from_logits forward", f"N=16 V={V}", {}, {})
    yield Tuning("linear_rows", ppo, f"N={N} H=1024 V=4096", {"vocab": 4096}, {"vocab": 8192})
    yield Tuning("linear_rows", ppo, head, {"vocab": V}, {})
    yield Tuning("linear_statistics", "linear_logprobs forward", head, {}, {}, "ppomax fused")
    yield Tuning("linear_merge", "linear_logprobs forward", head, {}, {}, "ppomax fused")
    yield Tuning("linear_logprobs", "linear_logprobs forward", head, {}, {})
    yield Tuning("ppo_forward", "ppo_loss forward + backward", tokens, {}, {})
    yield Tuning("ppo_backward", "ppo_loss forward + backward", tokens, {}, {})
    yield Tuning("kl_kernel", "kl_penalty forward + backward", tokens, {}, {})
    for length, size in ((2048, f"{tokens} of 512 sequences"), (N * 128, tokens)):
        shape, up_to = {"mean_length": length}, {"mean_length": 16384} if length == 2048 else {}
        yield Tuning("whiten_moments", "masked_whiten forward", size, shape, up_to)
        yield Tuning("whiten_backward", "masked_whiten forward + backward", size, shape, up_to)
    yield Tuning("whiten_elements", "masked_whiten forward", tokens, {}, {})
    for name, lengths in (("gae", (512, 2048, N)), ("shaped_gae", (512, 1024, N))):
        for length in lengths:
            up_to = {} if length == N else {"mean_length": length}
            yield Tuning(name, name, f"{N * 64 // length} x {length}", {"mean_length": length}, up_to)
    decode, prefill = ("paged_attention decode", "64 x 4096"), ("paged_attention prefill", "8 x 512 of 4096")
    chunk = ("paged_attention prefill", "64 x 16 of 4096")
    heads = {"element_bytes": 2, "row_bytes": 256}  # of 128 halves
    for at, rows, up_to in ((decode, 4, {"rows": 16}), (chunk, 64, {"rows": 64}), (prefill, 2048, {})):
        yield Tuning("paged_attention", *at, {**heads, "rows": rows}, {**heads, **up_to})
    yield Tuning("paged_attention_merge", "paged_attention decode", "4 x 8192", {}, {})
    yield Tuning("kv_write", "write_kv", f"{N} tokens, 8 heads", {"columns": 1024}, {})
    for vocab, up_to in ((4096, {"vocab": 8192}), (V, {})):
        yield Tuning("sample_groups", "sample top-p", f"256 x {vocab}", {"vocab": vocab}, up_to)
        yield Tuning("sample_draw", "sample top-p", f"256 x {vocab}", {"vocab": vocab}, up_to)
    yield Tuning("adamw_step", "adamw_ with 8-bit moments", f"{N << 13} weights", {}, {})


TUNINGS = list(_tunings())
