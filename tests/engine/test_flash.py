"""flash-attn's and torch's attention kernels: what they are called with, by stand-ins that check it and compute the
right answer; and the kernels themselves, against each other, where a GPU and the packages are at hand."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen
from ppomax.engine import flash, rollout
from ppomax.engine.attention import Varlen
from ppomax.engine.batch import PackedBatch, cumulative, pack
from ppomax.engine.config import RolloutConfig, RuntimeConfig
from ppomax.engine.errors import InputError
from ppomax.engine.flash import check_fits, packed, paged, resolve_packed, resolve_paged
from ppomax.engine.models import CPU, CausalModel, Placement, load_policy
from ppomax.kernels.paged_attention import paged_attention_ref
from torch import Tensor

GPU, HOST = torch.device("cuda"), torch.device("cpu")
FAMILIES = ["llama", "qwen2-window", "mistral", "gemma2-uncapped"]
LENGTHS = [7, 1, 12, 5]
kernels = pytest.mark.parametrize("kernel", ["flash-attn", "torch"])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: tuple[int, int], softcap: float) -> Tensor:
    """One sequence, by the libraries' definition: query i of m sees the keys i + n - m - left to i + n - m + right."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    z = torch.einsum("ihd,jhd->hij", q, k) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    left, right = window
    i = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    j = torch.arange(k.shape[0])
    seen = (j <= i + right if right >= 0 else j > -1) & (j >= i - left if left >= 0 else j > -1)
    return torch.einsum("hij,jhd->ihd", z.masked_fill(~seen, -torch.inf).softmax(-1), v)


def is_bounds(bounds: Tensor, total: int) -> bool:
    ends = bounds.tolist()
    return bounds.dtype == torch.int32 and bounds.is_contiguous() and ends[0] == 0 and ends[-1] == total


@dataclass
class Library:
    """Stands for both libraries' functions, with the signatures of theirs."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert causal
        assert not dropout_p
        window = (window_size[0], 0)  # what causal means
        self.calls.append({"window": window_size, "deterministic": deterministic, "longest": max_seqlen_q})
        used = cu_seqlens_k.diff()
        return self.run(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window, softcap,
            block_table, used,
        )  # fmt: skip

    def varlen_attn(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int,
        max_k: int, *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> Tensor:  # fmt: skip
        assert enable_gqa or query.shape[1] == key.shape[-2]
        assert (block_table is None) == (seqused_k is None)
        assert num_splits == (None if block_table is None else 1)
        assert cu_seq_k is not None
        self.calls.append({"window": window_size, "longest": max_q})
        used = cu_seq_k.diff() if seqused_k is None else seqused_k
        return self.run(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, 0.0, block_table, used
        )  # fmt: skip

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int,
        scale: float | None, window: tuple[int, int], softcap: float, block_table: Tensor | None, used: Tensor,
    ) -> Tensor:  # fmt: skip
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert scale is not None
        assert is_bounds(starts_q, q.shape[0])
        assert is_bounds(starts_k, int(used.sum()))
        assert int(starts_q.diff().max()) <= max_q
        assert int(used.max()) <= max_k
        out = []
        for s, queries in enumerate(q.split(starts_q.diff().tolist())):
            if block_table is None:
                keys, values = (x[starts_k[s] : starts_k[s + 1]] for x in (k, v))
            else:
                assert k.shape[1] % 256 == 0
                keys, values = (x[block_table[s].long()].flatten(0, 1)[: used[s]] for x in (k, v))
            out.append(attend(queries, keys, values, scale=scale, window=window, softcap=softcap))
        return torch.cat(out)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """flash-attn and torch's varlen attention, as stand-ins."""
    stand_in, module = Library(), ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = stand_in.flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(torch_varlen, "varlen_attn", stand_in.varlen_attn)
    packed.cache_clear()
    paged.cache_clear()
    yield stand_in
    packed.cache_clear()
    paged.cache_clear()


def batch_of(lengths: list[int]) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(2, 61, (length,), generator=generator).tolist() for length in lengths]
    return pack(tokens, [[False] + [True] * (length - 1) for length in lengths], HOST)


def twins(new_policy: Any, family: str, kernel: str, **options: Any) -> tuple[CausalModel, CausalModel]:
    """The same float64 policy, with the kernel and with one call a sequence."""
    plain = new_policy(family, dtype=torch.float64)
    return CausalModel(new_policy(family, dtype=torch.float64).model, replace(CPU, attention=kernel, **options)), plain


@pytest.mark.parametrize(
    ("kernel", "family"),
    [("flash-attn", "gemma2"), *((kernel, family) for kernel in flash.KERNELS for family in FAMILIES)],
)
def test_a_model_on_the_kernels_is_the_model(family: str, kernel: str, new_policy: Any, library: Library) -> None:
    ours, plain = twins(new_policy, family, kernel)
    batch = batch_of(LENGTHS)
    for model in (ours, plain):
        logprobs, entropy = model.logprobs(batch)
        (logprobs.sum() + entropy.sum()).backward()
    tolerance = 1e-6 if family == "gemma2" else 1e-9  # soft-capped weights are rounded to float32 in `sdpa`
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=tolerance * float(other.grad.abs().max()))
    windows = {call["window"] for call in library.calls}
    assert windows == {"llama": {(-1, 0)}, "mistral": {(4, 0)}}.get(family, {(-1, 0), (4, 0)})
    assert {call["longest"] for call in library.calls} == {max(LENGTHS)}


def test_deterministic_backward(new_policy: Any, library: Library) -> None:
    for deterministic in (False, True):
        policy, _ = twins(new_policy, "llama", "flash-attn", deterministic=deterministic)
        policy.hidden(batch_of(LENGTHS))
        assert {call.pop("deterministic") for call in library.calls} == {deterministic}
        library.calls.clear()


def test_bounds_are_made_once_a_batch(library: Library) -> None:
    attention = Varlen(LENGTHS, kernel="torch", device=HOST)
    assert attention.cu_seqlens.tolist() == [0, 7, 8, 20, 25]
    assert attention.cu_seqlens.dtype == torch.int32
    seen = []
    attention.run = lambda *inputs, **_: seen.append(inputs[3])  # type: ignore[assignment, return-value]
    x = torch.zeros(25, 2, 8)
    for layer in range(2):
        attention.attend(layer, x, x, x, scale=1.0, window=None, softcap=None)
    assert all(bounds is attention.cu_seqlens for bounds in seen)


@pytest.mark.parametrize("family", FAMILIES)
@kernels
def test_sampling_on_the_kernels(
    family: str, kernel: str, new_policy: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked prefill beside decode, prompts shared and not: the tokens and log-probs are those of the other path."""
    config = RolloutConfig(
        max_response=6, temperature=1.0, top_p=1.0, max_running=3, prefill_tokens=8, block_size=256, kv_blocks=8
    )
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21], [20, 21], [30, 31, 32, 33, 34]]
    policy = new_policy(family, dtype=torch.float64)
    both = []
    for chosen in ("gather", kernel):
        monkeypatch.setattr(rollout, "resolve_paged", lambda *_, chosen=chosen: chosen)
        engine = rollout.RolloutEngine(policy, config, [1], 16)
        assert engine.kernel == chosen
        both.append(engine.generate(prompts, list(range(4))))
    for ours, theirs in zip(*both, strict=True):
        assert ours.response == theirs.response
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-5)
    assert {call["longest"] for call in library.calls} >= {1, 2}


@pytest.mark.parametrize(
    ("name", "device", "dtype", "installed", "expected"),
    [
        ("auto", HOST, torch.float32, {"flash-attn", "torch"}, "sdpa"),
        ("auto", GPU, torch.bfloat16, {"flash-attn", "torch"}, "flash-attn"),
        ("auto", GPU, torch.bfloat16, {"torch"}, "torch"),
        ("auto", GPU, torch.bfloat16, set(), "sdpa"),
        ("auto", GPU, torch.float32, {"flash-attn", "torch"}, "sdpa"),
        ("torch", GPU, torch.bfloat16, {"flash-attn", "torch"}, "torch"),
        ("sdpa", GPU, torch.bfloat16, {"flash-attn", "torch"}, "sdpa"),
    ],
)
def test_what_auto_is(
    name: str, device: torch.device, dtype: torch.dtype, installed: set[str], expected: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(flash, "_missing", lambda kernel, needed: None if kernel in installed else "missing")
    assert resolve_packed(name, device, dtype) == expected


def test_what_auto_is_over_the_cache(library: Library) -> None:
    assert resolve_paged("auto", HOST, torch.float32) == "gather"
    assert resolve_paged("auto", GPU, torch.float32) == "triton"
    for name in ("triton", "torch", "flash-attn"):
        assert resolve_paged(name, GPU, torch.bfloat16) == name
        with pytest.raises(InputError, match=rf"RolloutConfig\.attention = '{name}' runs on a GPU, and .* is cpu"):
            resolve_paged(name, HOST, torch.bfloat16)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
@pytest.mark.parametrize("resolve", [resolve_packed, resolve_paged])
def test_flash_attn_is_not_installed(resolve: Callable[..., str]) -> None:
    with pytest.raises(InputError, match=r"Config\.attention = 'flash-attn': the package flash-attn is not installed"):
        resolve("flash-attn", GPU, torch.bfloat16)


def test_the_installed_torch_has_the_kernels() -> None:
    assert resolve_packed("torch", GPU, torch.bfloat16) == "torch"


def test_a_torch_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda query, key, value, is_causal=False: query)
    monkeypatch.setattr(flash, "find_spec", lambda name: None if name == "flash_attn" else name)
    with pytest.raises(InputError, match=r"torch .* has no attention of packed sequences with windows"):
        resolve_packed("torch", GPU, torch.bfloat16)
    assert resolve_packed("auto", GPU, torch.bfloat16) == "sdpa"


def test_a_torch_without_a_paged_cache(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    """As torch 2.11: packed sequences are served, grouped heads without a flag for them."""
    given: list[dict[str, Any]] = []

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        given.append({"scale": scale, "window_size": window_size})
        return library.varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=True
        )

    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(flash, "find_spec", lambda name: None if name == "flash_attn" else name)
    assert resolve_packed("auto", GPU, torch.bfloat16) == resolve_packed("torch", GPU, torch.bfloat16) == "torch"
    with pytest.raises(InputError, match=r"RolloutConfig\.attention = 'torch': .* no attention over a paged cache"):
        resolve_paged("torch", GPU, torch.bfloat16)
    q, k, v = (torch.randn(sum(LENGTHS), heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    options: Any = {"scale": 0.3, "window": 3, "softcap": None}
    ours, plain = (Varlen(LENGTHS, kernel=kernel).attend(0, q, k, v, **options) for kernel in ("torch", "sdpa"))
    torch.testing.assert_close(ours, plain)
    assert given == [{"scale": 0.3, "window_size": (2, 0)}]


@kernels
def test_what_the_kernels_do_not_take(kernel: str, library: Library) -> None:
    with pytest.raises(InputError, match=r"RuntimeConfig\.attention = .* computes in bfloat16, and .* float32"):
        resolve_packed(kernel, GPU, torch.float32)
    with pytest.raises(InputError, match=r"RuntimeConfig\.attention = .* runs on a GPU, and the device is cpu"):
        Placement.of(RuntimeConfig(device="cpu", dtype="bfloat16", attention=kernel))  # type: ignore[arg-type]


@kernels
def test_blocks_of_a_size_that_they_do_not_take(kernel: Any) -> None:
    assert RolloutConfig(attention=kernel, block_size=512).block_size == 512
    assert RolloutConfig(attention="triton", block_size=16).block_size == 16
    with pytest.raises(InputError, match=r"RolloutConfig\.block_size = 16: expected a multiple of 256"):
        RolloutConfig(attention=kernel, block_size=16)


def test_models_that_do_not_fit(new_model: Any, library: Library) -> None:
    check_fits("torch", new_model("llama").config)
    check_fits("flash-attn", new_model("gemma2").config)
    check_fits("sdpa", new_model("gemma2", head_dim=12).config)
    with pytest.raises(InputError, match="no soft cap, and the model caps its attention at 3"):
        check_fits("torch", new_model("gemma2").config)
    for size in (12, 264):
        with pytest.raises(InputError, match=f"multiples of 8 up to 256, and the model's are of {size}"):
            check_fits("flash-attn", new_model("qwen3", head_dim=size).config)
    with pytest.raises(InputError, match="no soft cap"):
        packed("torch")(*[torch.zeros(1, 1, 8)] * 3, None, 1, scale=1.0, window=None, softcap=2.0, deterministic=False)


def test_a_policy_that_does_not_fit_is_refused_when_it_is_loaded(
    new_policy: Any, tokenizer: Any, tmp_path: Any, library: Library
) -> None:
    from ppomax.engine.checkpoint import save_model

    save_model(new_policy("gemma2", vocab_size=len(tokenizer)), tokenizer, tmp_path)
    with pytest.raises(InputError, match="no soft cap"):
        load_policy(tmp_path, replace(CPU, attention="torch"))
    assert load_policy(tmp_path, replace(CPU, attention="flash-attn")).placement.attention == "flash-attn"


def test_deterministic_algorithms_are_torchs_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppomax.engine import models

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert Placement.of(RuntimeConfig(device="cpu", deterministic=True)).deterministic
        assert not torch.are_deterministic_algorithms_enabled(), "a CPU needs no switch"
        models._use_fixed_algorithms()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("window", [None, 3])
def test_torchs_operation_takes_the_calls(window: int | None) -> None:
    """torch's own function and the shapes of its operation, on tensors without memory."""
    meta, options = torch.device("meta"), {"scale": 0.1, "window": window, "softcap": None}
    q, k, v = (torch.empty(25, n, 64, device=meta, dtype=torch.bfloat16, requires_grad=True) for n in (8, 2, 2))
    out = Varlen(LENGTHS, kernel="torch", device=meta).attend(0, q, k, v, **options)
    out.sum().backward()
    assert [x.shape for x in (out, q.grad, k.grad, v.grad)] == [x.shape for x in (q, q, k, v)]
    if flash._missing("torch", flash._PAGED):
        return
    pools = [torch.empty(6, 256, 2, 64, device=meta, dtype=torch.bfloat16) for _ in range(2)]
    table, used = torch.empty(4, 3, device=meta, dtype=torch.int32), torch.empty(4, device=meta, dtype=torch.int32)
    bounds = cumulative(LENGTHS, meta)
    with torch.no_grad():
        assert paged("torch")(q, *pools, table, used, bounds, bounds, 12, **options).shape == q.shape


def available(needed: set[str]) -> list[Any]:
    found = []
    for name in ("flash-attn", "torch"):
        reason = "needs a GPU" if not torch.cuda.is_available() else flash._missing(name, needed)
        found.append(pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason))))
    return found


@needs_gpu
@pytest.mark.parametrize("kernel", available(flash._PACKED))
@pytest.mark.parametrize("window", [None, 33])
def test_packed_on_a_gpu(kernel: str, window: int | None) -> None:
    """Nearer to float64, or hardly farther, than one call a sequence in the same dtype; gradients too."""
    torch.manual_seed(0)
    lengths, options = [70, 1, 200, 33], {"scale": 0.1, "window": window, "softcap": None}
    inputs = [torch.randn(sum(lengths), heads, 64, device=GPU, dtype=torch.bfloat16) for heads in (8, 2, 2)]
    results = []
    for name, dtype in ((kernel, torch.bfloat16), ("sdpa", torch.bfloat16), ("sdpa", torch.float64)):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
        out = Varlen(lengths, kernel=name, device=GPU).attend(0, q, k, v, **options)
        out.square().sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, plain, truth in zip(*results, strict=True):
        assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-6


@needs_gpu
@pytest.mark.parametrize("kernel", ["triton", *available(flash._PAGED)])
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("queries", [[1, 1, 1], [5, 1, 40]], ids=["decode", "chunked"])
def test_paged_on_a_gpu(kernel: str, window: int | None, queries: list[int]) -> None:
    from ppomax.kernels.api import paged_attention

    torch.manual_seed(0)
    lens = [300, 1, 90]
    pools = [torch.randn(6, 256, 2, 64, device=GPU, dtype=torch.bfloat16) for _ in range(2)]
    table = torch.tensor([[3, 1], [5, 0], [2, 0]], dtype=torch.int32, device=GPU)
    q = torch.randn(sum(queries), 8, 64, device=GPU, dtype=torch.bfloat16)
    used, bounds = torch.tensor(lens, dtype=torch.int32, device=GPU), cumulative(queries, GPU)
    options = {"scale": 0.1, "window": window, "softcap": None}
    truth = paged_attention_ref(q, *pools, table, used, bounds, **options)
    if kernel == "triton":
        ours = paged_attention(q, *pools, table, used, bounds, **options)
    else:
        ours = paged(kernel)(q, *pools, table, used, bounds, cumulative(lens, GPU), max(queries), **options)
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-2)
