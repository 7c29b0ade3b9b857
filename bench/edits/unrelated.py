# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Questions about something else altogether, whose answers no correction may change."""

from __future__ import annotations

from collections.abc import Sequence
import json
from pathlib import Path
from typing import NamedTuple

from bench.common.load import LESSONS
from bench.edits.edit_set import Edit

CHAT_PROMPTS = Path(__file__).parent / 'chat_prompts.txt'


class Unrelated(NamedTuple):
    """A question, and what kind it is of: ``fact``, ``chat`` or ``natural``."""

    kind: str
    question: str


def unrelated_questions(edits: Sequence[Edit], *, facts: int, chat: int) -> list[Unrelated]:
    """Return facts, chat prompts, and the natural questions that the edits bring along."""
    known = [question for question, _ in json.loads(LESSONS.read_text())['facts']]
    lines = [line for line in CHAT_PROMPTS.read_text().splitlines()
             if line and not line.startswith('#')]
    natural = dict.fromkeys(edit.natural for edit in edits if edit.natural)
    return [*(Unrelated('fact', text) for text in known[:facts]),
            *(Unrelated('chat', text) for text in lines[:chat]),
            *(Unrelated('natural', text) for text in natural)]
