# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Comparison of answers with the expected text."""

from __future__ import annotations

import re

NUMBERS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten',
           'eleven', 'twelve')


def contains_phrase(answer: str, key: str) -> bool:
    """
    Return whether an answer contains the key phrase as whole words: 3600 does not match 60.

    A key that is a number up to twelve matches as a word and in digits.
    """
    keys = [key]
    for digits, word in enumerate(NUMBERS):
        if key.lower() in (str(digits), word):
            keys = [str(digits), word]
    phrase = '|'.join(map(re.escape, keys))
    return re.search(rf'(?<!\w)(?:{phrase})(?!\w)', answer, re.IGNORECASE) is not None
