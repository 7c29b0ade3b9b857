# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a threshold of similarity draws in, and what it leaves alone: figure and table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.common.figures import figure
from bench.common.results import Table

THRESHOLDS = [i / 100 for i in range(101)]
# What each kind of question should do, and the colour of its curve.
KINDS = {'rephrase': ('paraphrases in scope', 'C0'), 'near': ('near misses out of scope', 'C3'),
         'unrelated': ('unrelated questions out of scope', 'C2')}


def share(row: Mapping[str, Any], threshold: float) -> float | None:
    """Return the share of questions that do what they should at a threshold; None without any."""
    drawn_in = [similarity >= threshold for similarity in row['similarities']]
    if not drawn_in:
        return None
    inside = sum(drawn_in) / len(drawn_in)
    return inside if row['kind'] == 'rephrase' else 1.0 - inside


def own_named(row: Mapping[str, Any]) -> float | None:
    """Return how many of the questions in scope resemble their own edit most, as a share."""
    own = [own for similarity, own in zip(row['similarities'], row['own'], strict=True)
           if similarity >= row['threshold']]
    return sum(own) / len(own) if own else None


def groups(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the samples by edit set and number of edits in memory, then by kind."""
    result: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        result.setdefault((row['set'], row['remembered']), {})[row['kind']] = row
    return result


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the shares at the threshold of the node, and the time that a question takes."""
    return Table(
        'Scope, without the device',
        ['set', 'edits', 'threshold', *(title for title, _ in KINDS.values()), 'own edit named',
         'median ms'],
        [[name, size, found['rephrase']['threshold'],
          *(share(found[kind], found[kind]['threshold']) for kind in KINDS),
          own_named(found['rephrase']),
          median(ms for kind in KINDS for ms in found[kind]['ms'])]
         for (name, size), found in groups(rows).items()])


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a curve per kind of question over the threshold; needs matplotlib."""
    found = groups(rows)
    with figure(path, columns=len(found), size=(4.2 * len(found), 3.6)) as (_, drawn):
        for axes, ((name, size), kinds) in zip(
                [drawn] if len(found) == 1 else drawn, found.items(), strict=True):
            for kind, (title, colour) in KINDS.items():
                if kinds[kind]['similarities']:
                    axes.plot(THRESHOLDS, [share(kinds[kind], t) for t in THRESHOLDS],
                              label=title, color=colour)
            axes.axvline(kinds['rephrase']['threshold'], color='0.6', linestyle='--', zorder=0)
            axes.set(title=f'{name}, {size} edits', xlabel='threshold of similarity',
                     ylim=(0, 1.02))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
