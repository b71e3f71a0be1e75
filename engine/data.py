"""Prompts, pairs and dialogues from files, and the order in which they are seen.

Three formats, told apart by their content and never by the file's name; plain or gzip; UTF-8:

- HH-RLHF, JSONL: `{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}`;
- MOSS-RLHF, a JSON list: lists of turns (strings, human first) or `{"chosen": [turns], "rejected": [turns]}`;
- chat messages, JSONL: `messages`, or `prompt` and / or `chosen` + `rejected`, each a list of
  `{role, content}` or a string (a prompt is then one user turn, an answer one assistant turn).

Other fields are ignored. White space around a turn is no part of it; an empty turn inside a context is
kept. A file that cannot be understood (encoding, JSON, types, roles) always raises `InputError`. A record
that is well formed but no use for its purpose (nothing to learn, an empty final answer, two equal
answers) raises too, or is skipped, counted and logged with `on_bad="skip"`: the published HH-RLHF files
contain a few.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from .errors import InputError

Role = Literal["system", "user", "assistant"]
Paths = str | Path | Iterable[str | Path]
OnBad = Literal["raise", "skip"]

log = logging.getLogger(__name__)

_GZIP_MAGIC = b"\x1f\x8b"
_HH_START = "\n\nHuman:"
_HH_MARKER = re.compile(r"\n\n(Human|Assistant):")
_MOSS_TAG = re.compile(r"\s*(?:(Human:|<\|Human\|>)|(?:Assistant:|<\|MOSS\|>|<\|Assistant\|>))")
_ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one speaker says at a time."""

    role: Role
    content: str


@dataclass(frozen=True)
class Dialogue:
    """Turns in order; `source` ("file:line", or "file[index]" in a JSON list) is for error messages."""

    turns: tuple[Turn, ...]
    source: str


@dataclass(frozen=True)
class Pair:
    """A prompt that ends with a user turn, and two ways to go on; an answer is usually one assistant turn."""

    prompt: tuple[Turn, ...]
    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...]
    source: str


class _BadRecord(InputError):
    """A well-formed record that is no use for its purpose."""


T = TypeVar("T", Dialogue, Pair)
R = TypeVar("R")


def read_dialogues(paths: Paths, on_bad: OnBad = "raise") -> list[Dialogue]:
    """Dialogues to learn from, in file order: each has a user and an assistant turn and ends with the latter.

    Of a pair the chosen side. User turns after the last answer are cut off; an empty assistant turn makes the
    record bad, because it would be learnt. Raises `InputError`; see the module's text for `on_bad`.
    """
    return _read(paths, _as_dialogue, on_bad)


def read_pairs(paths: Paths, on_bad: OnBad = "raise") -> list[Pair]:
    """Pairs for the reward model, in file order: same prompt, two different answers, neither empty.

    Where the two sides differ before their last turns, the prompt is the longest common beginning that
    ends with a user turn, and the answers hold several turns. Raises `InputError`; see the module's text
    for `on_bad`.
    """
    return _read(paths, _as_pair, on_bad)


def read_prompts(paths: Paths, on_bad: OnBad = "raise") -> list[Dialogue]:
    """Prompts to answer, in file order: each ends with a user turn.

    Answers at a dialogue's end are cut off; of a pair the common prompt. Raises `InputError`; see the
    module's text for `on_bad`.
    """
    return _read(paths, _as_prompt, on_bad)


def text_prompt(text: str, source: str) -> Dialogue:
    """One user turn; `InputError` where it has no text."""
    return _as_prompt(Dialogue((Turn("user", _text(text, source, "prompt")),), source))


def context_of(item: Dialogue | Pair) -> tuple[Turn, ...]:
    """The turns up to the last user turn: what the last answer answers."""
    return item.prompt if isinstance(item, Pair) else _cut_after(item.turns, "user")


def split_by_context(items: Iterable[T], held_out: float, seed: int) -> tuple[list[T], list[T]]:
    """Split into (train, held out), about `held_out` of the contexts held out, no context on both sides.

    The side depends on the seed and on the context's text alone: the same context falls on the same side
    in another file, and adding records moves none. With `held_out` > 0 neither side stays empty (for this
    alone one context may change sides). Raises `InputError` if `held_out` is outside [0, 1), or with
    fewer than two contexts.
    """
    if not 0 <= held_out < 1:
        raise InputError(f"held_out: expected a fraction in [0, 1), found {held_out}")
    items = list(items)
    draws = [_draw(item, seed) for item in items]
    distinct = sorted(set(draws))
    if held_out == 0:
        return items, []
    if len(distinct) < 2:
        raise InputError(
            f"held_out = {held_out:g}: a split needs at least 2 different contexts, found {len(distinct)}; "
            "0 holds out none"
        )
    limit = min(max(held_out, np.nextafter(distinct[0], 1.0)), distinct[-1])
    train = [item for item, draw in zip(items, draws, strict=True) if draw >= limit]
    held = [item for item, draw in zip(items, draws, strict=True) if draw < limit]
    return train, held


def _draw(item: Dialogue | Pair, seed: int) -> float:
    """A number in [0, 1) from the seed and the text of the context."""
    text = "\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in context_of(item))
    digest = hashlib.blake2b(f"{seed}\x1d{text}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


class ShuffledStream:
    """An endless shuffled pass over the indices 0..n-1: epoch e is the permutation drawn from (seed, e).

    `position` counts the indices handed out; setting it resumes there, in any process. Raises
    `InputError` for n < 1, a negative seed or a negative position.
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 1 or seed < 0:
            raise InputError(f"stream: expected at least 1 item and a seed >= 0, found n={n}, seed={seed}")
        self.n = n
        self.seed = seed
        self._position = 0
        self._epoch = -1
        self._order: list[int] = []

    @property
    def position(self) -> int:
        """How many indices have been handed out since the start of epoch 0."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        if value < 0:
            raise InputError(f"stream position: expected a number >= 0, found {value}")
        self._position = value

    def take(self, k: int) -> list[int]:
        """The next k indices; k may exceed n, and epochs follow each other without a gap."""
        if k < 0:
            raise InputError(f"stream: expected to take a number >= 0, found {k}")
        taken: list[int] = []
        while len(taken) < k:
            epoch, start = divmod(self._position, self.n)
            part = self._permutation(epoch)[start : start + k - len(taken)]
            taken += part
            self._position += len(part)
        return taken

    def _permutation(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            generator = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
            self._order, self._epoch = generator.permutation(self.n).tolist(), epoch
        return self._order


# What each purpose needs of a record.


def _as_dialogue(item: Dialogue | Pair) -> Dialogue:
    turns = item.prompt + item.chosen if isinstance(item, Pair) else item.turns
    turns = _cut_after(turns, "assistant")
    answers = [turn for turn in turns if turn.role == "assistant"]
    _require(bool(answers), item.source, "turns: expected at least one assistant turn to learn from")
    _require(any(turn.role == "user" for turn in turns), item.source, "turns: expected a user turn")
    _require(all(turn.content for turn in answers), item.source, "assistant turn: expected text, found none")
    return Dialogue(turns, item.source)


def _as_pair(item: Dialogue | Pair) -> Pair:
    if not isinstance(item, Pair):
        raise InputError(f"{item.source}: expected a pair, 'chosen' and 'rejected', found one dialogue")
    _check_prompt(item.prompt, item.source)
    for name, answer in (("chosen", item.chosen), ("rejected", item.rejected)):
        roles = {answer[0].role, answer[-1].role}
        _require(roles == {"assistant"}, item.source, f"{name}: expected an answer, found a user turn")
        _require(bool(answer[-1].content), item.source, f"{name}: expected a final answer, found empty text")
    _require(item.chosen != item.rejected, item.source, "chosen, rejected: expected a difference, found none")
    return item


def _as_prompt(item: Dialogue | Pair) -> Dialogue:
    turns = context_of(item)
    _check_prompt(turns, item.source)
    return Dialogue(turns, item.source)


def _check_prompt(turns: tuple[Turn, ...], source: str) -> None:
    users = [turn for turn in turns if turn.role == "user"]
    _require(any(turn.content for turn in users), source, "prompt: expected a user turn with text")


def _require(condition: bool, source: str, message: str) -> None:
    if not condition:
        raise _BadRecord(f"{source}: {message}")


def _cut_after(turns: tuple[Turn, ...], role: Role) -> tuple[Turn, ...]:
    """The turns up to the last one of this role; none if there is no such turn."""
    end = len(turns)
    while end and turns[end - 1].role != role:
        end -= 1
    return turns[:end]


# Files to records.


def _read(paths: Paths, convert: Callable[[Dialogue | Pair], R], on_bad: OnBad) -> list[R]:
    if on_bad not in ("raise", "skip"):
        raise InputError(f"on_bad: expected 'raise' or 'skip', found {on_bad!r}")
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    if not files:
        raise InputError("data: expected at least one file, found none")
    return [item for path in files for item in _read_file(Path(path), convert, on_bad)]


def _read_file(path: Path, convert: Callable[[Dialogue | Pair], R], on_bad: OnBad) -> list[R]:
    kept: list[R] = []
    bad: list[_BadRecord] = []
    for source, record in _records(path):
        try:
            kept.append(convert(_parse(record, source)))
        except _BadRecord as error:
            if on_bad == "raise":
                raise
            bad.append(error)
    if bad and not kept:
        raise InputError(f"{bad[0]} (and no other record of the file is usable)")
    if bad:
        total = len(bad) + len(kept)
        log.warning("%s: skipped %d of %d records; the first: %s", path, len(bad), total, bad[0])
    return kept


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a file with its place: the items of a JSON list, else one JSON value a line."""
    text = _read_text(path)
    if not text.strip():
        raise InputError(f"{path}: expected records, found an empty file")
    if text.lstrip().startswith("["):
        records = _load_json(text, path, 1)
        if not records:
            raise InputError(f"{path}: expected records, found an empty list")
        yield from ((f"{path}[{index}]", record) for index, record in enumerate(records))
        return
    # Only "\n" ends a line: texts may hold other separators, such as U+2028, that splitlines() would cut at.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _load_json(line, path, number)


def _load_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place, reason = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
        place, reason = first_line, str(error)
    raise InputError(f"{path}:{place}: expected JSON, found an error: {reason}")


def _read_text(path: Path) -> str:
    data = _read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: expected UTF-8, found the byte 0x{data[error.start]:02x}") from None


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path}: expected a file, found a directory")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a readable file: {error.strerror or error}") from None
    if not data.startswith(_GZIP_MAGIC) and not (data and path.suffix == ".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: expected gzip data, found a broken file: {error}") from None


# Records to turns.


def _parse(record: Any, source: str) -> Dialogue | Pair:
    if isinstance(record, list):
        return Dialogue(_turn_list(record, source, "turns"), source)
    if not isinstance(record, dict):
        raise InputError(f"{source}: expected an object or a list of turns, found {_kind(record)}")
    if "chosen" in record or "rejected" in record:
        return _parse_pair(record, source)
    if "messages" in record:
        return Dialogue(_turns(record["messages"], source, "messages"), source)
    if "prompt" in record:
        return Dialogue(_explicit_prompt(record["prompt"], source), source)
    found = ", ".join(sorted(record)) or "none"
    raise InputError(f"{source}: expected a field 'messages', 'prompt' or 'chosen', found: {found}")


def _parse_pair(record: dict[str, Any], source: str) -> Pair:
    for name in ("chosen", "rejected"):
        if name not in record:
            raise InputError(f"{source}: {name}: expected this field beside the other answer, found none")
    prompt = _explicit_prompt(record["prompt"], source) if "prompt" in record else ()
    chosen = _side(record["chosen"], prompt, source, "chosen")
    rejected = _side(record["rejected"], prompt, source, "rejected")
    common = _common_prompt_length(chosen, rejected)
    _require(common > 0, source, "chosen, rejected: expected a common beginning that ends with a user turn")
    return Pair(chosen[:common], chosen[common:], rejected[common:], source)


def _side(value: Any, prompt: tuple[Turn, ...], source: str, field: str) -> tuple[Turn, ...]:
    """The whole conversation of one side, whether the field holds all of it or the answer alone."""
    if isinstance(value, str) and prompt and not value.startswith(_HH_START):
        return (*prompt, Turn("assistant", _text(value, source, field)))
    turns = _turns(value, source, field)
    if not prompt or turns[: len(prompt)] == prompt:
        return turns
    if turns[0].role != "assistant":
        raise InputError(f"{source}: {field}: expected an answer, or a dialogue that starts as 'prompt' does")
    return prompt + turns


def _common_prompt_length(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> int:
    """Length of the longest common beginning that ends with a user turn and leaves each side an answer."""
    length = 0
    for a, b in zip(chosen[:-1], rejected[:-1], strict=False):
        if a != b:
            break
        length += 1
    return len(_cut_after(chosen[:length], "user"))


def _explicit_prompt(value: Any, source: str) -> tuple[Turn, ...]:
    if isinstance(value, str) and not value.startswith(_HH_START):
        return (Turn("user", _text(value, source, "prompt")),)
    turns = _turns(value, source, "prompt")
    if isinstance(value, str) and turns[-1] == Turn("assistant", ""):
        turns = turns[:-1]  # "...\n\nAssistant:" asks for the answer
    _require(turns[-1].role == "user", source, f"prompt: expected a user turn last, found {turns[-1].role}")
    return turns


def _turns(value: Any, source: str, field: str) -> tuple[Turn, ...]:
    if isinstance(value, list):
        return _turn_list(value, source, field)
    if not isinstance(value, str):
        raise InputError(f"{source}: {field}: expected a list of turns or a string, found {_kind(value)}")
    if not value.startswith(_HH_START):
        raise InputError(f"{source}: {field}: expected a field 'prompt' too, or text from {_HH_START!r} on")
    return _split_hh(_text(value, source, field, strip=False))


def _split_hh(text: str) -> tuple[Turn, ...]:
    """Cut at the two markers. A speaker named twice in a row goes on: one turn, a blank line between."""
    parts = _HH_MARKER.split(text)[1:]
    turns: list[Turn] = []
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        turn = Turn("user" if name == "Human" else "assistant", content.strip())
        if turns and turns[-1].role == turn.role:
            turn = Turn(turn.role, f"{turns.pop().content}\n\n{turn.content}".strip())
        turns.append(turn)
    return tuple(turns)


def _turn_list(values: list[Any], source: str, field: str) -> tuple[Turn, ...]:
    _require(bool(values), source, f"{field}: expected turns, found an empty list")
    if all(isinstance(value, str) for value in values):
        return _moss_turns([_text(value, source, f"{field}[{i}]") for i, value in enumerate(values)])
    turns = tuple(_message(value, source, f"{field}[{i}]") for i, value in enumerate(values))
    for i, turn in enumerate(turns):
        if turn.role == "system" and i:
            raise InputError(f"{source}: {field}[{i}].role: expected 'system' in the first message only")
    return turns


def _moss_turns(texts: list[str]) -> tuple[Turn, ...]:
    """Speakers alternate from the human on, whoever speaks last; tags decide where every turn has one.

    A tag that contradicts the order in a partly tagged list is text: answers may well begin with "Human:".
    """
    tags = [_MOSS_TAG.match(text) for text in texts]
    tagged = all(tags)
    turns = []
    for i, (text, tag) in enumerate(zip(texts, tags, strict=True)):
        tag_role: Role | None = None if tag is None else "user" if tag[1] else "assistant"
        role: Role = tag_role if tagged and tag_role else _ROLES[1 + i % 2]
        turns.append(Turn(role, text[tag.end() :].strip() if tag and tag_role == role else text))
    return tuple(turns)


def _message(value: Any, source: str, field: str) -> Turn:
    if not isinstance(value, dict):
        raise InputError(f"{source}: {field}: expected 'role' and 'content', found {_kind(value)}")
    role = value.get("role")
    if role not in _ROLES:
        raise InputError(f"{source}: {field}.role: expected 'system', 'user' or 'assistant', found {role!r}")
    if "content" not in value:
        raise InputError(f"{source}: {field}.content: expected a string, found no such field")
    return Turn(role, _text(value["content"], source, f"{field}.content"))


def _text(value: Any, source: str, field: str, strip: bool = True) -> str:
    if not isinstance(value, str):
        raise InputError(f"{source}: {field}: expected a string, found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise InputError(f"{source}: {field}: expected Unicode text, found a lone surrogate") from None
    return value.strip() if strip else value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
