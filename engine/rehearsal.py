"""One step of each phase of a run on tensors without contents: what `footprint.py` says is counted here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .batch import Minibatch, Prompt, Rollout, plan_minibatches
from .communication import Sizes
from .config import PPOConfig
from .fake_models import JUDGES, Shapes, build, products, weights
from .footprint import Footprint, Lengths, Trained
from .kv_cache import StepTensors, blocks_for
from .layers import LayerOptions, decoder_layers
from .live_bytes import LiveBytes, Usage
from .models import Placement, ScalarModel
from .optim import Optimizer
from .ppo import PPO, Experience
from .rewards import ModelReward
from .scoring import Scored
from .sft import language_modelling_backward
from .templates import Encoded


class Rehearsal:
    """One step of each phase on fake models."""

    def __init__(self, config: PPOConfig, shapes: Shapes, lengths: Lengths, on_gpu: bool, live: LiveBytes) -> None:
        self.config, self.lengths, self.live = config, lengths, live
        runtime = config.runtime
        self.place = Placement(
            torch.device("meta" if on_gpu else "cpu"), _dtype(runtime.dtype, on_gpu), runtime.exact,
            "torch" if on_gpu else "sdpa", layers=LayerOptions(runtime.checkpointing),
        )  # fmt: skip
        live.tag = "weights"
        self.models = build(shapes, self.place, config.lora)
        live.tag = "buffers"
        self.ppo = self._ppo()
        self.running = min(config.rollout.max_running, config.rollouts_per_iteration)
        self.prefilled = max(1, min(config.rollout.prefill_tokens // lengths.prompt, self.running))
        self.minibatch, self.experience = self._batch(self._sequences)
        self.usage: dict[str, Usage] = {}

    def _ppo(self) -> PPO:
        config, models = self.config, self.models
        longest = blocks_for(config.max_sequence, config.rollout.block_size)
        # stop texts take no memory and a decoder; kernels over the cache run on the GPU alone
        few = replace(config.rollout, kv_blocks=longest + 2, stop=(), attention="auto")
        reward: Any = ModelReward(models.reward, config.micro_batch_tokens) if models.reward else None
        return PPO(
            replace(config, rollout=few, ptx_coef=0.0),
            models.policy, models.reference, models.critic, reward,
            [Prompt([], [0] * self.lengths.prompt)],
            stop_tokens=[],
        )  # fmt: skip

    @property
    def _sequences(self) -> int:
        """Of a micro-batch."""
        return self._within_budget(self.config.minibatch_size)

    def _within_budget(self, sequences: int) -> int:
        return max(1, min(self.config.micro_batch_tokens // self.lengths.sequence, sequences))

    def _batch(self, count: int) -> tuple[Minibatch, Experience]:
        """A minibatch of one micro-batch of `count` sequences, and what the updates read beside it."""
        prompt, response = [0] * self.lengths.prompt, [0] * self.lengths.response
        rollouts = [Rollout(prompt, response, torch.zeros(0), True, [])] * count
        budget = count * self.lengths.sequence
        (minibatch,) = plan_minibatches(rollouts, count, budget, [0], self.place.device)
        rows = torch.empty(self.lengths.response * self.config.rollouts_per_iteration, device=self.place.device)
        experience: Any = dict.fromkeys(Experience.__dataclass_fields__, rows)
        experience["scored"] = Scored(rows, None, rows, rows, rows)
        experience["shaped"] = SimpleNamespace(returns=rows)
        if self.config.importance_clip is None:
            experience["importance_weights"] = None
        return minibatch, Experience(**experience)

    def run(self) -> Footprint:
        """Every phase once, and what was found."""
        trained = {name: self._step(name) for name in ("policy", "critic")}
        with torch.no_grad():
            self._sample()
            self._score()
        self._update()
        cache, policy, models = self.ppo.engine.cache, self.models.policy, self.models.all()
        text = policy.config.get_text_config()
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        layers = {name: [_bytes(layer) for layer in decoder_layers(model)] for name, model in models.items()}
        reduced = max(1.0, 4 / self.place.dtype.itemsize)  # gradients travel in float32
        blocks, block_size = cache.k_pools[0].shape[:2]
        return Footprint(
            parameters={name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
            dtype=str(self.place.dtype).removeprefix("torch."),
            itemsize=self.place.dtype.itemsize,
            weights=weights(self.models, shared=self.config.lora.rank > 0),
            sizes={
                name: Sizes(sum(layers[name]), _bytes(model) - sum(layers[name]), reduced)
                for name, model in models.items()
            },
            layer={name: max(sizes, default=0) for name, sizes in layers.items()},
            trained=trained,
            products={name: products(model) for name, model in models.items()},
            head=policy.head["weight"].numel(),
            vocabulary=text.vocab_size,
            attention_width=text.num_hidden_layers * text.num_attention_heads * head_size,
            kv_block=cache.nbytes // blocks,
            kv_token=cache.nbytes // (blocks * block_size),
            buffers=self.usage["decode"].parts.get("buffers", 0) - cache.nbytes,
            usage=self.usage,
            micro_batch=self._sequences,
            rewarded=self._within_budget(self.config.rollouts_per_iteration),
            running=self.running,
            prefilled=self.prefilled,
        )

    def _step(self, name: str) -> Trained:
        """An optimizer step of policy or critic, the first, which makes its state."""
        optimizer = self._optimizer(name)
        self.live.watch_gradients(optimizer.parameters)
        parameters = optimizer.parameters
        self._gradients(name)
        self.live.tag = "optimizer"
        with self.live.measured() as self.usage[f"step {name}"]:
            optimizer.step()
        states = [(key, x) for state in optimizer.adamw.state.values() for key, x in state.items()]
        tensors = [(key, x) for key, x in states if isinstance(x, Tensor)]
        return Trained(
            parameters=sum(p.numel() for p in parameters),
            gradients=sum(p.nbytes for p in parameters),
            low_bits=sum(x.nbytes for key, x in tensors if key == "low"),
            moments=sum(x.nbytes for key, x in tensors if key != "low"),
        )

    def _optimizer(self, name: str) -> Optimizer:
        return self.ppo.policy_optimizer if name == "policy" else self.ppo.critic_optimizer

    def _sample(self) -> None:
        """A prefill step of as many prompts as one takes, and a decode step at full length."""
        prompt = self.lengths.prompt
        # A CPU attends to one prompt after another, in little memory and in many operations.
        self.live.closed = self.place.device.type == "cpu"
        self._forward("prefill", [prompt] * self.prefilled, [prompt] * self.prefilled)
        self.live.closed = False
        self._forward("decode", [1] * self.running, [self.lengths.sequence] * self.running)

    def _forward(self, name: str, new: list[int], cached: list[int]) -> None:
        engine, on = self.ppo.engine, self.place.device
        tokens, rows = sum(new), len(new)
        whole = torch.zeros(tokens, dtype=torch.int64, device=on)
        few = torch.zeros(rows, dtype=torch.int64, device=on)
        lengths, bounds = (_real(x, on) for x in (cached, [0, *accumulate(new)]))
        step = StepTensors(whole, whole, whole, few, lengths, bounds, few, few)
        places = torch.zeros(rows, dtype=torch.int64, device=on)
        self.live.attended(sum((2 * c - n + 1) * n // 2 for n, c in zip(new, cached, strict=True)), sum(cached))
        with self._phase(name):
            engine._draw(places, engine.decoder._forward(step, max(new))[step.sample_positions])

    def _score(self) -> None:
        batch, models = self.minibatch.micro_batches[0].batch, self.models
        self._packed()
        with self._phase("score policy"):
            models.policy.logprobs(batch)
        if self.config.lora.rank:
            with self._phase("score reference"):
                models.reference.logprobs(batch)
        else:  # the same model
            self.usage["score reference"] = self.usage["score policy"]
        with self._phase("score critic"):
            models.critic.values(batch)
        count = self._within_budget(self.config.rollouts_per_iteration)
        self._packed(count)
        whole = self._batch(count)[0].micro_batches[0].batch
        for name in JUDGES:
            judge: ScalarModel | None = getattr(models, name)
            if judge is not None:
                with self._phase(f"score {name}"):
                    judge.scores(whole)

    def _update(self) -> None:
        config, policy = self.config, self.ppo.policy
        several = config.minibatch_size > self._sequences
        self._packed()
        if config.ptx_coef:
            self._gradients("policy")
            learned = [False] * self.lengths.prompt + [True] * self.lengths.response
            dialogues = [Encoded([0] * self.lengths.sequence, learned)] * self._sequences
            with self._phase("ptx"):
                language_modelling_backward(policy, dialogues, config.micro_batch_tokens, 1.0)
        for name, update in (("policy", self.ppo.update_policy), ("critic", self.ppo.update_critic)):
            self._gradients(name, there=several)
            with self._phase(f"update {name}"):
                update(self.minibatch, self.experience)

    def _gradients(self, name: str, *, there: bool = True) -> None:
        """Leave the model with gradients, or without."""
        self.live.tag = "gradients"
        for p in self._optimizer(name).parameters:
            p.grad = torch.empty_like(p) if there else None

    def _packed(self, count: int | None = None) -> None:
        length, sequences = self.lengths.sequence, count or self._sequences
        self.live.attended(sequences * length * (length + 1) // 2, sequences * length)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.live.tag = "activations"
        with self.live.measured() as self.usage[name]:
            yield


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _real(values: list[int], device: torch.device) -> Tensor:
    """int32 `values`, there to be read on a CPU, whose attention goes by them."""
    with unset_fake_temporarily():
        return torch.tensor(values, dtype=torch.int32, device=device)


def _dtype(name: str, on_gpu: bool) -> torch.dtype:
    """Of weights and activations, as `Placement.of` resolves it."""
    dtype: torch.dtype = getattr(torch, name, torch.bfloat16 if on_gpu else torch.float32)
    return dtype
