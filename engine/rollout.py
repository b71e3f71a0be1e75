"""Requests to rollouts: continuous batching on an unmodified Hugging Face model over the paged KV cache.

The C++ manager plans each step: which sequences compute which tokens (a chunk of a prompt, or the newest token), and
whose next token is drawn from which of them. A step here is one forward pass over those tokens, packed, one draw for
all samples, and one call that hands the tokens back and plans the next step. Prompts are computed once for all their
samples, and not at all where the cache holds them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..kernels.api import linear_logprobs, sample
from ._kv import Finished, Step
from .batch import Request, Rollout
from .config import RolloutConfig
from .decoding import Decoder
from .errors import InputError
from .flash import resolve_paged
from .kv_cache import KVCache
from .models import CausalModel

_TAIL = 8  # tokens before the longest stop text that are decoded with it


@dataclass(frozen=True)
class RolloutStatistics:
    """What the engine has done since it was made, or over some time: differences of two."""

    seconds: float = 0.0
    """Inside steps"""
    drawn_tokens: int = 0
    prefill_tokens: int = 0
    """Prompt tokens computed, those of preempted sequences again"""
    hit_tokens: int = 0
    """Prompt tokens found in the cache or shared with another sample"""
    evictions: int = 0
    preemptions: int = 0

    def since(self, before: RolloutStatistics) -> RolloutStatistics:
        return RolloutStatistics(**{name: now - getattr(before, name) for name, now in vars(self).items()})

    @classmethod
    def together(cls, parts: Sequence[RolloutStatistics]) -> RolloutStatistics:
        """Of engines that ran at the same time: counts add up, the slowest one's time is that of all."""
        counts = {name: sum(getattr(part, name) for part in parts) for name in vars(parts[0])}
        return cls(**{**counts, "seconds": max(part.seconds for part in parts)})

    def metrics(self) -> dict[str, float]:
        """Speed of sampling, share of prompt tokens that were not computed, counts."""
        return {
            "time/tokens_per_second": self.drawn_tokens / max(self.seconds, 1e-9),
            "rollout/cache_hit_rate": self.hit_tokens / max(self.hit_tokens + self.prefill_tokens, 1),
            "rollout/prefill_tokens": float(self.prefill_tokens),
            "rollout/evictions": float(self.evictions),
            "rollout/preemptions": float(self.preemptions),
        }


class _Drawn:
    """What the requests under way have drawn, on the device: a place each; columns are tokens of the response."""

    def __init__(self, places: int, limit: int, device: torch.device) -> None:
        self.free: list[int] = []
        self.tokens = torch.empty(0, limit, dtype=torch.int64, device=device)
        self.logprobs = torch.empty(0, limit, device=device)
        self.count = torch.empty(0, dtype=torch.int64, device=device)
        self.seeds = torch.empty(0, dtype=torch.int64, device=device)
        self.make_room(places)

    def make_room(self, places: int) -> None:
        """See to it that so many places are free."""
        old, missing = len(self.count), places - len(self.free)
        if missing > 0:
            self.free += range(old, old + missing)
            for name in ("tokens", "logprobs", "count", "seeds"):
                x = getattr(self, name)
                setattr(self, name, torch.cat([x, x.new_zeros(missing, *x.shape[1:])]))

    def start(self, request: Request) -> int:
        """Give the request a place and lay its response so far into it."""
        place, length = self.free.pop(), len(request.response)
        self.tokens[place] = -1
        if length:
            self.tokens[place, :length] = torch.tensor(request.response, device=self.tokens.device)
            self.logprobs[place, :length] = torch.tensor(request.logprobs, device=self.tokens.device)
        self.count[place], self.seeds[place] = length, request.seed
        return place

    def append(self, places: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """One token to each of `places` [N]."""
        column = self.count[places]
        self.tokens[places, column], self.logprobs[places, column] = tokens, logprobs.to(self.logprobs.dtype)
        self.count[places] = column + 1

    def tails(self, places: Tensor, most: int) -> list[list[int]]:
        """The last tokens drawn, at most so many, of each of `places` [N]; the device is waited for once."""
        count, back = self.count[places], torch.arange(-most, 0, device=places.device)
        columns = count[:, None] + back
        tokens = self.tokens[places[:, None], columns.clamp(min=0)]
        return [row[-length:] for length, *row in torch.cat([count[:, None], tokens], 1).cpu().tolist()]

    def response(self, place: int) -> tuple[list[int], list[float]]:
        """The tokens drawn so far and their log-probs."""
        length = int(self.count[place])
        return self.tokens[place, :length].tolist(), self.logprobs[place, :length].tolist()


@dataclass(frozen=True)
class _UnderWay:
    """A request that the manager knows."""

    index: int
    request: Request
    place: int


class RolloutEngine:
    """Samples responses of one policy, whose current weights it always uses.

    A training loop of one's own, with `engine.batch.pack_rollouts` and `advantages` `[N]`, one a response token:

        rollouts = engine.generate(prompts, seeds)
        batch = pack_rollouts(rollouts, policy.device)
        old_logprobs = torch.cat([rollout.logprobs for rollout in rollouts]).to(policy.device)
        policy.policy_loss(batch, old_logprobs=old_logprobs, advantages=advantages).loss.backward()
        optimizer.step()
        engine.weights_changed()

    Args:
        policy: the model to sample from.
        config: how to sample.
        stop_tokens: token ids that end a response.
        max_prompt: tokens of a prompt at most; with `config.max_response` it bounds a sequence.
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
        self.policy, self.config, self.max_prompt, self.decode = policy, config, max_prompt, decode
        self.device = policy.device
        self.stop_ids = frozenset(stop_tokens)
        self.kernel = resolve_paged(config.attention, self.device, policy.model.dtype)
        """What attends to the cache"""
        on_gpu = self.device.type == "cuda"
        self.cache = KVCache.for_model(
            policy.config,
            block_size=config.block_size,
            max_sequences=config.max_running,
            max_tokens_per_sequence=max_prompt + config.max_response,
            dtype=policy.model.dtype,
            device=self.device,
            num_blocks=config.kv_blocks,
            memory_share=config.kv_memory if on_gpu and config.kv_blocks is None else None,
            max_prefill_tokens=config.prefill_tokens,
            stop_tokens=stop_tokens,
        )
        self.decoder = Decoder(policy, self.cache, graphs=config.cuda_graphs and on_gpu, kernel=self.kernel)
        self.drawn = _Drawn(2 * config.max_running, config.max_response, self.device)
        self.under_way: dict[int, _UnderWay] = {}
        """By the manager's id of the sequence"""
        self.watch: Callable[[int, int], None] | None = None
        """Called by `collect` with (responses finished, responses wanted) as they finish"""
        self.busy = False
        self.version = 0
        """Of the policy's weights: how often `weights_changed` was called"""
        self._seconds, self._drawn_tokens = 0.0, 0

    def weights_changed(self) -> None:
        """To be called after each update of the policy: nothing that the old weights computed is used again."""
        self.version += 1
        self.cache.manager.bump_version()

    def forget(self) -> None:
        """Empty the cache: what is sampled next does not depend, to the last bit, on what was sampled before."""
        self._check_idle()
        self.cache.manager.clear_cache()

    def sleep(self) -> None:
        """Give the memory of the KV cache back, for an update; `wake` or the next use takes it again."""
        self._check_idle()
        self.decoder.forget()
        self.cache.release()

    def wake(self) -> None:
        """Take the memory of the KV cache, where it was given back."""
        self.cache.allocate()

    @property
    def statistics(self) -> RolloutStatistics:
        """Since the engine was made."""
        counts = self.cache.manager.statistics
        return RolloutStatistics(
            seconds=self._seconds,
            drawn_tokens=self._drawn_tokens,
            prefill_tokens=counts.prefill_tokens,
            hit_tokens=counts.hit_tokens,
            evictions=counts.evictions,
            preemptions=counts.preemptions,
        )

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
        done: list[tuple[int, Rollout]] = []
        waiting = deque(enumerate(requests))
        with self._busy_with(requests):
            for finished in self._steps(waiting):
                done += finished
                if finished and self.watch:
                    self.watch(min(len(done), enough), enough)
                if len(done) >= enough:
                    break
            left = [(item.index, self._so_far(item)) for item in self.under_way.values()]
        left += [(index, _continued(requests[index], rollout)) for index, rollout in done[enough:]]
        return sorted(done[:enough], key=_index), sorted([*left, *waiting], key=_index)

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Rollout]]:
        """Yield (index of the request, rollout) as responses finish. Requests beside each other that ask for several
        responses to one prompt share its computation."""
        with self._busy_with(requests):
            for finished in self._steps(deque(enumerate(requests))):
                yield from finished

    @contextmanager
    def _busy_with(self, requests: Sequence[Request]) -> Iterator[None]:
        """Check the requests; whatever is under way at the end is dropped."""
        self._check_idle()
        self._check(requests)
        self.wake()
        self.busy = True
        try:
            yield
        finally:
            if self.under_way:
                self.cache.manager.reset()
            self.drawn.free += [item.place for item in self.under_way.values()]
            self.under_way.clear()
            self.busy = False

    def _check_idle(self) -> None:
        if self.busy:
            raise RuntimeError("another stream of this engine is still being read: take all of it or close it first")

    def _check(self, requests: Sequence[Request]) -> None:
        for index, request in enumerate(requests):
            if not 0 < len(request.prompt) <= self.max_prompt:
                raise InputError(f"prompt {index} has {len(request.prompt)} tokens, expected 1 to {self.max_prompt}")
            if not 0 < self._limit(request) <= self.config.max_response:
                limit = f"expected 1 to {self.config.max_response}"
                raise InputError(f"request {index} has the limit {request.limit}, {limit}")

    def _limit(self, request: Request) -> int:
        return self.config.max_response if request.limit is None else request.limit

    @torch.no_grad()
    def _steps(self, waiting: deque[tuple[int, Request]]) -> Iterator[list[tuple[int, Rollout]]]:
        """Take the requests and compute step after step; yields what finishes with each."""
        manager, budget = self.cache.manager, self.config.prefill_tokens
        yield self._submit(waiting)
        while self.under_way:
            step = manager.plan(budget)
            while step.num_members:
                started = time.perf_counter()
                tokens, stopped = self._compute(step)
                step = manager.step(tokens, budget, stopped)
                self._drawn_tokens += len(tokens)
                self._seconds += time.perf_counter() - started
                yield [self._finish(end) for end in step.finished] + self._submit(waiting)

    def _submit(self, waiting: deque[tuple[int, Request]]) -> list[tuple[int, Rollout]]:
        """Hand requests to the manager, some more than it has rows; returns those that are complete as they are."""
        complete = []
        while waiting and len(self.under_way) < 2 * self.config.max_running:
            index, request = waiting.popleft()
            if self._is_complete(request):
                complete.append((index, self._rollout(request)))
                continue
            group = [(index, request)]
            while waiting and _same_prompt(request, waiting[0][1]):
                group.append(waiting.popleft())
            self._submit_group(group)
        return complete

    def _submit_group(self, group: list[tuple[int, Request]]) -> None:
        """One request, or several from the start on one prompt."""
        self.drawn.make_room(len(group))
        request = group[0][1]
        context = np.array(request.prompt + request.response, np.int64)
        limits = np.array([self._limit(member) - len(member.response) for _, member in group], np.int64)
        first = self.cache.manager.submit(context, limits)
        for number, (index, member) in enumerate(group):
            self.under_way[first + number] = _UnderWay(index, member, self.drawn.start(member))

    def _compute(self, step: Step) -> tuple[np.ndarray, np.ndarray | None]:
        """One forward pass and one draw: the token of each sample, and which of them complete a stop text."""
        ids = self.cache.manager.sample_ids[: step.num_samples].tolist()
        # before the forward pass is under way: the copy to the device waits for what is
        places = torch.tensor([self.under_way[id].place for id in ids], dtype=torch.int64, device=self.device)
        hidden = self.decoder.hidden(step)
        if not ids:  # a part of a long prompt
            return np.empty(0, np.int64), None
        tokens, logprobs = self._draw(places, hidden)
        self.drawn.append(places, tokens, logprobs)
        stopped = None
        if self.config.stop:
            stopped = np.array([self._ends_with_stop(tail) for tail in self.drawn.tails(places, self._tail)])
        return tokens.cpu().numpy(), stopped

    def _draw(self, places: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(next tokens, their log-probs at temperature 1), each `[N]`."""
        config, columns = self.config, self.drawn.count[places]
        tokens, logprobs, _ = sample(
            self.policy.logits(hidden),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            seen=self.drawn.tokens[places] if config.repetition_penalty != 1.0 else None,
            seeds=self.drawn.seeds[places],
            positions=columns,
        )
        if self.policy.exact:  # by the operation that training uses, so that the bits are its
            logprobs = linear_logprobs(hidden, labels=tokens, **self.policy.head).logprobs
        return tokens, logprobs

    def _finish(self, end: Finished) -> tuple[int, Rollout]:
        item = self.under_way.pop(end.id)
        self.drawn.free.append(item.place)
        return item.index, self._rollout(self._so_far(item))

    def _so_far(self, item: _UnderWay) -> Request:
        """The request with what has been drawn since."""
        request = item.request
        response, logprobs = self.drawn.response(item.place)
        versions = [*request.versions, *[self.version] * (len(response) - len(request.response))]
        return replace(request, response=response, logprobs=logprobs, versions=versions)

    def _rollout(self, request: Request) -> Rollout:
        logprobs = torch.tensor(request.logprobs, dtype=torch.float32)
        return Rollout(request.prompt, request.response, logprobs, self._stopped(request.response), request.versions)

    def _is_complete(self, request: Request) -> bool:
        return len(request.response) >= self._limit(request) or self._stopped(request.response)

    def _stopped(self, response: list[int]) -> bool:
        return bool(response) and (response[-1] in self.stop_ids or self._ends_with_stop(response))

    @property
    def _tail(self) -> int:
        """Newest tokens among which a stop text ends: a token is a character at least, special ones apart."""
        return max(map(len, self.config.stop)) + _TAIL

    def _ends_with_stop(self, response: list[int]) -> bool:
        """Whether the newest token completes one of the stop texts."""
        if not self.config.stop or self.decode is None:
            return False
        tail = response[-self._tail :]
        text, before = self.decode(tail), self.decode(tail[:-1])
        return any(text.count(stop) > before.count(stop) for stop in self.config.stop)


def _same_prompt(one: Request, other: Request) -> bool:
    return not one.response and not other.response and one.prompt == other.prompt


def _continued(request: Request, rollout: Rollout) -> Request:
    return replace(request, response=rollout.response, logprobs=rollout.logprobs.tolist(), versions=rollout.versions)


def _index(item: tuple[int, object]) -> int:
    return item[0]


def random_seeds(count: int, *key: int) -> list[int]:
    """`count` seeds of random streams, a pure function of `key`."""
    state = np.random.SeedSequence(list(key)).generate_state(count, np.uint64)
    return (state >> np.uint64(1)).tolist()
