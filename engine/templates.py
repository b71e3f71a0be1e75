"""Dialogues to tokens: one encoding for SFT, reward model, rollouts and PPO.

Two kinds of styles:

- the paper's: `[BOS] "Human: question" EOS "Assistant: answer" EOS ... "Assistant:"`, with the markers
  `Human:` / `Assistant:` (en) or `<|Human|>` / `<|MOSS|>` and no spaces (zh). A system turn stands first,
  without a marker.
- chat: the tokenizer's own chat template; it decides on BOS.

Every piece is tokenised on its own and a prompt ends where the assistant starts to speak, so that the
encoding of a dialogue starts with exactly the tokens of its prompt. BOS stands at the very start or
nowhere. Text from the data never becomes a special token.

What is too long loses its oldest rounds (a user's turns and the answers to them) until it fits; a leading
system turn and the last round stay, so the roles stay right. Only where the last round alone is too long
is its answer cut, at the end; a user turn never is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from jinja2 import TemplateError

from .data import Dialogue, OnBad, Pair, Turn
from .errors import InputError

Style = Literal["auto", "chat", "en", "zh"]
Item = TypeVar("Item")
Result = TypeVar("Result")
Turns = tuple[Turn, ...]

log = logging.getLogger(__name__)

_MARKERS = {"en": ("Human:", "Assistant:", " "), "zh": ("<|Human|>", "<|MOSS|>", "")}
_PROBE = "probe"
_AS_TEXT = "\ue000{}\ue001"  # private-use characters around what looks like a special token but is text


@dataclass(frozen=True)
class Encoded:
    """Tokens of one sequence `[T]` and, for each, whether it is learnt (answers, each with its EOS)."""

    tokens: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class _Piece:
    tokens: list[int]
    answer: bool = False


Pieces = list[_Piece]


def encode_all(encode: Callable[[Item], Result], items: Sequence[Item], on_bad: OnBad) -> list[Result]:
    """`encode` of each item; one that cannot be shortened to the limit raises, or is left out and counted in the log.

    Raises `InputError` too where none of the items is left.
    """
    results, bad = [], []
    for item in items:
        try:
            results.append(encode(item))
        except InputError as error:
            if on_bad == "raise":
                raise
            bad.append(error)
    if bad and not results:
        raise bad[0]
    if bad:
        log.warning("skipped %d of %d records that do not fit; the first: %s", len(bad), len(items), bad[0])
    return results


class Template:
    """Encodes turns with one tokenizer in one style.

    `style` is "auto" (the chat template where the tokenizer has one, else "en"), "chat", "en" or "zh"; the
    attribute holds the one in use. `eos_token_ids` are the tokens that end a response. Limits count tokens.
    Raises `InputError` for a tokenizer without an EOS token, or a chat template that cannot be used.
    """

    def __init__(self, tokenizer: Any, style: Style = "auto") -> None:
        self.tokenizer = tokenizer
        name = _name(tokenizer)
        if tokenizer.eos_token_id is None:
            raise InputError(f"tokenizer {name}: expected an EOS token to end responses, found none")
        self.style: str = style
        if style == "auto":
            self.style = "chat" if tokenizer.chat_template else "en"
        if self.style not in ("chat", *_MARKERS):
            raise InputError(f"template style: expected 'auto', 'chat', 'en' or 'zh', found {style!r}")
        if self.style == "chat" and not tokenizer.chat_template:
            raise InputError(f"tokenizer {name}: expected a chat template for the style 'chat', found none")
        self._splitter = _Chat(tokenizer) if self.style == "chat" else _Paper(tokenizer, self.style)
        self.eos_token_ids = self._splitter.eos_token_ids

    def encode_prompt(self, prompt: Dialogue | Sequence[Turn], limit: int) -> list[int]:
        """Tokens `[T]`, T <= `limit`, up to where the assistant starts to speak.

        Raises `InputError` if the last user turn (and a leading system turn) cannot fit.
        """
        turns, source = _unpack(prompt)
        head, _ = self._fit(turns, [], source, limit)
        return _join(head).tokens

    def encode_dialogue(self, dialogue: Dialogue | Sequence[Turn], limit: int) -> Encoded:
        """At most `limit` tokens `[T]`; all answers are learnt, turns after the last one are left out.

        Raises `InputError` if there is no answer, or not one token of the last one can fit.
        """
        turns, source = _unpack(dialogue)
        start, end = _last_answer(turns, source)
        head, tails = self._fit(turns[:start], [turns[start:end]], source, limit)
        return _cut(_join(head + tails[0]), limit)

    def encode_pair(self, pair: Pair, limit: int) -> tuple[Encoded, Encoded]:
        """(chosen, rejected): the prompt and an answer in at most `limit` tokens `[T]`, the mask on the answer alone.

        The prompt's tokens are the same; the longer side decides how many of its rounds stay. Raises `InputError` if
        not one token of an answer can fit.
        """
        head, tails = self._fit(pair.prompt, [pair.chosen, pair.rejected], pair.source, limit)
        chosen, rejected = (_cut(_answer_only(head, tail), limit) for tail in tails)
        return chosen, rejected

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a response `[T]`, without special tokens and outer white space."""
        ids = [int(token) for token in tokens]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def _fit(self, prompt: Turns, answers: list[Turns], source: str, limit: int) -> tuple[Pieces, list[Pieces]]:
        """Pieces of the longest kept prompt with which each answer fits, and of the answers, uncut."""
        if not prompt or prompt[-1].role != "user":
            raise InputError(f"{source}: prompt: expected a user turn at the end")
        for answer in answers:
            if not answer or {answer[0].role, answer[-1].role} != {"assistant"}:
                raise InputError(f"{source}: answer: expected an assistant turn first and last")
        for kept in _drop_rounds(prompt):
            head = self._splitter.split(kept, (), source)[0]
            tails = [self._splitter.split(kept, answer, source)[1] for answer in answers]
            if _length(head) + max(map(_length, tails), default=0) <= limit:
                return head, tails
        needed = _length(head) + bool(answers)  # an answer needs one token at least
        if needed > limit:
            fault = f"expected at most {limit} tokens, found {needed} that cannot be shortened"
            raise InputError(f"{source}: last turn: {fault}")
        return head, tails


class _Encoder:
    """One text to ids, without BOS and the like."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        first = tokenizer.convert_ids_to_tokens(tokenizer.encode("x", add_special_tokens=False)[:1])
        self._adds_space = bool(first) and first[0].startswith("▁")

    def __call__(self, text: str, as_text: bool = False) -> list[int]:
        """Ids; special tokens written out in the text count as such unless `as_text`."""
        # Where the tokenizer puts a space before every text, ours would be a second one.
        text = text[1:] if self._adds_space and text.startswith(" ") else text
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=as_text)
        return ids


class _Paper:
    """The paper's templates: a marker, the text, EOS."""

    def __init__(self, tokenizer: Any, style: str) -> None:
        self._encode = _Encoder(tokenizer)
        user, assistant, self._gap = _MARKERS[style]
        self._user, self._assistant = self._encode(user), self._encode(assistant)
        self.eos_token_ids: tuple[int, ...] = (tokenizer.eos_token_id,)
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer.encode(_PROBE)[:1] == [bos]
        self._bos = [bos] if adds_bos else []

    def split(self, prompt: Turns, answer: Turns, source: str) -> tuple[Pieces, Pieces]:
        """Pieces up to where the answer starts, and pieces of the answer."""
        head = [_Piece(self._bos), *(piece for turn in prompt for piece in self._turn(turn))]
        tail = [piece for turn in answer for piece in self._turn(turn)]
        return [*head, _Piece(self._assistant)], tail[1:]  # the head has the first answer's marker

    def _turn(self, turn: Turn) -> Pieces:
        if turn.role == "system":
            return [_Piece(self._closed(turn.content))]
        text = self._closed(self._gap + turn.content if turn.content else "")
        if turn.role == "user":
            return [_Piece(self._user + text)]
        return [_Piece(self._assistant), _Piece(text, answer=True)]

    def _closed(self, text: str) -> list[int]:
        return [*self._encode(text, as_text=True), *self.eos_token_ids]


class _Chat:
    """The tokenizer's chat template: the rendered text, cut where answers start and after their EOS."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._encode = _Encoder(tokenizer)
        self._special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special = sorted(tokenizer.convert_ids_to_tokens(list(self._special_ids)), key=len, reverse=True)
        pattern = "|".join(map(re.escape, special)) or "(?!)"
        self._special, self._marked = re.compile(pattern), re.compile(_AS_TEXT.format(f"({pattern})"))
        self.eos_token_ids = self._find_eos()

    def split(self, prompt: Turns, answer: Turns, source: str) -> tuple[Pieces, Pieces]:
        """Pieces up to where the answer starts, and pieces of the answer up to its last EOS.

        Only what stands before an answer must come back unchanged when the dialogue goes on: templates that
        drop the reasoning of earlier answers work too.
        """
        turns = prompt + answer
        whole = self._render(turns, not answer, source)
        starts = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        cuts = [*(self._cut_at(whole, turns[:i], source) for i in starts), len(whole)]
        head, tail = [_Piece(self._ids(whole[: cuts[0]]))], list[_Piece]()
        for i, begin, end in zip(starts, cuts, cuts[1:], strict=False):
            (head if i < len(prompt) else tail).extend(self._answer(whole[begin:end], source))
        return head, tail[:-1]  # what the template writes after the last EOS is nobody's

    def _find_eos(self) -> tuple[int, ...]:
        """The token that closes an answer (the first special one after its text), and the tokenizer's own."""
        source = "tokenizer"
        text = self._render((Turn("user", _PROBE), Turn("assistant", _PROBE)), False, source)
        closing = self._ids(text[text.rindex(_PROBE) + len(_PROBE) :])
        ends = [token for token in closing if token in self._special_ids]
        if not ends:
            raise self._error(source, "does not close an answer with a special token")
        return tuple(dict.fromkeys((ends[0], self.tokenizer.eos_token_id)))

    def _render(self, turns: Turns, generation: bool, source: str) -> str:
        messages = [{"role": turn.role, "content": self._mark_special(turn.content)} for turn in turns]
        render = self.tokenizer.apply_chat_template
        try:
            return str(render(messages, tokenize=False, add_generation_prompt=generation))
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise self._error(source, f"refuses it: {' '.join(str(error).split())}") from error

    def _mark_special(self, text: str) -> str:
        return self._special.sub(lambda match: _AS_TEXT.format(match[0]), text)

    def _ids(self, rendered: str) -> list[int]:
        parts = self._marked.split(rendered)  # plain, marked, plain, ...
        return [id for i, part in enumerate(parts) if part for id in self._encode(part, as_text=i % 2 == 1)]

    def _cut_at(self, whole: str, turns: Turns, source: str) -> int:
        if not turns:
            raise self._error(source, "needs a user turn before the first answer")
        start = self._render(turns, True, source)
        if not whole.startswith(start):
            raise self._error(source, f"rewrites the dialogue before turn {len(turns)} when it goes on")
        return len(start)

    def _answer(self, rendered: str, source: str) -> Pieces:
        ids = self._ids(rendered)
        end = next((i + 1 for i, token in enumerate(ids) if token in self.eos_token_ids), None)
        if end is None:
            raise self._error(source, "leaves an answer without EOS")
        return [_Piece(ids[:end], answer=True), _Piece(ids[end:])]

    def _error(self, source: str, fault: str) -> InputError:
        name = _name(self.tokenizer)
        return InputError(f"{source}: the chat template of {name} {fault} (the styles 'en', 'zh' need none)")


def _name(tokenizer: Any) -> str:
    return str(tokenizer.name_or_path or type(tokenizer).__name__)


def _unpack(item: Dialogue | Sequence[Turn]) -> tuple[Turns, str]:
    return (item.turns, item.source) if isinstance(item, Dialogue) else (tuple(item), "dialogue")


def _last_answer(turns: Turns, source: str) -> tuple[int, int]:
    """Start and end of the last run of assistant turns."""
    end = len(turns)
    while end and turns[end - 1].role != "assistant":
        end -= 1
    if not end:
        raise InputError(f"{source}: expected at least one assistant turn, found none")
    start = end
    while start and turns[start - 1].role == "assistant":
        start -= 1
    return start, end


def _drop_rounds(turns: Turns) -> Iterator[Turns]:
    """The turns, then without their oldest round, and so on down to the last round."""
    system = turns[:1] if turns[0].role == "system" else ()
    yield turns
    for i in range(len(system) + 1, len(turns)):
        if turns[i].role == "user" and turns[i - 1].role == "assistant":
            yield system + turns[i:]


def _length(pieces: Pieces) -> int:
    return sum(len(piece.tokens) for piece in pieces)


def _join(pieces: Pieces) -> Encoded:
    tokens = [token for piece in pieces for token in piece.tokens]
    return Encoded(tokens, [piece.answer for piece in pieces for _ in piece.tokens])


def _answer_only(head: Pieces, tail: Pieces) -> Encoded:
    return _join([*(_Piece(piece.tokens) for piece in head), *tail])


def _cut(encoded: Encoded, limit: int) -> Encoded:
    return Encoded(encoded.tokens[:limit], encoded.mask[:limit])
