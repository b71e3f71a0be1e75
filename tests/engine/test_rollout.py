"""Rollouts against Hugging Face's `generate` and against a loop that recomputes everything for each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppomax.engine.attention import Paged
from ppomax.engine.batch import Request, Rollout, pack_rollouts
from ppomax.engine.config import RolloutConfig
from ppomax.engine.decoding import Decoder, padded_size
from ppomax.engine.errors import InputError
from ppomax.engine.models import CPU, CausalModel
from ppomax.engine.rollout import RolloutEngine, random_seeds
from ppomax.kernels.sampling import processed_probs_ref, uniform
from torch import Tensor

FAMILIES = ["llama", "qwen2", "qwen2-window", "qwen3", "mistral", "gemma2"]
families = pytest.mark.parametrize("family", FAMILIES)
LENGTHS = [1, 9, 4, 17, 2, 6, 3]
LIMIT = 12
NEVER = 99  # a stop token that no model here has

GREEDY = RolloutConfig(
    max_response=LIMIT,
    temperature=0.0,
    top_p=1.0,
    repetition_penalty=1.0,
    max_running=3,
    prefill_tokens=1,
    block_size=4,
)
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.9, top_k=20, repetition_penalty=1.3)


def draw_prompts(lengths: list[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 61, (length,), generator=generator).tolist() for length in lengths]


def new_engine(policy: CausalModel, config: RolloutConfig, stop: int = NEVER) -> RolloutEngine:
    return RolloutEngine(policy, config, [stop], max_prompt=max(LENGTHS))


def requests(prompts: list[list[int]], seeds: list[int]) -> list[Request]:
    return list(map(Request, prompts, seeds))


def responses(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.response for rollout in rollouts]


def hugging_face(model: Any, prompts: list[list[int]], stop: int | None = None) -> list[list[int]]:
    """Greedy answers of a plain model, prompt by prompt."""
    options = {"do_sample": False, "max_new_tokens": LIMIT, "eos_token_id": stop, "pad_token_id": 0}
    outputs = [model.generate(torch.tensor([prompt]), **options)[0].tolist() for prompt in prompts]
    return [output[len(prompt) :] for output, prompt in zip(outputs, prompts, strict=True)]


def likely_stop(answers: list[list[int]]) -> int:
    """The token that stops some answers early, some at the limit or never."""
    early = {token: sum(token in answer[:-1] for answer in answers) for answer in answers for token in answer}
    return max(early, key=lambda token: min(early[token], len(answers) - early[token]))


@families
@pytest.mark.parametrize(
    "config",
    [
        GREEDY,
        replace(GREEDY, max_running=1, block_size=1),
        replace(GREEDY, max_running=64, prefill_tokens=4096, block_size=16),
        replace(GREEDY, max_running=4, prefill_tokens=10),
    ],
    ids=["three-rows", "one-row", "all-rows", "ten-tokens"],
)
def test_greedy_equals_hugging_face(family: str, config: RolloutConfig, new_policy: Any, plain: Any) -> None:
    policy, prompts = new_policy(family), draw_prompts()
    stop = likely_stop(hugging_face(plain(policy), prompts))
    expected = hugging_face(plain(policy), prompts, stop)
    rollouts = new_engine(policy, config, stop).generate(prompts, [0] * len(prompts))
    assert responses(rollouts) == expected
    assert [rollout.finished for rollout in rollouts] == [answer[-1] == stop for answer in expected]
    assert {rollout.finished for rollout in rollouts} == {True, False}, "both ways to end should occur"
    assert [rollout.prompt for rollout in rollouts] == prompts


def by_hand(
    model: Any, prompt: list[int], seed: int, config: RolloutConfig, stop: int
) -> tuple[list[int], list[float]]:
    """Response and log-probs by a full forward pass of a plain model for each token."""
    response: list[int] = []
    logprobs: list[float] = []
    while len(response) < config.max_response and stop not in response:
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, -1].float()
        probs = processed_probs_ref(
            logits, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            repetition_penalty=config.repetition_penalty, seen=torch.tensor(response),
        )  # fmt: skip
        point = uniform(torch.tensor([seed]), torch.tensor([len(response)])).double()
        response.append(int((probs.cumsum(0) <= point).sum()))
        logprobs.append(float(torch.log_softmax(logits, -1)[response[-1]]))
    return response, logprobs


@torch.no_grad()
@families
def test_sampling_equals_a_loop(family: str, new_policy: Any, plain: Any) -> None:
    """Every option on; the random number of a token depends on its response's seed and its place alone."""
    policy, prompts = new_policy(family, dtype=torch.float64), draw_prompts()
    seeds, stop = random_seeds(len(prompts), 5), 7
    rollouts = new_engine(policy, SAMPLED, stop).generate(prompts, seeds)
    model = plain(policy)
    for rollout, prompt, seed in zip(rollouts, prompts, seeds, strict=True):
        response, logprobs = by_hand(model, prompt, seed, SAMPLED, stop)
        assert rollout.response == response
        torch.testing.assert_close(rollout.logprobs, torch.tensor(logprobs), rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_repetition_penalty_is_on_response_tokens_only(new_policy: Any, plain: Any) -> None:
    policy, prompts = new_policy(), draw_prompts()
    config = replace(GREEDY, repetition_penalty=1.8)
    rollouts = new_engine(policy, config).generate(prompts, [0] * len(prompts))
    model = plain(policy)
    assert responses(rollouts) == [by_hand(model, prompt, 0, config, NEVER)[0] for prompt in prompts]
    on_all = model.generate(
        torch.tensor([prompts[3]]), do_sample=False, max_new_tokens=LIMIT, eos_token_id=None, repetition_penalty=1.8
    )
    assert rollouts[3].response != on_all[0, LENGTHS[3] :].tolist(), "the prompt should make a difference here"
    assert responses(rollouts) != responses(new_engine(policy, GREEDY).generate(prompts, [0] * len(prompts)))


@torch.no_grad()
@families
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-6)], ids=["fp32", "fp64"])
def test_recorded_logprobs_are_a_full_forwards(
    family: str, dtype: torch.dtype, tolerance: float, new_policy: Any
) -> None:
    """At temperature 1 on unprocessed logits, whatever the sampling options; kept as float32."""
    policy, prompts = new_policy(family, dtype=dtype), draw_prompts()
    rollouts = new_engine(policy, SAMPLED).generate(prompts, random_seeds(len(prompts), 1))
    recorded = torch.cat([rollout.logprobs for rollout in rollouts])
    assert recorded.dtype == torch.float32
    expected, _ = policy.logprobs(pack_rollouts(rollouts, CPU.device))
    torch.testing.assert_close(recorded, expected.float(), rtol=0, atol=tolerance)


def test_a_response_depends_on_its_own_seed_only(new_policy: Any) -> None:
    """Alone and in a crowd, wherever it stands. In float64: there the logits of the two differ too little to show.

    In float32 a product of few rows may differ from one of many in the last bit, and a token whose probability the
    random number just meets may then be another one.
    """
    policy, prompts = new_policy(dtype=torch.float64), draw_prompts()
    seeds = random_seeds(len(prompts), 2)
    crowd = new_engine(policy, SAMPLED).generate(prompts, seeds)
    backwards = new_engine(policy, SAMPLED).generate(prompts[::-1], seeds[::-1])[::-1]
    wide = new_engine(policy, replace(SAMPLED, max_running=64, prefill_tokens=4096)).generate(prompts, seeds)
    single = [new_engine(policy, SAMPLED).generate([p], [s])[0] for p, s in zip(prompts, seeds, strict=True)]
    assert responses(crowd) == responses(backwards) == responses(wide) == responses(single)
    other_seed = new_engine(policy, SAMPLED).generate(prompts, [*seeds[:-1], seeds[-1] + 1])
    assert responses(other_seed)[:-1] == responses(crowd)[:-1]
    assert responses(other_seed)[-1] != responses(crowd)[-1]


def test_the_same_seed_twice_in_one_batch(new_policy: Any) -> None:
    prompt = draw_prompts()[1]
    one, two, three = new_engine(new_policy(dtype=torch.float64), SAMPLED).generate([prompt] * 3, [8, 8, 9])
    assert one.response == two.response != three.response


def test_streaming_yields_every_prompt_once(new_policy: Any) -> None:
    policy, prompts = new_policy(), draw_prompts()
    seeds = random_seeds(len(prompts), 3)
    streamed = list(new_engine(policy, SAMPLED, stop=7).stream(requests(prompts, seeds)))
    assert sorted(index for index, _ in streamed) == list(range(len(prompts)))
    generated = new_engine(policy, SAMPLED, stop=7).generate(prompts, seeds)
    assert [dict(streamed)[i].response for i in range(len(prompts))] == responses(generated)


def test_streaming_hands_out_what_is_finished_at_once(new_policy: Any) -> None:
    policy, prompts = new_policy(), draw_prompts()
    engine = new_engine(policy, replace(GREEDY, max_running=2))
    first_indices = [index for index, _ in engine.stream(requests(prompts, [0] * len(prompts)))][:2]
    assert sorted(first_indices) == [0, 1]
    stream = engine.stream(requests(prompts, [0] * len(prompts)))
    next(stream)
    assert len(prompts) - 1 not in {item.index for item in engine.under_way.values()}, "later prompts wait"
    stream.close()


@pytest.mark.parametrize(
    ("budget", "first"),
    [
        (10, [[1, 9], [1, 1, 4, 6], [1, 1, 1, 10], [1, 1, 1, 1, 2, 6, 1]]),
        (4096, [LENGTHS, [1] * 7, [1] * 7, [1] * 7]),
    ],
)
def test_prompts_are_computed_within_the_budget(
    budget: int, first: list[list[int]], new_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, beside the newest tokens of the rows that decode."""
    engine = new_engine(new_policy(), replace(GREEDY, max_running=64, prefill_tokens=budget))
    seen, trunk = [], engine.policy.trunk

    def spy(tokens: Tensor, positions: Tensor, attention: Paged) -> Tensor:
        seen.append(attention.cu_seqlens_q.diff().tolist())
        return trunk(tokens, positions, attention)

    monkeypatch.setattr(engine.policy, "trunk", spy)
    engine.generate(draw_prompts(), [0] * len(LENGTHS))
    assert seen[:4] == first
    assert sum(map(sum, seen)) == sum(LENGTHS) + len(LENGTHS) * (LIMIT - 1), "nothing is computed twice"


def test_an_end_exactly_at_the_limit_is_an_end(new_policy: Any) -> None:
    policy, prompt = new_policy(), draw_prompts()[1]
    answer = new_engine(policy, SAMPLED).generate([prompt], [4])[0].response
    first = next(i for i, token in enumerate(answer) if token not in answer[:i] and i > 2)
    for limit, stop, finished in ((first + 1, answer[first], True), (first, answer[first], False)):
        engine = new_engine(policy, replace(SAMPLED, max_response=limit), stop)
        (rollout,) = engine.generate([prompt], [4])
        assert rollout.response == answer[:limit]
        assert rollout.finished is finished


def test_several_stop_tokens_or_none(new_policy: Any) -> None:
    policy, prompts = new_policy(), draw_prompts()
    endless = RolloutEngine(policy, GREEDY, [], max_prompt=17).generate(prompts, [0] * len(prompts))
    assert {len(rollout.response) for rollout in endless} == {LIMIT}
    stops = [endless[0].response[3], endless[1].response[5]]
    stopped = RolloutEngine(policy, GREEDY, stops, max_prompt=17).generate(prompts, [0] * len(prompts))
    for rollout, whole in zip(stopped, endless, strict=True):
        end = next((i + 1 for i, token in enumerate(whole.response) if token in stops), LIMIT)
        assert rollout.response == whole.response[:end]


def test_an_engine_that_was_used_gives_the_same_bits(new_policy: Any) -> None:
    """Once it has forgotten what it cached, or a resumed run, whose engine is new, would differ: which rows and
    blocks are free must not matter."""
    policy, prompts = new_policy(), draw_prompts([3, 9, 1, 7, 17, 5] * 4)
    engine = RolloutEngine(policy, replace(SAMPLED, max_running=8, max_response=40), [7, 8, 9], max_prompt=17)
    runs = []
    for _ in range(3):
        runs.append(engine.generate(prompts, random_seeds(24, 1)))
        engine.forget()
    for again in runs[1:]:
        assert responses(again) == responses(runs[0])
        for ours, theirs in zip(again, runs[0], strict=True):
            assert torch.equal(ours.logprobs, theirs.logprobs)


def test_an_engine_can_be_used_again_and_follows_the_weights(new_policy: Any) -> None:
    policy, prompts = new_policy(dtype=torch.float64), draw_prompts()
    seeds = random_seeds(len(prompts), 6)
    engine = new_engine(policy, SAMPLED, stop=7)
    before = responses(engine.generate(prompts, seeds))
    assert responses(engine.generate(prompts[::-1], seeds[::-1])) == before[::-1]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.3)
    engine.weights_changed()
    after = responses(engine.generate(prompts, seeds))
    assert after == responses(new_engine(policy, SAMPLED, stop=7).generate(prompts, seeds))
    assert after != before


# Blocks


def assert_free(engine: RolloutEngine) -> None:
    engine.cache.manager.check_integrity()
    statistics = engine.cache.manager.statistics
    assert (statistics.running, statistics.waiting, statistics.blocks_in_use) == (0, 0, 0)
    assert statistics.free_blocks + statistics.cached_blocks == engine.cache.manager.num_blocks - 1
    assert statistics.peak_blocks_in_use > 0
    assert not engine.under_way
    assert len(engine.drawn.free) == len(engine.drawn.seeds)


@pytest.fixture
def engine(new_policy: Any) -> RolloutEngine:
    return new_engine(new_policy(), SAMPLED, stop=7)


def stream(engine: RolloutEngine) -> Iterator[tuple[int, Rollout]]:
    prompts = draw_prompts()
    return engine.stream(requests(prompts, random_seeds(len(prompts), 6)))


def test_all_blocks_are_free_at_the_end(engine: RolloutEngine) -> None:
    assert len(list(stream(engine))) == len(LENGTHS)
    assert_free(engine)


def test_all_blocks_are_free_where_the_reader_stops_early(engine: RolloutEngine) -> None:
    expected = list(stream(engine))
    for count in range(1, len(LENGTHS)):
        reading = stream(engine)
        taken = [next(reading) for _ in range(count)]
        assert [index for index, _ in taken] == [index for index, _ in expected[:count]]
        reading.close()
        assert_free(engine)
    assert [r.response for _, r in stream(engine)] == [r.response for _, r in expected]


def test_all_blocks_are_free_after_an_exception_of_the_reader(engine: RolloutEngine) -> None:
    with pytest.raises(KeyError, match="mine"):  # noqa: PT012
        for _ in stream(engine):
            raise KeyError("mine")
    assert_free(engine)


@pytest.mark.parametrize("call", [1, 2, 5, 9])
def test_all_blocks_are_free_after_an_exception_inside(
    call: int, engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [rollout.response for _, rollout in stream(engine)]
    calls, trunk = [], engine.policy.trunk

    def failing(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("out of memory")
        return trunk(*arguments)

    monkeypatch.setattr(engine.policy, "trunk", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream(engine))
    assert_free(engine)
    assert [rollout.response for _, rollout in stream(engine)] == expected


# What is refused


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([[5], [5] * 18], "prompt 1 has 18 tokens, expected 1 to 17"),
        ([[5], [6], []], "prompt 2 has 0 tokens, expected 1 to 17"),
    ],
    ids=["long", "empty"],
)
def test_prompts_that_do_not_fit(prompts: list[list[int]], match: str, engine: RolloutEngine) -> None:
    with pytest.raises(InputError, match=match):
        engine.generate(prompts, [0] * len(prompts))
    assert not engine.under_way


def test_a_prompt_of_the_largest_size_fits(engine: RolloutEngine) -> None:
    (rollout,) = engine.generate([[5] * 17], [0])
    assert rollout.response


def test_a_seed_each(engine: RolloutEngine) -> None:
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        engine.generate([[5], [6]], [0])


def test_one_stream_at_a_time(engine: RolloutEngine) -> None:
    """The rows of two would be handed out to both."""
    first = stream(engine)
    taken = [next(first)]
    with pytest.raises(RuntimeError, match="another stream of this engine is still being read"):
        engine.generate([[5]], [0])
    taken += first
    assert sorted(index for index, _ in taken) == list(range(len(LENGTHS)))
    assert len(engine.generate([[5]], [0])) == 1


def test_nothing_to_do(engine: RolloutEngine) -> None:
    assert engine.generate([], []) == []


def test_random_seeds() -> None:
    seeds = random_seeds(1000, 0, 1, 2)
    assert seeds == random_seeds(1000, 0, 1, 2)
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    for other in ((0, 1, 3), (0, 2, 2), (1, 1, 2)):
        assert not set(random_seeds(1000, *other)) & set(seeds)


def test_a_text_ends_a_response(new_policy: Any) -> None:
    """It is found across tokens, once it is complete, and not in what came before."""
    policy, letters = new_policy(), "abcdefghij"
    decode = lambda tokens: "".join(letters[token % 10] for token in tokens)  # noqa: E731
    prompts, seeds = draw_prompts(), random_seeds(len(LENGTHS), 3)
    free = new_engine(policy, SAMPLED).generate(prompts, seeds)
    stop = decode(free[1].response[4:6])
    config = replace(SAMPLED, stop=("never here", stop))
    engine = RolloutEngine(policy, config, [], max_prompt=max(LENGTHS), decode=decode)
    for ours, without in zip(engine.generate(prompts, seeds), free, strict=True):
        found = decode(without.response).find(stop)
        length = LIMIT if found < 0 else found + len(stop)
        assert ours.response == without.response[:length]
        assert ours.finished == (found >= 0)
    with pytest.raises(ValueError, match="needs `decode`"):
        RolloutEngine(policy, config, [], max_prompt=17)


# Reuse


def exactly(policy: CausalModel, config: RolloutConfig) -> RolloutEngine:
    """In the exact mode, so that what is reused, and when, cannot show in the bits."""
    policy.exact = True
    return RolloutEngine(policy, config, [7, 8], max_prompt=max(LENGTHS))


def equal(ours: list[Rollout], theirs: list[Rollout]) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(a.response == b.response and torch.equal(a.logprobs, b.logprobs) for a, b in pairs)


@pytest.mark.parametrize("running", [3, 64])
def test_samples_of_a_prompt_share_its_computation(running: int, new_policy: Any) -> None:
    """Samples that find no row beside the first ones compute its last token again, for its logits."""
    policy, config = new_policy(), replace(SAMPLED, max_running=running, prefill_tokens=8, kv_blocks=600)
    once, eight = exactly(policy, config), exactly(policy, config)
    prompts = draw_prompts()
    once.generate(prompts, [0] * len(prompts))
    repeated = [prompt for prompt in prompts for _ in range(8)]
    rollouts = eight.generate(repeated, random_seeds(len(repeated), 2))
    assert once.statistics.prefill_tokens == sum(LENGTHS)
    late = eight.statistics.prefill_tokens - sum(LENGTHS)
    assert late == 0 if running == 64 else 0 < late < len(repeated)
    assert eight.statistics.hit_tokens == 7 * sum(LENGTHS)
    for index, (prompt, seed) in enumerate(zip(repeated, random_seeds(len(repeated), 2), strict=True)):
        if index % 9 == 0:
            assert equal([rollouts[index]], exactly(policy, config).generate([prompt], [seed]))


def test_a_common_beginning_is_computed_once_and_never_under_new_weights(new_policy: Any) -> None:
    policy, system = new_policy(), draw_prompts([8], seed=9)[0]
    prompts = [system + prompt for prompt in draw_prompts([2, 5, 9])]
    engine, seeds = exactly(policy, SAMPLED), random_seeds(3, 1)
    first = engine.generate(prompts, seeds)
    before = engine.statistics
    assert equal(engine.generate(prompts, seeds), first)
    again = engine.statistics.since(before)
    assert again.prefill_tokens == sum(len(prompt) % 4 or 1 for prompt in prompts), "only what fills no block of 4"
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.2)
    engine.weights_changed()
    before = engine.statistics
    renewed = engine.generate(prompts, seeds)
    assert equal(renewed, exactly(policy, SAMPLED).generate(prompts, seeds))
    assert engine.statistics.since(before).hit_tokens == 2 * 8, "of this version's own first prompt"
    assert {v for rollout in renewed for v in rollout.versions} == {1}


def test_short_of_blocks_the_youngest_wait_and_nothing_changes(new_policy: Any) -> None:
    policy, prompts, seeds = new_policy(), draw_prompts(), random_seeds(len(LENGTHS), 4)
    roomy = replace(SAMPLED, max_running=7)
    expected = exactly(policy, roomy).generate(prompts, seeds)
    tight = exactly(policy, replace(roomy, kv_blocks=12))  # 11 of 4 tokens, one sequence needs up to 8
    assert equal(tight.generate(prompts, seeds), expected)
    assert tight.statistics.preemptions > 0
    assert_free(tight)
    with pytest.raises(ValueError, match="a KV cache of 5 blocks of 4 tokens does not hold one sequence of 29 tokens"):
        exactly(policy, replace(roomy, kv_blocks=6))


def test_sleep_gives_the_memory_back(new_policy: Any) -> None:
    engine, prompts = exactly(new_policy(), SAMPLED), draw_prompts()
    first = engine.generate(prompts, [3] * 7)
    assert engine.cache.nbytes > 0
    engine.sleep()
    assert engine.cache.nbytes == 0
    assert equal(engine.generate(prompts, [3] * 7), first), "the next use wakes it"
    reading = engine.stream(requests(prompts, [3] * 7))
    next(reading)
    with pytest.raises(RuntimeError, match="still being read"):
        engine.sleep()
    reading.close()


def test_statistics_and_their_metrics(engine: RolloutEngine) -> None:
    before = engine.statistics
    rollouts = engine.generate(draw_prompts(), [5] * 7)
    done = engine.statistics.since(before)
    assert done.drawn_tokens == sum(len(rollout.response) for rollout in rollouts)
    assert done.prefill_tokens + done.hit_tokens == sum(LENGTHS)
    metrics = done.metrics()
    assert metrics["time/tokens_per_second"] == pytest.approx(done.drawn_tokens / done.seconds)
    assert metrics["rollout/cache_hit_rate"] == done.hit_tokens / sum(LENGTHS)


class ReplayedOnTheHost:
    """Stands for a CUDA graph: runs the captured function again over the same memory."""

    def __init__(self, forward: Any, inputs: Any) -> None:
        self.forward, self.inputs, self.hidden = forward, inputs, forward(inputs)

    def replay(self) -> None:
        self.hidden.copy_(self.forward(self.inputs))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_step_filled_up_to_a_fixed_size_draws_the_same(
    family: str, new_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch and the memory that CUDA graphs see; capture and replay themselves need a GPU."""
    policy, config = new_policy(family), replace(SAMPLED, max_running=7)
    prompts, seeds = draw_prompts(), random_seeds(len(LENGTHS), 8)
    work = [Request(p, s, limit=n) for p, s, n in zip(prompts, seeds, (1, 2, 3, 5, 8, 9, 9), strict=True)]
    expected = [rollout for _, rollout in sorted(exactly(policy, config).stream(work), key=lambda item: item[0])]
    engine = exactly(policy, config)
    engine.decoder = Decoder(policy, engine.cache, graphs=True)

    def capture(inputs: Any) -> Any:
        graph = ReplayedOnTheHost(engine.decoder._forward, inputs)
        return SimpleNamespace(graph=graph, hidden=graph.hidden)

    monkeypatch.setattr(engine.decoder, "_capture", capture)
    assert equal([rollout for _, rollout in sorted(engine.stream(work), key=lambda item: item[0])], expected)
    assert len(engine.decoder.graphs) > 1
    assert set(engine.decoder.graphs) <= {1, 2, 4, 7}
    engine.sleep()
    assert not engine.decoder.graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_on_a_gpu(new_policy: Any) -> None:
    """Replayed steps draw what eager ones do: again after an update of the weights in place, and after a sleep."""
    gpu = torch.device("cuda")
    policy = CausalModel(new_policy().model.to(gpu), replace(CPU, device=gpu))
    config = replace(GREEDY, max_running=7, prefill_tokens=64, kv_blocks=64)
    replayed, eager = (new_engine(policy, replace(config, cuda_graphs=graphs)) for graphs in (True, False))
    prompts = draw_prompts()
    for _ in range(3):
        ours, plain = (engine.generate(prompts, [3] * 7) for engine in (replayed, eager))
        assert replayed.decoder.graphs.keys() <= {1, 2, 4, 7}
        assert 7 in replayed.decoder.graphs
        assert responses(ours) == responses(plain)
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-4)
        with torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(1.05)
        for engine in (replayed, eager):
            engine.weights_changed()
    replayed.sleep()
    assert not replayed.decoder.graphs
    ours, plain = (engine.generate(prompts, [3] * 7) for engine in (replayed, eager))
    assert responses(ours) == responses(plain)


def test_sizes_of_batches() -> None:
    assert [padded_size(n, 1000) for n in (1, 3, 33, 256, 257, 321, 999)] == [1, 4, 48, 256, 320, 384, 1000]
    assert padded_size(5, 7) == 7
