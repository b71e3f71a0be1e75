"""Log-probs and losses over a vocabulary, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from ops import (
    Absent,
    Inputs,
    Op,
    Provider,
    against,
    compiled,
    doubled,
    mapped,
    on_gpu,
    over,
    peer,
    present,
    with_gradients,
)
from ppomax.kernels import api
from ppomax.kernels.gpu.launch import overriding
from ppomax.kernels.linear_logprobs import linear_logprobs_ref
from ppomax.kernels.linear_ppo import linear_ppo_loss_ref
from ppomax.kernels.logprobs import logprobs_from_logits_ref
from torch import Tensor

CLIP = 0.2
TRL_CHUNK, LIGER_CHUNK = 32_768, 4096  # columns of logits at a time, as those packages' trainers take them


def plain_logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def plain_linear_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return plain_logprobs(hidden @ weight.t(), labels)


def trl_logprobs() -> Any:
    selective, entropy = (peer("trl.trainer.utils", name) for name in ("selective_log_softmax", "entropy_from_logits"))
    if isinstance(selective, Absent):
        return selective
    return over(entropy, lambda f: lambda logits, labels: (selective(logits, labels), f(logits)))


def from_logits(n: int, vocab: int, dtype: torch.dtype, device: str) -> list[Op]:
    """Log-prob and entropy of each row, forward alone and with a gradient through both."""

    def inputs() -> Inputs:
        logits = (torch.randn(n, vocab, device=device) * 3).to(dtype)
        c, h = torch.randn(2, n, device=device)
        return {"logits": logits, "labels": torch.randint(0, vocab, (n,), device=device), "c": c, "h": h}

    def forward(function: Any) -> Provider:
        return torch.no_grad()(lambda logits, labels, c, h: tuple(function(logits, labels)))

    def backward(function: Any) -> Provider:
        def loss(logits: Tensor, labels: Tensor, c: Tensor, h: Tensor) -> Tensor:
            logprobs, entropy = function(logits, labels)
            return (logprobs * c).sum() + (entropy * h).sum()

        return with_gradients(loss, "logits")

    functions = present(
        ppomax=api.logprobs_from_logits,
        torch_eager=plain_logprobs,
        torch_compile=compiled(plain_logprobs, device),
        TRL=trl_logprobs(),
    )
    size, width = f"N={n} V={vocab}", dtype.itemsize
    return [
        Op(
            "logprobs_from_logits forward",
            size,
            inputs,
            mapped(functions, forward),
            against(forward(logprobs_from_logits_ref)),
            1e-3,
            bytes=n * (vocab * width + 16),
            gate_ms=0.56,
        ),
        Op(
            "logprobs_from_logits forward + backward",
            size,
            inputs,
            mapped(functions, backward),
            against(doubled(backward(logprobs_from_logits_ref))),
            1e-2,
            bytes=n * (3 * vocab * width + 40),
        ),
    ]


def cross_entropy_from_logits(n: int, vocab: int, dtype: torch.dtype, device: str) -> list[Op]:
    """Log-probs alone, with their gradient: where kernels for cross-entropy compare."""

    def inputs() -> Inputs:
        logits = (torch.randn(n, vocab, device=device) * 3).to(dtype)
        return {"logits": logits, "labels": torch.randint(0, vocab, (n,), device=device)}

    def loss(function: Callable[[Tensor, Tensor], Tensor]) -> Provider:
        return with_gradients(lambda logits, labels: function(logits, labels) / n, "logits")

    flash = on_gpu(peer("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss"), device)
    liger = on_gpu(peer("liger_kernel.transformers.functional", "liger_cross_entropy"), device)
    functions = present(
        ppomax=lambda z, y: -api.logprobs_from_logits(z, y).logprobs.sum(),
        torch_eager=plain_cross_entropy,
        torch_compile=compiled(plain_cross_entropy, device),
        flash_attn=over(flash, lambda f: lambda z, y: f(z, y)[0].sum()),
        Liger_with_a_copy=over(liger, lambda f: lambda z, y: f(z.clone(), y, reduction="sum")),  # it overwrites
    )
    judge = against(doubled(loss(lambda z, y: F.cross_entropy(z, y, reduction="sum"))))
    return [
        Op(
            "cross-entropy from logits forward + backward",
            f"N={n} V={vocab}",
            inputs,
            mapped(functions, loss),
            judge,
            1e-2,
            bytes=n * (3 * vocab * dtype.itemsize + 24),
        )
    ]


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def head_inputs(n: int, hidden: int, vocab: int, dtype: torch.dtype, device: str) -> Inputs:
    """Logits of standard deviation 3."""
    x = torch.randn(n, hidden, device=device).to(dtype)
    weight = (torch.randn(vocab, hidden, device=device) * (3 / hidden**0.5)).to(dtype)
    return {"hidden": x, "weight": weight, "labels": torch.randint(0, vocab, (n,), device=device)}


def linear_logprobs(n: int, hidden: int, vocab: int, dtype: torch.dtype, device: str) -> list[Op]:
    """Log-prob and entropy from hidden states, as scoring calls it: no gradient."""

    def forward(function: Any) -> Provider:
        return torch.no_grad()(lambda hidden, weight, labels: tuple(function(hidden, weight, labels)))

    functions = present(
        ppomax=api.linear_logprobs,
        ppomax_fused=None if device == "cpu" else fused_linear_logprobs,
        torch_eager=plain_linear_logprobs,
        torch_compile=compiled(plain_linear_logprobs, device),
    )
    return [
        Op(
            "linear_logprobs forward",
            f"N={n} H={hidden} V={vocab}",
            lambda: head_inputs(n, hidden, vocab, dtype, device),
            mapped(functions, forward),
            against(forward(linear_logprobs_ref)),
            1e-2,
            bytes=dtype.itemsize * hidden * (n + vocab),
            flops=2.0 * n * hidden * vocab,
            gate_ms=12.5,
        )
    ]


def fused_linear_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
    """With the statistics in the product's epilogue, whichever way the table of configurations prefers."""
    with overriding("linear_logprobs", {"fused": 1}):
        return api.linear_logprobs(hidden, weight, labels)


def linear_cross_entropy(n: int, hidden: int, vocab: int, dtype: torch.dtype, device: str) -> list[Op]:
    """Mean cross-entropy from hidden states with the gradients of both factors."""

    def loss(function: Any) -> Provider:
        return with_gradients(function, "hidden", "weight")

    chunked = over(
        peer("torch.nn", "LinearCrossEntropyOptions"), lambda made: partial(F.linear_cross_entropy, options=made())
    )
    cce = on_gpu(peer("cut_cross_entropy", "linear_cross_entropy"), device)
    liger = on_gpu(peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"), device)
    trl = peer("trl.kernels", "ChunkedLogProbFunction")
    liger_chunked = peer("liger_kernel.chunked_loss.fused_linear_ppo", "_ChunkedSelectiveLogProbFunction")
    functions = present(
        ppomax=lambda hidden, weight, labels: api.linear_cross_entropy(hidden, weight, labels).loss,
        ppomax_with_recomputed_logits=lambda hidden, weight, labels: (
            -api.linear_logprobs(hidden, weight, labels).logprobs.mean()
        ),
        torch_eager=plain_linear_cross_entropy,
        torch_compile=compiled(plain_linear_cross_entropy, device),
        torch_chunked=by_position(chunked),
        TRL_chunked=over(trl, trl_cross_entropy),
        cut_cross_entropy=by_position(cce),
        Liger=by_position(liger),
        Liger_chunked=over(liger_chunked, liger_cross_entropy),
    )
    return [
        Op(
            "linear_cross_entropy forward + backward",
            f"N={n} H={hidden} V={vocab}",
            lambda: head_inputs(n, hidden, vocab, dtype, device),
            mapped(functions, loss),
            against(doubled(loss(plain_linear_cross_entropy64))),
            2e-2,
            bytes=2 * dtype.itemsize * hidden * (n + vocab),
            flops=6.0 * n * hidden * vocab,
        )
    ]


def by_position(function: Any) -> Any:
    """The function called with positional arguments, whatever it names them."""
    return over(function, lambda f: lambda hidden, weight, labels: f(hidden, weight, labels))


def trl_cross_entropy(function: Any) -> Any:
    """From the log-probs of TRL's chunked LM head, the one output asked for, by its own chunk size."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -function.apply(hidden, weight, None, labels, 1.0, TRL_CHUNK, None, 1.0, ())[0].mean()

    return loss


def liger_cross_entropy(function: Any) -> Any:
    """From the log-probs that Liger's chunked losses of policies start from."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -function.apply(hidden, weight, labels, None, 1.0, LIGER_CHUNK).mean()

    return loss


def plain_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


def plain_linear_cross_entropy64(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), labels)


def plain_policy(hidden: Tensor, weight: Tensor, labels: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    logp = torch.log_softmax((hidden @ weight.t()).float(), -1).gather(1, labels[:, None]).squeeze(1)
    ratio = torch.exp(logp - old_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()


def liger_policy(make: Any) -> Any:
    """Liger's chunked loss, told that each token is a sequence of its own: it takes an advantage a sequence."""
    loss = make(beta=0.0, compiled=False, use_ref_model=False, chunk_size=1024, epsilon_low=CLIP, epsilon_high=CLIP,
                loss_type="bnpo")  # fmt: skip

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        mask = torch.ones_like(advantages)[:, None]
        rows = hidden[:, None], weight, labels[:, None], mask, advantages
        result: Tensor = loss(*rows, old_per_token_logps=old_logprobs[:, None])[0]
        return result

    return run


def linear_ppo(n: int, hidden: int, vocab: int, dtype: torch.dtype, device: str) -> list[Op]:
    """The clipped loss from hidden states with its gradients: over all rows, and where half are prompts."""

    def inputs() -> Inputs:
        given = head_inputs(n, hidden, vocab, dtype, device)
        with torch.no_grad():
            parts = zip(given["hidden"].split(1024), given["labels"].split(1024), strict=True)
            logp = torch.cat([plain_linear_logprobs(x, given["weight"], y)[0] for x, y in parts])
        rows = torch.randperm(n, device=device)[: n // 2].sort().values
        old = logp + 0.2 * torch.randn(n, device=device)
        return {**given, "old_logprobs": old, "advantages": torch.randn(n, device=device), "rows": rows}

    def dense(function: Any) -> Provider:
        return with_gradients(lambda rows, **given: function(**given), "hidden", "weight")

    def half(function: Any) -> Provider:
        def loss(rows: Tensor, weight: Tensor, **given: Tensor) -> Tensor:
            return function(weight=weight, **{name: x[rows] for name, x in given.items()})

        return with_gradients(loss, "hidden", "weight")

    def exact(**given: Any) -> Tensor:
        return linear_ppo_loss_ref(**given, clip_eps=CLIP).loss

    functions = present(
        ppomax=lambda **given: api.linear_ppo_loss(**given, clip_eps=CLIP).loss,
        torch_eager=plain_policy,
        torch_compile=compiled(plain_policy, device),
        Liger_chunked=over(peer("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss"), liger_policy),
    )
    size, flops = f"N={n} H={hidden} V={vocab}", 6.0 * n * hidden * vocab
    moved = 2.0 * dtype.itemsize * hidden * (n + vocab)
    dense_name = "linear_ppo_loss forward + backward"
    return [
        Op(
            dense_name,
            size,
            inputs,
            mapped(functions, dense),
            against(doubled(dense(exact))),
            5e-2,
            bytes=moved,
            flops=flops,
            gate_ms=40.0,
        ),
        Op(
            f"{dense_name}, half the rows prompts",
            size,
            inputs,
            mapped(functions, half),
            against(doubled(half(exact))),
            5e-2,
            bytes=moved,
            flops=flops / 2,
            gate_of=(dense_name, 0.55),
        ),
    ]


def linear_ppo_options(n: int, hidden: int, vocab: int, dtype: torch.dtype, device: str) -> list[Op]:
    """The clipped loss with everything that it may be asked for."""
    options: dict[str, Any] = {"temperature": 0.8, "softcap": 30.0, "dual_clip": 3.0, "entropy_coef": 0.01,
                               "kl_coef": 0.05}  # fmt: skip

    def inputs() -> Inputs:
        per_token = ("old_logprobs", "advantages", "ref_logprobs", "importance_weights")
        rows = dict(zip(per_token, torch.rand(4, n, device=device) - 5.0, strict=True))
        bias = torch.randn(vocab, device=device).to(dtype)
        return {**head_inputs(n, hidden, vocab, dtype, device), **rows, "advantages": rows["advantages"] + 4.5,
                "importance_weights": rows["importance_weights"] + 5.5, "bias": bias,
                "mask": torch.rand(n, device=device) < 0.5}  # fmt: skip

    def loss(function: Any) -> Provider:
        return with_gradients(lambda **given: function(**given, **options).loss, "hidden", "weight", "bias")

    moved, flops = 2.0 * dtype.itemsize * hidden * (n + vocab), 6.0 * n * hidden * vocab
    providers, judge = {"ppomax": loss(api.linear_ppo_loss)}, against(doubled(loss(linear_ppo_loss_ref)))
    return [
        Op(
            "linear_ppo_loss with all options",
            f"N={n} H={hidden} V={vocab}",
            inputs,
            providers,
            judge,
            5e-2,
            bytes=moved,
            flops=flops,
        )
    ]
