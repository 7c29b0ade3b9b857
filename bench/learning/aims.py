# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What learning has to reach, by ``adapter.scope``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Aims:
    """Targets of the parts one and forty; shares are of all corrections or facts."""

    seconds: str            # until a correction is live, median
    paraphrases: str        # answered correctly
    facts: str              # right after the corrections of the part one
    same_words: str         # of facts, in either part; empty: no target
    in_a_row: str           # of forty, right in the end
    facts_after: str        # right after forty


SIMILAR = Aims('<= 4', '>= 0.85', '>= 1', '>= 1', '>= 1', '>= 1')
# One adapter acts on every answer there.
EVERYWHERE = Aims('<= 30', '>= 0.7', '>= 0.95', '', '>= 0.85', '>= 0.9')
