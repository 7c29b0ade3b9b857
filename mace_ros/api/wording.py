# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Texts with a number in them."""

from __future__ import annotations


def counted(number: int, one: str, more: str = '') -> str:
    """Return the number with what it counts: ``one`` after 1, else ``more`` (an added s)."""
    return f'{number} {one if number == 1 else more or one + "s"}'
