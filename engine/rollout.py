"""Prompts to rollouts: continuous batching on an unmodified Hugging Face model over the paged KV cache.

A row is one running sequence. Each round admits what fits and computes those prompts in one forward pass, then
advances every running row by one token in another; a finished row's place is free for the next prompt at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.api import sample
from .attention import Paged
from .batch import Rollout, cumulative
from .config import RolloutConfig
from .errors import InputError
from .kv_cache import KVCache
from .models import CausalModel


@dataclass(frozen=True)
class _Request:
    index: int
    prompt: list[int]
    seed: int


class RolloutEngine:
    """Samples responses of one policy, whose current weights it always uses.

    Args:
        policy: the model to sample from.
        config: how to sample.
        stop_tokens: token ids that end a response.
        max_prompt: tokens of a prompt at most; with `config.max_response` it sizes the KV cache.
    """

    def __init__(self, policy: CausalModel, config: RolloutConfig, stop_tokens: Sequence[int], max_prompt: int) -> None:
        self.policy, self.config, self.max_prompt = policy, config, max_prompt
        self.device = policy.device
        self.stop_tokens = torch.tensor(list(stop_tokens), device=self.device)
        self.cache = KVCache.for_model(
            policy.config,
            block_size=config.block_size,
            max_sequences=config.max_running,
            max_tokens_per_sequence=max_prompt + config.max_response,
            dtype=policy.model.dtype,
            device=self.device,
        )
        rows, limit = config.max_running, config.max_response
        self.tokens = torch.full((rows, limit), -1, device=self.device)
        self.logprobs = torch.zeros(rows, limit, device=self.device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.requests: dict[int, _Request] = {}

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Rollout]:
        """One response to each prompt, in the order of the prompts.

        Args:
            prompts: token ids, none empty and none over `max_prompt`.
            seeds: one non-negative int64 a prompt; a response's random numbers depend on its seed alone.
        """
        rollouts = dict(self.stream(prompts, seeds))
        return [rollouts[index] for index in range(len(prompts))]

    @torch.no_grad()
    def stream(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[tuple[int, Rollout]]:
        """Yield (index of the prompt, rollout) as responses finish."""
        if self.requests:
            raise RuntimeError("another stream of this engine is still being read: take all of it or close it first")
        self._check(prompts, seeds)
        waiting = deque(map(_Request, range(len(prompts)), prompts, seeds))
        try:
            while waiting or self.requests:
                if admitted := self._admit(waiting):
                    yield from self._advance(admitted, *self._prefill(admitted))
                elif running := list(self.requests):  # in the order of the prompts, whichever rows they got
                    yield from self._advance(running, *self._decode(running))
        finally:
            self._release(list(self.requests))

    def _check(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> None:
        if self.requests:
            raise RuntimeError("this engine is generating already: finish or close that stream first")
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts, expected one each")
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= self.max_prompt:
                raise InputError(f"prompt {index} has {len(prompt)} tokens, expected 1 to {self.max_prompt}")

    def _admit(self, waiting: deque[_Request]) -> list[int]:
        """Move requests to free rows, up to the prefill budget."""
        rows: list[int] = []
        budget = self.config.prefill_tokens
        while waiting and (not rows or len(waiting[0].prompt) <= budget):
            request = waiting[0]
            row = self.cache.manager.admit(len(request.prompt), len(request.prompt) + self.config.max_response)
            if row < 0:
                break
            self.requests[row] = waiting.popleft()
            budget -= len(request.prompt)
            rows.append(row)
        if rows:
            index = torch.tensor(rows, device=self.device)
            self.tokens[index], self.logprobs[index], self.count[index] = -1, 0.0, 0
            self.seeds[index] = torch.tensor([self.requests[row].seed for row in rows], device=self.device)
        return rows

    def _prefill(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Compute the rows' prompts: the rows as a tensor, and the logits `[R, V]` of their first tokens."""
        prompts = [self.requests[row].prompt for row in rows]
        lengths = [len(prompt) for prompt in prompts]
        slots = np.concatenate([self.cache.manager.prefill_slots(row) for row in rows])
        ends = cumulative(lengths, self.device)
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        index = torch.tensor(rows, device=self.device)
        hidden = self._forward(index, tokens, positions, ends, torch.from_numpy(slots))
        return index, self.policy.logits(hidden[ends[1:].long() - 1])

    def _decode(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Compute the rows' newest tokens: the rows as a tensor, and the logits `[R, V]` of their next ones."""
        self.cache.manager.step(np.array(rows, np.int32))
        index = torch.tensor(rows, device=self.device)
        tokens = self.tokens[index, self.count[index] - 1]
        positions = self.cache.lengths[rows].to(self.device, torch.int64) - 1
        ends = torch.arange(len(rows) + 1, dtype=torch.int32, device=self.device)
        hidden = self._forward(index, tokens, positions, ends, self.cache.slot_mapping[: len(rows)])
        return index, self.policy.logits(hidden)

    def _forward(self, rows: Tensor, tokens: Tensor, positions: Tensor, ends: Tensor, slots: Tensor) -> Tensor:
        host_rows = rows.cpu()
        attention = Paged(
            self.cache.k_pools,
            self.cache.v_pools,
            self.cache.block_table[host_rows].to(self.device),
            self.cache.lengths[host_rows].to(self.device),
            ends,
            slots.to(self.device),
        )
        return self.policy.trunk(tokens, positions, attention)

    def _advance(self, rows: list[int], index: Tensor, logits: Tensor) -> Iterator[tuple[int, Rollout]]:
        """Draw each row's next token, then hand out and release the rows that are finished."""
        config = self.config
        position = self.count[index]
        penalised = config.repetition_penalty != 1.0
        tokens, logprobs, _ = sample(
            logits,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            seen=self.tokens[index, : int(position.max())] if penalised else None,
            seeds=self.seeds[index],
            positions=position,
        )
        self.tokens[index, position], self.logprobs[index, position] = tokens, logprobs
        self.count[index] = position + 1
        stopped = torch.isin(tokens, self.stop_tokens)
        done = torch.nonzero(stopped | (position + 1 == config.max_response)).flatten().tolist()
        for place in done:
            row = rows[place]
            yield self.requests[row].index, self._collect(row, bool(stopped[place]))
        self._release([rows[place] for place in done])

    def _collect(self, row: int, finished: bool) -> Rollout:
        length = int(self.count[row])
        return Rollout(
            prompt=self.requests[row].prompt,
            response=self.tokens[row, :length].tolist(),
            logprobs=self.logprobs[row, :length].cpu().clone(),
            finished=finished,
        )

    def _release(self, rows: list[int]) -> None:
        if rows:
            self.cache.manager.release(np.array(rows, np.int32))
        for row in rows:
            del self.requests[row]


def random_seeds(count: int, *key: int) -> list[int]:
    """`count` seeds of random streams, a pure function of `key`."""
    state = np.random.SeedSequence(list(key)).generate_state(count, np.uint64)
    return (state >> np.uint64(1)).tolist()
