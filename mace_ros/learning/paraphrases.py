# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The same question in other words, by fixed templates: to judge by, never to train on."""

from __future__ import annotations

from collections.abc import Mapping

from mace_ros.learning.journal import Messages

TEMPLATES = ('Please answer: {}', 'I would like to know: {}', '{} Please be brief.')


def paraphrases(messages: Messages) -> list[list[Mapping[str, str]]]:
    """Return the conversation with its last question in each of the :data:`TEMPLATES`."""
    asked = [i for i, message in enumerate(messages) if message['role'] == 'user']
    if not asked:
        return []
    result = []
    for template in TEMPLATES:
        changed: list[Mapping[str, str]] = list(messages)
        last = changed[asked[-1]]
        changed[asked[-1]] = {**last, 'content': template.format(last['content'])}
        result.append(changed)
    return result
