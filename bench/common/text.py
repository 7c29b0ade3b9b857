# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Comparison of answers with the expected text."""

from __future__ import annotations

import re


def contains_phrase(answer: str, key: str) -> bool:
    """Return whether an answer contains the key phrase as whole words: 3600 does not match 60."""
    return re.search(rf'(?<!\w){re.escape(key)}(?!\w)', answer, re.IGNORECASE) is not None
