"""Dialogues to prompts ready to sample for."""

from __future__ import annotations

from collections.abc import Sequence

from .batch import Prompt
from .data import Dialogue
from .templates import Template


def encode_prompts(template: Template, dialogues: Sequence[Dialogue], limit: int) -> list[Prompt]:
    """Prompts of at most `limit` tokens; InputError naming the source where one cannot be shortened so far."""
    return [
        Prompt(
            messages=[{"role": turn.role, "content": turn.content} for turn in dialogue.turns],
            tokens=template.encode_prompt(dialogue, limit),
        )
        for dialogue in dialogues
    ]
