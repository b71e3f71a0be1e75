"""What a policy update holds beside weights, gradients and optimizer state, for one vocabulary after another.

    python bench/update_memory.py [--device cpu] [--vocab 4096 32000 128256] [--json FILE]

One optimizer step of a small Llama (H 64, 2 layers) of random weights on packed responses. Counted are the bytes of
tensors that are alive at the same time, those inside the fused operations too; what has a weight's shape, as
gradients and moments have, is counted apart. Beside it stands what the logits alone would take.
"""

from __future__ import annotations

import argparse
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from ppomax.engine.attention import ATTENTION
from ppomax.engine.batch import pack
from ppomax.engine.config import OptimConfig
from ppomax.engine.models import CausalModel
from ppomax.engine.optim import Optimizer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARIES = (4096, 32_000, 128_256)
ROWS, PROMPT, RESPONSE = 16, 32, 128


class LiveTensors(TorchDispatchMode):
    """Most bytes that tensors which operations make take together: `peak_apart` of those whose shape is in `apart`,
    `peak` of the others, `peak_all`. The bodies of this package's operations are run inside."""

    def __init__(self, apart: set[torch.Size]) -> None:
        super().__init__()
        self.apart = apart
        self.live = self.peak = self.live_apart = self.peak_apart = self.peak_all = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.namespace == "ppomax":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in (*given, *self.known):
                self._made(x)
        return out

    def _made(self, x: Tensor) -> None:
        storage, apart = x.untyped_storage(), x.shape in self.apart
        self.known.add(storage._cdata)
        self._count(storage.nbytes(), apart)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes(), apart)

    def _freed(self, key: int, size: int, apart: bool) -> None:
        self.known.discard(key)
        self._count(-size, apart)

    def _count(self, size: int, apart: bool) -> None:
        if apart:
            self.live_apart += size
            self.peak_apart = max(self.peak_apart, self.live_apart)
        else:
            self.live += size
            self.peak = max(self.peak, self.live)
        self.peak_all = max(self.peak_all, self.live + self.live_apart)


def one_vocabulary(vocab: int, device: torch.device, rows: int = ROWS, micro_batches: int = 1) -> dict[str, int]:
    """Bytes at the peak of an optimizer step on so many times `rows` responses, the second step: moments are there."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=PROMPT + RESPONSE, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = ATTENTION
    policy = CausalModel(LlamaForCausalLM(config).to(device))
    optimizer = Optimizer(policy, OptimConfig(lr=1e-4), 2, grad_clip=1.0)
    tokens = np.random.default_rng(0).integers(2, vocab, (rows, PROMPT + RESPONSE)).tolist()
    batch = pack(tokens, [[False] * PROMPT + [True] * RESPONSE] * rows, device)
    counted = batch.num_rows
    old_logprobs, advantages = policy.logprobs(batch)[0].detach(), torch.randn(counted, device=device)

    def step() -> None:
        for _ in range(micro_batches):
            result = policy.policy_loss(
                batch, old_logprobs=old_logprobs, advantages=advantages, normalizer=counted * micro_batches
            )
            result.loss.backward()
        optimizer.step()

    step()
    live = LiveTensors({parameter.shape for parameter in policy.parameters()})
    with live:
        step()
    return {
        "vocabulary": vocab,
        "rows": counted,
        "workspace": live.peak,
        "gradients": live.peak_apart,
        "together": live.peak_all,
        "weights": sum(p.nbytes for p in policy.parameters()),
        "logits": 4 * counted * vocab,
    }


def measure(device: torch.device, vocabularies: tuple[int, ...] = VOCABULARIES) -> dict[str, Any]:
    return {
        "environment": environment(),
        "device": device.type,
        "sizes": [one_vocabulary(vocab, device) for vocab in vocabularies],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(torch.device(arguments.device), tuple(arguments.vocab))
    table = Table("vocabulary", "an update's own, MiB", "its gradients, MiB", "logits alone, MiB")
    for row in result["sizes"]:
        mib = (f"{row[name] / 2**20:,.1f}" for name in ("workspace", "gradients", "logits"))
        table.add_row(f"{row['vocabulary']:,}", *mib)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
