"""Dialogues to prompts ready to sample for."""

from __future__ import annotations

from collections.abc import Sequence

from .batch import Prompt
from .data import Dialogue, OnBad
from .templates import Template, encode_all


def encode_prompts(template: Template, dialogues: Sequence[Dialogue], limit: int, on_bad: OnBad) -> list[Prompt]:
    """Prompts of at most `limit` tokens.

    One that cannot be shortened so far is an InputError that names its source, or left out, as `on_bad` says.
    """

    def encode(dialogue: Dialogue) -> Prompt:
        messages = [{"role": turn.role, "content": turn.content} for turn in dialogue.turns]
        return Prompt(messages, template.encode_prompt(dialogue, limit))

    return encode_all(encode, dialogues, on_bad)
