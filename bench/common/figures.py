# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
SVG figures, where matplotlib is installed.

A figure has a background of its own and follows the reader's colour scheme, so that it is readable
on light and dark pages. The same numbers give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
import re
from typing import Any

INK, PAPER = '#1f2328', '#ffffff'
DARK_INK, DARK_PAPER = '#e6edf3', '#0d1117'
# Readable on both papers, also for most readers with a colour deficiency (Okabe and Ito).
BLUE, ORANGE, GREEN, RED, GREY = '#0b7fc7', '#e08a00', '#009e73', '#d55e00', '#8b949e'

STYLE: dict[Any, Any] = {
    'axes.edgecolor': INK, 'axes.facecolor': PAPER, 'axes.labelcolor': INK,
    'axes.spines.right': False, 'axes.spines.top': False, 'axes.titlesize': 'medium',
    'figure.facecolor': PAPER, 'font.family': 'sans-serif', 'legend.frameon': False,
    'savefig.facecolor': PAPER, 'svg.fonttype': 'none', 'svg.hashsalt': 'mace_ros',
    'text.color': INK, 'xtick.color': INK, 'ytick.color': INK}
DARK = f"""<style>@media (prefers-color-scheme: dark) {{
  [style*="fill: {PAPER}"] {{ fill: {DARK_PAPER} !important }}
  [style*="fill: {INK}"] {{ fill: {DARK_INK} !important }}
  [style*="stroke: {INK}"] {{ stroke: {DARK_INK} !important }}
}}</style>"""


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec('matplotlib') is not None


@contextmanager
def figure(path: Path, columns: int, size: tuple[float, float], rows: int = 1) -> Iterator[Any]:
    """Yield ``(pyplot, axes)`` of a new figure, and save it to ``path`` afterwards."""
    import matplotlib

    matplotlib.use('svg')
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        drawing, axes = pyplot.subplots(rows, columns, figsize=size, layout='constrained')
        yield pyplot, axes
        drawing.savefig(path, metadata={'Date': None, 'Creator': None})
        pyplot.close(drawing)
    svg = path.read_text()
    path.write_text(re.sub(r'(<svg[^>]*>)', rf'\1{DARK}', svg, count=1))
