# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""When a freely decoded answer counts as right."""

from __future__ import annotations

import re
import string

MAX_TOKENS = 32     # of an answer

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_WITHOUT_PUNCTUATION = str.maketrans('', '', string.punctuation)


def is_right(answer: str, target: str) -> bool:
    """
    Return whether an answer, up to its first "." or newline, is the target once normalised.

    A target may itself contain a ".", so the whole answer may match as well.
    """
    expected = normalised(target)
    return expected in (normalised(first_sentence(answer)), normalised(answer))


def first_sentence(text: str) -> str:
    """Return a text up to its first "." or newline."""
    return re.split(r'[.\n]', text.strip(), maxsplit=1)[0]


def normalised(text: str) -> str:
    """Return a text as SQuAD compares it: no capitals, punctuation, articles or extra spaces."""
    return ' '.join(_ARTICLES.sub(' ', text.lower().translate(_WITHOUT_PUNCTUATION)).split())
