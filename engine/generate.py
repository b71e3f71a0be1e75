"""Answers to prompts, as they finish."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from .batch import Prompt, Request
from .checkpoint import atomic_file, check_writable
from .config import GenerateConfig
from .data import OnBad, read_prompts, text_prompt
from .errors import InputError
from .metrics import StageProgress, pick
from .models import Placement, check_vocabulary, load_policy, load_tokenizer
from .prompts import encode_prompts
from .rollout import RolloutEngine, random_seeds
from .templates import Style, Template


def generate(
    config: GenerateConfig,
    *,
    model: str | Path,
    texts: Sequence[str] = (),
    data: Sequence[str | Path] = (),
    template: Style = "auto",
    on_bad: OnBad = "raise",
    out: Path | None = None,
) -> None:
    """Answer `texts` and the prompts in `data`: print question and answer, or write JSONL to `out`.

    A line of `out` is {"messages": [..., the answer], "finished": whether it ended by itself}, in the order of the
    prompts. Raises InputError for unusable models or files, or where there is nothing to answer.
    """
    if out is not None:
        check_writable(out)
    placement = Placement.of(config.runtime)
    tokenizer = load_tokenizer(model)
    style = Template(tokenizer, template)
    dialogues = [text_prompt(text, f"--prompt {n}") for n, text in enumerate(texts, 1)]
    dialogues += read_prompts(list(data), on_bad) if data else []
    if not dialogues:
        raise InputError("nothing to answer: give --prompt or --data")
    prompts = encode_prompts(style, dialogues, config.max_prompt, on_bad)
    policy = load_policy(model, placement)
    check_vocabulary(tokenizer, policy, model)
    engine = RolloutEngine(policy, config.rollout, style.eos_token_ids, config.max_prompt, decode=tokenizer.decode)
    answers = _answers(engine, style, prompts, config.runtime.seed)
    if out is None:
        for index, answer, _ in answers:
            print(f"> {prompts[index].messages[-1]['content']}\n{answer}\n", flush=True)
        return
    _write(out, prompts, answers, engine)


def _answers(
    engine: RolloutEngine, template: Template, prompts: Sequence[Prompt], seed: int
) -> Iterator[tuple[int, str, bool]]:
    """(index of the prompt, answer, whether it ended by itself) as they finish."""
    seeds = random_seeds(len(prompts), seed)
    requests = [Request(prompt.tokens, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    for index, rollout in engine.stream(requests):
        yield index, template.decode(rollout.response), rollout.finished


def _write(
    out: Path, prompts: Sequence[Prompt], answers: Iterator[tuple[int, str, bool]], engine: RolloutEngine
) -> None:
    lines = [""] * len(prompts)
    with StageProgress("generate", len(prompts), unit="answer") as progress:
        for done, (index, answer, finished) in enumerate(answers, 1):
            messages = [*prompts[index].messages, {"role": "assistant", "content": answer}]
            lines[index] = json.dumps({"messages": messages, "finished": finished}, ensure_ascii=False)
            figures = engine.statistics.metrics()
            shown = ("time/tokens_per_second", "rollout/cache_hit_rate")
            progress.update(done, **pick(figures, shown))
    with atomic_file(out) as draft:
        draft.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
