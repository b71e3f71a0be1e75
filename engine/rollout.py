"""Requests to rollouts: continuous batching on an unmodified Hugging Face model over the paged KV cache.

A row is one running sequence. Each round admits what fits and computes those prompts in one forward pass, then
advances every running row by one token in another; a finished row's place is free for the next request at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..kernels.api import linear_logprobs, sample
from .attention import Paged
from .batch import Request, Rollout, cumulative
from .config import RolloutConfig
from .errors import InputError
from .kv_cache import KVCache
from .models import CausalModel

_TAIL = 8  # tokens before the longest stop text that are decoded with it


class _Rows:
    """What the running sequences have drawn, on the device, one row each; columns are places in the response."""

    def __init__(self, rows: int, limit: int, device: torch.device) -> None:
        self.tokens = torch.full((rows, limit), -1, device=device)
        self.logprobs = torch.zeros(rows, limit, device=device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)
        self.limits = torch.zeros(rows, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)

    def start(self, rows: list[int], requests: list[Request]) -> None:
        """Lay the requests' responses so far into their rows."""
        limit, device = self.tokens.shape[1], self.tokens.device
        index = torch.tensor(rows, device=device)
        pad = lambda values, fill: [*values, *[fill] * (limit - len(values))]  # noqa: E731
        self.tokens[index] = torch.tensor([pad(r.response, -1) for r in requests], device=device)
        self.logprobs[index] = torch.tensor([pad(r.logprobs, 0.0) for r in requests], device=device)
        self.count[index] = torch.tensor([len(r.response) for r in requests], device=device)
        self.limits[index] = torch.tensor([r.limit or limit for r in requests], device=device)
        self.seeds[index] = torch.tensor([r.seed for r in requests], device=device)

    def append(self, index: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """One token to each row of `index` [R]."""
        place = self.count[index]
        self.tokens[index, place], self.logprobs[index, place] = tokens, logprobs.to(self.logprobs.dtype)
        self.count[index] = place + 1

    def drawn(self, row: int) -> tuple[list[int], list[float]]:
        """The row's response so far and its log-probs."""
        length = int(self.count[row])
        return self.tokens[row, :length].tolist(), self.logprobs[row, :length].tolist()


class RolloutEngine:
    """Samples responses of one policy, whose current weights it always uses.

    Args:
        policy: the model to sample from.
        config: how to sample.
        stop_tokens: token ids that end a response.
        max_prompt: tokens of a prompt at most; with `config.max_response` it sizes the KV cache.
        decode: token ids to text; needed where `config.stop` holds texts.
    """

    def __init__(
        self,
        policy: CausalModel,
        config: RolloutConfig,
        stop_tokens: Sequence[int],
        max_prompt: int,
        *,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        if config.stop and decode is None:
            raise ValueError("RolloutConfig.stop holds texts: the engine needs `decode` to see them")
        self.decode = decode
        self.policy, self.config, self.max_prompt = policy, config, max_prompt
        self.device = policy.device
        self.stop_ids = frozenset(stop_tokens)
        self.stop_tokens = torch.tensor(list(stop_tokens), device=self.device)
        self.cache = KVCache.for_model(
            policy.config,
            block_size=config.block_size,
            max_sequences=config.max_running,
            max_tokens_per_sequence=max_prompt + config.max_response,
            dtype=policy.model.dtype,
            device=self.device,
        )
        self.rows = _Rows(config.max_running, config.max_response, self.device)
        self.running: dict[int, tuple[int, Request]] = {}
        """Row -> (index of the request, the request as it was admitted)"""
        self.busy = False
        self.version = 0
        """Of the policy's weights: how often `weights_changed` was called"""

    def weights_changed(self) -> None:
        """To be called after each update of the policy: what is sampled from here on comes from new weights."""
        self.version += 1

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Rollout]:
        """One response to each prompt, in the order of the prompts.

        Args:
            prompts: token ids, none empty and none over `max_prompt`.
            seeds: one non-negative int64 a prompt; a response's random numbers depend on its seed alone.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts, expected one each")
        rollouts = dict(self.stream(list(map(Request, prompts, seeds))))
        return [rollouts[index] for index in range(len(prompts))]

    def collect(
        self, requests: Sequence[Request], enough: int
    ) -> tuple[list[tuple[int, Rollout]], list[tuple[int, Request]]]:
        """The first `enough` responses to finish, and the other requests with what is drawn of them so far.

        Both by (index of the request, ...), in the order of the requests. A request that is left may be given again,
        now or after an update of the weights: its response goes on from there.
        """
        waiting, done = deque(enumerate(requests)), []
        with self._busy_with(requests):
            while len(done) < enough and (waiting or self.running):
                done += self._round(waiting)
            left = [(index, self._paused(row)) for row, (index, _) in self.running.items()]
        left += [(index, _continued(requests[index], rollout)) for index, rollout in done[enough:]]
        return sorted(done[:enough], key=_index), sorted([*left, *waiting], key=_index)

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Rollout]]:
        """Yield (index of the request, rollout) as responses finish."""
        waiting = deque(enumerate(requests))
        with self._busy_with(requests):
            while waiting or self.running:
                yield from self._round(waiting)

    @contextmanager
    def _busy_with(self, requests: Sequence[Request]) -> Iterator[None]:
        """Check the requests; whatever still runs at the end is released."""
        if self.busy:
            raise RuntimeError("another stream of this engine is still being read: take all of it or close it first")
        self._check(requests)
        self.busy = True
        try:
            yield
        finally:
            self._release(list(self.running))
            self.busy = False

    def _check(self, requests: Sequence[Request]) -> None:
        for index, request in enumerate(requests):
            if not 0 < len(request.prompt) <= self.max_prompt:
                raise InputError(f"prompt {index} has {len(request.prompt)} tokens, expected 1 to {self.max_prompt}")
            if not 0 < self._limit(request) <= self.config.max_response:
                raise InputError(
                    f"request {index} has the limit {request.limit}, expected 1 to {self.config.max_response}"
                )

    def _limit(self, request: Request) -> int:
        return self.config.max_response if request.limit is None else request.limit

    @torch.no_grad()
    def _round(self, waiting: deque[tuple[int, Request]]) -> list[tuple[int, Rollout]]:
        """Compute the next prompts, or else one token of every running row; what finishes with that."""
        if complete := self._take_complete(waiting):
            return complete
        if admitted := self._admit(waiting):
            return self._advance(admitted, self._prefill(admitted))
        running = list(self.running)  # in the order of the requests, whichever rows they got
        return self._advance(running, self._decode(running))

    def _take_complete(self, waiting: deque[tuple[int, Request]]) -> list[tuple[int, Rollout]]:
        """Requests whose responses ended before: nothing is left to compute."""
        done = [(index, request) for index, request in waiting if self._is_complete(request)]
        for item in done:
            waiting.remove(item)
        return [(index, self._rollout(request)) for index, request in done]

    def _is_complete(self, request: Request) -> bool:
        return len(request.response) >= self._limit(request) or self._stopped(request)

    def _stopped(self, request: Request) -> bool:
        return bool(request.response) and (
            request.response[-1] in self.stop_ids or self._ends_with_stop(request.response)
        )

    def _ends_with_stop(self, response: list[int]) -> bool:
        """Whether the newest token completes one of the stop texts."""
        if not self.config.stop or self.decode is None:
            return False
        longest = max(map(len, self.config.stop))
        text = self.decode(response[-longest - _TAIL :])  # a token is a character at least, special ones apart
        before = self.decode(response[-longest - _TAIL : -1])
        return any(text.count(stop) > before.count(stop) for stop in self.config.stop)

    def _admit(self, waiting: deque[tuple[int, Request]]) -> list[int]:
        """Move requests to free rows, up to the prefill budget."""
        rows: list[int] = []
        budget = self.config.prefill_tokens
        while waiting:
            _, request = waiting[0]
            context = len(request.prompt) + len(request.response)
            if rows and context > budget:
                break
            row = self.cache.manager.admit(context, len(request.prompt) + self._limit(request))
            if row < 0:
                break
            self.running[row] = waiting.popleft()
            budget -= context
            rows.append(row)
        if rows:
            self.rows.start(rows, [self.running[row][1] for row in rows])
        return rows

    def _prefill(self, rows: list[int]) -> Tensor:
        """Compute what the rows' requests hold: last hidden states `[R, H]`."""
        contexts = [self.running[row][1].prompt + self.running[row][1].response for row in rows]
        lengths = [len(context) for context in contexts]
        slots = np.concatenate([self.cache.manager.prefill_slots(row) for row in rows])
        ends = cumulative(lengths, self.device)
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        tokens = torch.tensor([token for context in contexts for token in context], device=self.device)
        hidden = self._forward(rows, tokens, positions, ends, torch.from_numpy(slots))
        return hidden[ends[1:].long() - 1]

    def _decode(self, rows: list[int]) -> Tensor:
        """Compute the rows' newest tokens: last hidden states `[R, H]`."""
        self.cache.manager.step(np.array(rows, np.int32))
        index = torch.tensor(rows, device=self.device)
        tokens = self.rows.tokens[index, self.rows.count[index] - 1]
        positions = self.cache.lengths[rows].to(self.device, torch.int64) - 1
        ends = torch.arange(len(rows) + 1, dtype=torch.int32, device=self.device)
        return self._forward(rows, tokens, positions, ends, self.cache.slot_mapping[: len(rows)])

    def _forward(self, rows: list[int], tokens: Tensor, positions: Tensor, ends: Tensor, slots: Tensor) -> Tensor:
        attention = Paged(
            self.cache.k_pools,
            self.cache.v_pools,
            self.cache.block_table[rows].to(self.device),
            self.cache.lengths[rows].to(self.device),
            ends,
            slots.to(self.device),
            exact=self.policy.exact,
        )
        return self.policy.trunk(tokens, positions, attention)

    def _advance(self, rows: list[int], hidden: Tensor) -> list[tuple[int, Rollout]]:
        """Draw each row's next token, then take out the rows that are finished."""
        index = torch.tensor(rows, device=self.device)
        tokens, logprobs = self._draw(index, hidden)
        self.rows.append(index, tokens, logprobs)
        ended = torch.isin(tokens, self.stop_tokens) | (self.rows.count[index] == self.rows.limits[index])
        flags = ended.tolist()
        if self.config.stop:
            flags = [flag or self._ends_with_stop(self.rows.drawn(r)[0]) for r, flag in zip(rows, flags, strict=True)]
        done = [row for row, flag in zip(rows, flags, strict=True) if flag]
        finished = [(self.running[row][0], self._rollout(self._paused(row))) for row in done]
        self._release(done)
        return finished

    def _draw(self, index: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(next tokens, their log-probs at temperature 1), each `[R]`."""
        config, places = self.config, self.rows.count[index]
        seen = self.rows.tokens[index, : int(places.max())] if config.repetition_penalty != 1.0 else None
        tokens, logprobs, _ = sample(
            self.policy.logits(hidden),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            seen=seen,
            seeds=self.rows.seeds[index],
            positions=places,
        )
        if self.policy.exact:  # by the operation that training uses, so that the bits are its
            logprobs = linear_logprobs(hidden, labels=tokens, **self.policy.head).logprobs
        return tokens, logprobs

    def _paused(self, row: int) -> Request:
        """The row's request with what has been drawn since."""
        _, request = self.running[row]
        response, logprobs = self.rows.drawn(row)
        versions = [*request.versions, *[self.version] * (len(response) - len(request.response))]
        return replace(request, response=response, logprobs=logprobs, versions=versions)

    def _rollout(self, request: Request) -> Rollout:
        logprobs = torch.tensor(request.logprobs, dtype=torch.float32)
        return Rollout(request.prompt, request.response, logprobs, self._stopped(request), request.versions)

    def _release(self, rows: list[int]) -> None:
        if rows:
            self.cache.manager.release(np.array(rows, np.int32))
        for row in rows:
            del self.running[row]


def _continued(request: Request, rollout: Rollout) -> Request:
    return replace(request, response=rollout.response, logprobs=rollout.logprobs.tolist(), versions=rollout.versions)


def _index(item: tuple[int, object]) -> int:
    return item[0]


def random_seeds(count: int, *key: int) -> list[int]:
    """`count` seeds of random streams, a pure function of `key`."""
    state = np.random.SeedSequence(list(key)).generate_state(count, np.uint64)
    return (state >> np.uint64(1)).tolist()
