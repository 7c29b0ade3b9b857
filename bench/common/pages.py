# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Figures in Markdown pages, which come from the recorded results.

A figure stands between two HTML comments, the first of which names its source: the result, the
check or reported number (or, as ``TABLE > ROW > COLUMN``, the cell of a table), and how it is
written::

    <!--= edits: wikibigedit: right in the end {:.0%} -->100%<!--/-->

A row is named by its first cells, as many as are needed, separated by commas. The name
``recorded`` is the day of the run, and ``recorded: PART`` that of a part's samples. If the parts
were recorded on different days, only the second one is accepted.
``python -m bench.report --markdown`` brings all pages up to date, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
import re
from typing import Any

ROOT = Path(__file__).parents[2]
FIGURE = re.compile(
    r'(?P<begin><!--= (?P<bench>\w+): (?P<name>.+?) (?P<form>\{:[^{}]*\})(?P<unit>[^{}]*?) -->)'
    r'(?P<shown>.*?)<!--/-->')
RECORDED = 'recorded'
PART = ' > '


class UnknownFigure(ValueError):
    """A page names a figure that no result has."""


def pages() -> list[Path]:
    """Return README and all pages of the documentation."""
    return [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]


def updated(text: str, results: Iterable[Mapping[str, Any]]) -> str:
    """Return a page with all figures as the results have them; raises ``UnknownFigure``."""
    by_name = {result['bench']: result for result in results}

    def figure(match: re.Match[str]) -> str:
        result = by_name.get(match['bench'])
        if result is None:
            raise UnknownFigure(f'{match["begin"]}: there is no such result')
        values = list(_values(result, match['name']))
        if len(values) != 1 or values[0] is None:
            raise UnknownFigure(f'{match["begin"]}: the result has {values} of this name')
        return f'{match["begin"]}{match["form"].format(values[0])}{match["unit"]}<!--/-->'

    return FIGURE.sub(figure, text)


def is_day(name: str) -> bool:
    """Return whether the figure of this name is a day on which something was recorded."""
    return name == RECORDED or name.startswith(f'{RECORDED}: ') or name.endswith(
        f'{PART}{RECORDED}')


def _days(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the day on which each part of a result was recorded."""
    earlier = result.get('earlier', {})
    return {name: earlier.get(name, result)['started'][:10]
            for name, value in result['samples'].items()
            # Conditions are what the samples were taken under; single numbers follow from them.
            if isinstance(value, (list, dict)) and name != 'conditions'}


def _values(result: Mapping[str, Any], name: str) -> Iterator[Any]:
    """Yield the checks, reported numbers and cells of tables that have a name."""
    if name == RECORDED:
        yield from {*_days(result).values()}
    elif name.startswith(f'{RECORDED}: '):
        yield _days(result).get(name.removeprefix(f'{RECORDED}: '))
    for each in (*result['checks'], *result['reported']):
        if each['name'] == name:
            yield each['value']
    title, *place = name.split(PART)
    if len(place) != 2:
        return
    row_name, column = place
    for table in result['tables']:
        if table['title'] == title and column in table['columns']:
            at = table['columns'].index(column)
            for row in table['rows']:
                cells = ', '.join(map(str, row))
                if cells == row_name or cells.startswith(f'{row_name}, '):
                    yield row[at]
