# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A small arrival trace."""

from __future__ import annotations

from pathlib import Path
import random


def write_trace(path: Path, count: int = 60, seed: int = 1) -> Path:
    """Write a small trace in the format of the Azure traces."""
    dice = random.Random(seed)
    at, lines = 46.0, ['TIMESTAMP,ContextTokens,GeneratedTokens']
    for _ in range(count):
        at += dice.expovariate(1.0)
        lines.append(f'2023-11-16 18:{15 + int(at) // 60:02d}:{at % 60:010.7f},'
                     f'{dice.randint(20, 900)},{dice.randint(2, 90)}')
    path.write_text('\n'.join(lines) + '\n')
    return path
