"""An iteration of PPO on a device that is not the host: one whose tensors have no contents.

What mixes tensors of the two raises, as on a GPU. Where the host reads from the device, and so waits for it, is noted,
and it gets ones. CUDA's graphs and streams are stand-ins; inside a capture nothing may pass between the two.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppomax.engine import low_memory
from ppomax.engine.batch import Prompt
from ppomax.engine.decoding import Decoder
from ppomax.engine.fake_models import Shapes, build
from ppomax.engine.layers import LayerOptions
from ppomax.engine.low_memory import Offload
from ppomax.engine.models import Placement
from ppomax.engine.ppo import PPO
from ppomax.engine.presets import preset
from ppomax.engine.rewards import ModelReward
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

DEVICE, OURS = torch.device("meta"), Path(__file__)
SHAPE = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
aten = torch.ops.aten


class Apart(TorchDispatchMode):
    """Runs what touches the device on fake tensors, and all else as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.reads: Counter[str] = Counter()
        """By the function of the engine that asked"""
        self.crossings = 0
        """Reads, and copies to the device"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, leaves = kwargs or {}, tree_leaves((args, kwargs or {}))
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        there = any(isinstance(x, Tensor) and x.is_meta for x in leaves)
        target = torch.device(kwargs.get("device") or "cpu")
        if not there and target != DEVICE:
            return func(*args, **kwargs)
        if func is aten._to_copy.default and not there:
            self.crossings += 1
        elif func is aten._local_scalar_dense.default:
            self.read()
            return 1
        elif func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.read()
            return args[0].new_empty(3)
        elif func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            self.read()
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        with self.fake:
            return func(*args, **kwargs)

    def read(self) -> None:
        self.crossings += 1
        places = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
        path, function = [(p, f) for p, f in places if p.parent.name in ("engine", "kernels") and p != OURS][-1]
        self.reads[f"{path.stem}.{function}"] += 1


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand-ins for streams and graphs; of each capture the pool, the stream and the crossings inside it."""
    made: list[Any] = []
    stream = lambda *_: SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)  # noqa: E731

    @contextmanager
    def graph(graph: Any, *, pool: Any, stream: Any) -> Iterator[None]:
        mode: Any = torch.utils._python_dispatch._get_current_dispatch_mode()
        before = mode.crossings
        yield
        made.append((pool, stream, mode.crossings - before))

    for name, value in (
        ("Stream", stream), ("current_stream", stream), ("stream", lambda stream: nullcontext()), ("graph", graph),
        ("CUDAGraph", lambda: SimpleNamespace(replay=lambda: None)), ("graph_pool_handle", object),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(low_memory, "_copy_stream", stream)
    monkeypatch.setattr(low_memory, "_pinned_like", lambda x: torch.empty(x.shape, dtype=x.dtype))
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: None)
    return made


def new_run(mode: Apart, **rollout: Any) -> PPO:
    """A run as on a GPU, with offloaded state."""
    config = preset(
        "ppo-max", rollouts_per_iteration=4, minibatch_size=2, ptx_coef=0.0, critic_pretrain_iterations=0,
        max_sequence=32, micro_batch_tokens=16, bootstrap_truncated=True, importance_clip=2.0,
        **{"runtime.checkpointing": "selective", "policy_optim.moments": "8bit", "rollout.sleep": True},
        **{f"rollout.{name}": value for name, value in rollout.items()},
        **{"rollout.max_response": 3, "rollout.kv_blocks": 9, "rollout.max_running": 3},
    )  # fmt: skip
    place = Placement(DEVICE, torch.bfloat16, attention="torch", layers=LayerOptions(config.runtime.checkpointing))
    with mode.fake:
        models = build(Shapes.of(SHAPE, SHAPE, SHAPE), place, config.lora)
    assert models.reward is not None
    reward, prompts = ModelReward(models.reward, 16), [Prompt([], [2 + n] * (2 + n)) for n in range(4)]
    decode = lambda tokens: " ".join(map(str, tokens))  # noqa: E731
    ppo = PPO(config, models.policy, models.reference, models.critic, reward, prompts, (), decode=decode)
    ppo.engine.decoder = Decoder(models.policy, ppo.engine.cache, graphs=True)
    for optimizer in (ppo.policy_optimizer, ppo.critic_optimizer):
        optimizer.offload = Offload(optimizer.adamw, DEVICE)
    mode.reads.clear()
    return ppo


def test_an_iteration_on_another_device(captures: list[Any]) -> None:
    """The host waits once a step of sampling, of an optimizer, and where it takes results."""
    with Apart() as mode:
        ppo = new_run(mode)
        metrics = ppo.iterate()
        reads = {name: count for name, count in mode.reads.items() if not name.startswith("measures.")}
        ppo.collect()
    assert {"policy/loss", "critic/loss", "reward/score_mean", "kl/ref"} <= metrics.keys()
    assert reads == {"rollout._compute": 6, "rollout.response": 3 * 4, "rewards.__call__": 1, "optim.step": 4}
    pools, streams, crossings = zip(*captures, strict=True)
    assert len(captures) > len(set(map(id, pools))) == 2, "graphs share memory from one sleep to the next"
    assert len(set(map(id, streams))) == 1
    assert not any(crossings), "a capture takes nothing from the host and tells it nothing"


def test_stop_texts_are_looked_for_in_one_read_a_step(captures: list[Any]) -> None:
    with Apart() as mode:
        new_run(mode, stop=("7",)).collect()
    assert mode.reads["rollout.tails"] == mode.reads["rollout._compute"] == 6
