# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Figures of one run of edits: what is right, what is kept, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
import math
import statistics
from typing import Any

from bench.common.results import percentile
from bench.edits.scoring import is_right

Rows = Sequence[Mapping[str, Any]]

NAN = math.nan


@dataclass(frozen=True)
class Figures:
    """
    Figures of one system and one edit set; NaN where there is nothing to count.

    Shares are of the edits, of those with a paraphrase or a near miss, or of the unrelated
    questions; a question is kept if its answer has the same bytes as before the first edit.
    """

    rows: Rows
    unrelated: Rows

    def right(self, when: str) -> float:
        """Share of prompts answered as corrected (reliability)."""
        return _share(is_right(row[when], row['target']) for row in self.rows if when in row)

    def rephrased(self, when: str) -> float:
        """Share of paraphrases answered as corrected (generalisation)."""
        column = f'{when}_rephrase'
        return _share(
            is_right(row[column], row['target']) for row in self.rows if column in row)

    def near_kept(self, when: str) -> float:
        """Share of near misses that are kept."""
        column = f'{when}_near'
        return _share(row[column] == row['near_before'] for row in self.rows if column in row)

    def kept(self, kind: str = '') -> float:
        """Share of unrelated questions, of one kind or all, that are kept in the end."""
        return _share(row['end'] == row['before'] for row in self.unrelated
                      if 'end' in row and (not kind or row['kind'] == kind))

    @property
    def seconds(self) -> list[float]:
        """Seconds until each edit was live; infinite for one that never was."""
        return [row['seconds'] if row['state'] == 'LEARNED' else math.inf
                for row in self.rows if row['state'] != 'KNOWN']

    @property
    def live(self) -> list[float]:
        """Those of :attr:`seconds` that are finite."""
        return [seconds for seconds in self.seconds if math.isfinite(seconds)]

    @property
    def median_s(self) -> float:
        """The median of :attr:`seconds`."""
        return statistics.median(self.seconds) if self.seconds else NAN

    @property
    def p95_s(self) -> float:
        """The 95th percentile of :attr:`seconds`."""
        return percentile(self.seconds, 95)

    def first_s(self, of: str) -> float:
        """Seconds of the first edit of a ``new robot`` or after a ``restart``."""
        return next((row['seconds'] for row in self.rows if row.get('first_of') == of), NAN)

    def per_edit(self, column: str) -> float:
        """Mean of a cost over the edits that were not known before."""
        values = [row[column] for row in self.rows if row['state'] != 'KNOWN']
        return statistics.fmean(values) if values else NAN

    @property
    def explained(self) -> tuple[int, int]:
        """Of the answers in the end that name a correction, how many name theirs, and how many."""
        named = [row[f'{column}_drew_on'] == row['correction_id'] for row in self.rows
                 for column in ('end', 'end_rephrase') if row.get(f'{column}_drew_on')]
        return sum(named), len(named)


def _share(found: Iterable[bool]) -> float:
    values = list(found)
    return sum(values) / len(values) if values else NAN
