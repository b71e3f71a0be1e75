"""The TRL adapter: against loops over TRL's documented conventions, and against TRL where it is importable."""

import importlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from ppomax.kernels.adapters import trl

LABELS = [[0, 6, 3], [2, 1, 5]]


def test_masked_statistics(fields: Any, loops: Any, same: Any) -> None:
    f = fields()
    x, rows = f.values, f.rows("values")
    kept = [v for row, flags in zip(rows, f.keep, strict=True) for v, flag in zip(row, flags, strict=True) if flag]
    mean = sum(kept) / len(kept)
    squares = sum((v - mean) ** 2 for v in kept)
    same(trl.masked_mean(x, f.mask), mean)
    same(trl.masked_var(x, f.mask), squares / (len(kept) - 1))
    same(trl.masked_var(x, f.mask, unbiased=False), squares / len(kept))
    same(trl.masked_whiten(x, f.mask), loops.whitened(rows, f.keep), ulps=128)
    same(trl.masked_whiten(x, f.mask, shift_mean=False), loops.whitened(rows, f.keep, centred=False), ulps=128)


@pytest.mark.parametrize("axis", [1, -1, 0])
def test_mean_along_an_axis(axis: int, fields: Any, loops: Any, same: Any) -> None:
    f = fields(empty=True)
    x, keep = f.values, f.mask
    if axis == 0:
        x, keep = x.t(), keep.t()
    exact = [loops.row_mean(row, flags) for row, flags in zip(f.rows("values"), f.keep, strict=True)]
    same(trl.masked_mean(x, keep, axis=axis), exact)


def test_whitening_takes_a_gradient(fields: Any) -> None:
    """None reaches masked values; the gradient of a whitened sum is 0, as the mean is taken off."""
    f = fields()
    x = f.leaf("values")
    (slope,) = torch.autograd.grad((trl.masked_whiten(x, f.mask) ** 3).sum(), x)
    assert bool(slope.isfinite().all())
    assert bool((slope[~f.mask] == 0).all())
    assert abs(float(slope.sum())) < 1e-4 * float(slope.abs().sum())


@pytest.fixture
def logits(dtype: torch.dtype) -> torch.Tensor:
    """[2, 3, 7]: one row far below 0, one with -inf."""
    x = 3 * torch.randn(2, 3, 7, dtype=dtype)
    x[0, 1] -= 500.0
    x[1, 2, ::2] = -math.inf
    return x


def exact_rows(logits: torch.Tensor, loops: Any, temperature: float = 1.0) -> list[list[Any]]:
    return [
        [loops.softmax_row(x, y, temperature) for x, y in zip(*row, strict=True)]
        for row in zip(logits.double().tolist(), LABELS, strict=True)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropy(temperature: float, logits: Any, loops: Any, same: Any) -> None:
    exact = exact_rows(logits, loops, temperature)
    leaf = logits.clone().requires_grad_()
    logprobs = trl.selective_log_softmax(leaf, torch.tensor(LABELS), temperature)
    same(logprobs, [[t.logprob for t in row] for row in exact])
    same(torch.autograd.grad(logprobs.sum(), leaf)[0], [[t.d_logprob for t in row] for row in exact])
    both = trl.selective_log_softmax_and_entropy(leaf, torch.tensor(LABELS), temperature=temperature)
    assert torch.equal(both[0], logprobs)
    same(both[1], [[t.entropy for t in row] for row in exact])
    slope = [[[2 * a + b for a, b in zip(t.d_logprob, t.d_entropy, strict=True)] for t in row] for row in exact]
    same(torch.autograd.grad(2 * both[0].sum() + both[1].sum(), leaf)[0], slope)
    if temperature == 1.0:
        entropy = trl.entropy_from_logits(leaf)
        same(entropy, [[t.entropy for t in row] for row in exact])
        same(torch.autograd.grad(entropy.sum(), leaf)[0], [[t.d_entropy for t in row] for row in exact])


def test_row_mask(logits: Any, loops: Any, same: Any) -> None:
    keep = torch.tensor([[1, 0, 1], [0, 1, 1]])
    dirty = torch.where(keep[..., None] != 0, logits, torch.nan).requires_grad_()
    exact = exact_rows(logits, loops)
    logprobs, entropy = trl.selective_log_softmax_and_entropy(dirty, torch.tensor(LABELS), row_mask=keep)
    for got, name in ((logprobs, "logprob"), (entropy, "entropy")):
        rows = zip(exact, keep.tolist(), strict=True)
        same(got, [[getattr(t, name) if k else 0.0 for t, k in zip(*row, strict=True)] for row in rows])
    assert torch.equal(trl.selective_log_softmax(dirty, torch.tensor(LABELS), row_mask=keep), logprobs)
    (slope,) = torch.autograd.grad((logprobs + entropy).sum(), dirty)
    assert bool(slope.isfinite().all())
    assert bool((slope[keep == 0] == 0).all())


def test_several_tokens_a_position(logits: Any, loops: Any, same: Any) -> None:
    """An index [..., K], also of tokens whose logits are -inf, and of the only likely one."""
    index = torch.tensor([[[0, 1, 1], [6, 5, 2], [3, 3, 3]], [[1, 2, 3], [4, 5, 6], [0, 1, 5]]])
    rows = logits.double().tolist()
    exact = [
        [[loops.softmax_row(x, k, 0.7) for k in ks] for x, ks in zip(*row, strict=True)]
        for row in zip(rows, index.tolist(), strict=True)
    ]
    leaf = logits.clone().requires_grad_()
    logprobs = trl.selective_log_softmax(leaf, index, 0.7)
    finite = torch.tensor([[[t.logprob for t in ts] for ts in row] for row in exact]).isfinite()
    assert torch.equal(logprobs.isfinite(), finite)
    same(logprobs.detach()[finite], [t.logprob for row in exact for ts in row for t in ts if math.isfinite(t.logprob)],
         ulps=2048)  # fmt: skip
    (slope,) = torch.autograd.grad(logprobs[finite].sum(), leaf)
    expected = [
        [[sum(t.d_logprob[v] for t in ts if math.isfinite(t.logprob)) for v in range(7)] for ts in row] for row in exact
    ]
    same(slope, expected)
    keep = torch.rand(2, 3, 3) > 0.5
    masked = trl.selective_log_softmax(logits, index, 0.7, keep)
    assert torch.equal(masked, torch.where(keep, logprobs.detach(), 0.0))


def test_entropy_without_gradient_and_bad_temperature(logits: Any) -> None:
    index = torch.tensor(LABELS)
    logprobs, entropy = trl.selective_log_softmax_and_entropy(logits.requires_grad_(), index, False)
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    for function in (trl.selective_log_softmax, trl.selective_log_softmax_and_entropy):
        with pytest.raises(ValueError, match="temperature"):
            function(logits, index, temperature=0.0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")], ids=["log-probs", "and-entropy"])
def test_head(outputs: tuple[str, ...], softcap: float | None, dtype: torch.dtype, loops: Any, same: Any) -> None:
    """A scale before the softcap, the temperature after it."""
    hidden, weight = (torch.randn(n, 4, dtype=dtype).requires_grad_() for n in (6, 7))
    bias = torch.randn(7, dtype=dtype)
    targets = torch.tensor([0, 6, 3, 2, 1, 5])
    logprobs, entropy, *rest = trl.ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, 0.7, 32768, softcap, 1.5, outputs
    )
    assert rest == [None] * 3
    z = 1.5 * (hidden.double() @ weight.double().t() + bias.double())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    exact = [loops.softmax_row(x, y, 0.7) for x, y in zip(z.tolist(), targets.tolist(), strict=True)]
    same(logprobs, [t.logprob for t in exact])
    if "entropy" in outputs:
        same(entropy, [t.entropy for t in exact])
        logprobs = logprobs + entropy
        slope = [[a + b for a, b in zip(t.d_logprob, t.d_entropy, strict=True)] for t in exact]
    else:
        assert entropy is None
        slope = [t.d_logprob for t in exact]
    grads = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    exact_grads = torch.autograd.grad(z, (hidden, weight), torch.tensor(slope, dtype=torch.float64))
    for got, want in zip(grads, exact_grads, strict=True):
        same(got, want.double(), ulps=512)


def test_head_leaves_other_outputs_to_trl(fake_package: Any) -> None:
    calls: list[Any] = []
    theirs = type("ChunkedLogProbFunction", (), {"apply": staticmethod(lambda *given: calls.append(given))})
    module = fake_package("trl.kernels", ChunkedLogProbFunction=theirs)
    fake_package("trl.trainer.utils")
    with pytest.raises(RuntimeError, match="not installed"):
        trl.ChunkedLogProbFunction.apply(*[None] * 6, None, 1.0, ("is_top1",))  # type: ignore[arg-type]
    trl.install()
    try:
        module.ChunkedLogProbFunction.apply(*[None] * 6, None, 1.0, ("is_top1",))
    finally:
        trl.uninstall()
    assert calls == [(None,) * 7 + (1.0, ("is_top1",))]


# Against TRL itself


@pytest.fixture
def utils() -> Any:
    return pytest.importorskip("trl.trainer.utils", reason="trl is not importable", exc_type=ImportError)


@pytest.fixture
def ppo(utils: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """TRL's PPO trainer, in 1.12 and before."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    name = "trl.experimental.ppo.ppo_trainer"
    return pytest.importorskip(name, reason="this trl has no PPO trainer", exc_type=ImportError)


def test_signatures(utils: Any, same_signature: Any) -> None:
    names = ["entropy_from_logits"]
    if hasattr(utils, "selective_log_softmax_and_entropy"):
        names += ["selective_log_softmax", "selective_log_softmax_and_entropy"]
    for name in names:
        same_signature(getattr(trl, name), getattr(utils, name))


def test_ppo_signatures(ppo: Any, same_signature: Any) -> None:
    for name in ("masked_mean", "masked_var", "masked_whiten"):
        same_signature(getattr(trl, name), getattr(ppo, name))


def test_statistics_are_trl_s(ppo: Any, fields: Any, same: Any) -> None:
    f = fields(garbage=None)
    for name in ("masked_mean", "masked_var", "masked_whiten"):
        results = []
        for module in (trl, ppo):
            x = f.leaf("values")
            y = getattr(module, name)(x, f.mask)
            y = torch.where(f.mask, y, 0.0) if y.dim() else y
            results.append([y, *torch.autograd.grad(y.pow(3).sum(), x)])
        for ours, theirs in zip(*results, strict=True):
            same(ours, theirs.detach().double(), ulps=256, peer=True)


def test_log_probs_are_trl_s(utils: Any, dtype: torch.dtype, same: Any) -> None:
    index = torch.tensor(LABELS)
    several = torch.stack([index, index.flip(1)], -1)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("selective_log_softmax", (index,), {}),
        ("selective_log_softmax", (several,), {}),
        ("entropy_from_logits", (), {}),
    ]
    if hasattr(utils, "selective_log_softmax_and_entropy"):
        options = {"temperature": 0.7, "row_mask": torch.tensor([[1, 0, 1], [0, 1, 1]])}
        calls += [
            ("selective_log_softmax", (index,), options),
            ("selective_log_softmax_and_entropy", (index,), options),
        ]
    x = 3 * torch.randn(2, 3, 7, dtype=dtype)
    for name, arguments, options in calls:
        results = []
        for module in (trl, utils):
            leaf = x.clone().requires_grad_()
            out = getattr(module, name)(leaf, *arguments, **options)
            out = out if isinstance(out, tuple) else (out,)
            results.append([*out, *torch.autograd.grad(sum(o.sum() for o in out), leaf)])
        for ours, theirs in zip(*results, strict=True):
            same(ours, theirs.detach().double(), ulps=128)


def test_head_is_trl_s(utils: Any, same: Any) -> None:
    """A model given TRL's fused head, with and without ours in it."""
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this trl has no fused LM head")
    transformers = importlib.import_module("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=37, **sizes))
        utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
        labels = torch.randint(0, 37, (2, 9))
        labels[0, :4] = -100
        if ours:
            trl.install()
        try:
            out = model(input_ids=labels.clamp(min=0), labels=labels, fused_lm_head=True)
        finally:
            trl.uninstall()
        (out.loss + 0.1 * out.entropy.sum()).backward()
        results.append([out.loss, out.log_probs, out.entropy, *(p.grad for p in model.parameters())])
    for x, y in zip(*results, strict=True):
        same(x, y.detach().double(), ulps=256)


@pytest.fixture
def installed(utils: ModuleType) -> Iterator[list[str]]:
    yield trl.install()
    trl.uninstall()


def test_install_and_undo(utils: Any) -> None:
    before = utils.selective_log_softmax
    places = trl.install()
    try:
        assert "trl.trainer.utils.selective_log_softmax" in places
        assert utils.selective_log_softmax is trl.selective_log_softmax
        for place in places:
            module, _, name = place.rpartition(".")
            assert getattr(importlib.import_module(module), name).__module__ == "ppomax.kernels.adapters.trl"
    finally:
        assert trl.uninstall() == places
    assert utils.selective_log_softmax is before


def test_the_ppo_trainer_holds_ours(ppo: Any, installed: list[str]) -> None:
    for name in ("masked_mean", "masked_whiten", "selective_log_softmax"):
        assert getattr(ppo, name) is getattr(trl, name)
