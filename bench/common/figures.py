# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""SVG figures, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec('matplotlib') is not None


@contextmanager
def figure(path: Path, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Yield ``(pyplot, axes)`` of a new figure, and save it to ``path`` afterwards."""
    import matplotlib

    matplotlib.use('svg')
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, columns, figsize=size, layout='constrained')
    yield pyplot, axes
    drawing.savefig(path, metadata={'Date': None})
    pyplot.close(drawing)
