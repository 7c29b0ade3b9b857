# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Paraphrases of a question, by fixed templates.

They are trained beside the correction, so that it does not depend on the exact words of one
prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mace_ros.store.records import Messages

# The first one keeps the content words only: paraphrases differ most in the others.
TRAINED = ('{content}?', 'Hello! {}', 'Question: {}', '{} Thank you.', 'One more thing. {}')

# English question words, auxiliaries and prepositions.
FUNCTION_WORDS = frozenset({
    'a', 'an', 'and', 'are', 'at', 'by', 'can', 'could', 'did', 'do', 'does', 'for', 'from',
    'had', 'has', 'have', 'how', 'in', 'is', 'it', 'may', 'might', 'must', 'of', 'on', 'or',
    'shall', 'should', 'that', 'the', 'to', 'was', 'were', 'what', 'when', 'where', 'which',
    'who', 'whom', 'whose', 'why', 'will', 'with', 'would'})


def content(text: str) -> str:
    """Return the content words of a question; all its words if there are none."""
    words = text.strip().rstrip('?.!').split()
    return ' '.join([w for w in words if w.lower() not in FUNCTION_WORDS] or words)


def paraphrases(messages: Messages, templates: Sequence[str]) -> list[list[Mapping[str, str]]]:
    """Return the conversation with its last question in each of the templates."""
    asked = [i for i, message in enumerate(messages) if message['role'] == 'user']
    if not asked or messages[asked[-1]].get('raw'):
        return []
    result = []
    for template in templates:
        changed: list[Mapping[str, str]] = list(messages)
        last = changed[asked[-1]]
        question = last['content']
        changed[asked[-1]] = {
            **last, 'content': template.format(question, content=content(question))}
        result.append(changed)
    return result
