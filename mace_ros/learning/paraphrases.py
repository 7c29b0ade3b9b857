# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The same question in other words, by fixed templates.

Some are to judge by and never trained on; others are trained on beside the correction, so
that it does not hang on the exact words of one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mace_ros.learning.journal import Messages

JUDGED = ('Please answer: {}', 'I would like to know: {}', '{} Please be brief.')
TRAINED = ('Question: {}', 'Hello! {}', '{} Thank you.', 'One more thing. {}')


def paraphrases(messages: Messages, templates: Sequence[str]) -> list[list[Mapping[str, str]]]:
    """Return the conversation with its last question in each of the templates."""
    asked = [i for i, message in enumerate(messages) if message['role'] == 'user']
    if not asked:
        return []
    result = []
    for template in templates:
        changed: list[Mapping[str, str]] = list(messages)
        last = changed[asked[-1]]
        changed[asked[-1]] = {**last, 'content': template.format(last['content'])}
        result.append(changed)
    return result
