# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The picture of bench.colocation, if matplotlib is importable."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.colocation_checks import SYSTEMS


def draw(samples: Mapping[str, Any], path: Path) -> bool:
    """Draw latencies and fine-tune rates of all systems; return whether that was possible."""
    if find_spec('matplotlib') is None:
        return False
    import matplotlib

    matplotlib.use('svg')
    from matplotlib import pyplot

    systems = [s for s in SYSTEMS if any(b['system'] == s for b in samples['blocks'])]
    colours = dict(zip(systems, pyplot.get_cmap('tab10').colors, strict=False))
    figure, (ttft, tpot, rates) = pyplot.subplots(1, 3, figsize=(14, 4.2), layout='constrained')
    for axes, column, title in ((ttft, 'ttft_ms', 'time to first token (ms)'),
                                (tpot, 'tpot_ms', 'time per output token (ms)')):
        for system in systems:
            values = sorted(r[column] for r in samples['requests'] if r['system'] == system
                            and r[column] is not None)
            shares = [(i + 1) / len(values) for i in range(len(values))]
            axes.step(values, shares, where='post', label=system, color=colours[system],
                      linewidth=2.2 if system == 'mace' else 1.2)
        axes.set(xscale='log', xlabel=title, ylabel='share of requests', ylim=(0, 1))
        axes.grid(alpha=0.3)
    ttft.legend(fontsize=7)
    per_system = [[b for b in samples['blocks'] if b['system'] == s] for s in systems]
    rates.barh(
        systems, [sum(b['finetune_tokens'] for b in blocks) / sum(b['wall_s'] for b in blocks)
                  for blocks in per_system], color=[colours[s] for s in systems])
    rates.invert_yaxis()
    rates.set(xlabel='fine-tune tokens per second')
    figure.savefig(path, metadata={'Date': None})
    pyplot.close(figure)
    return True
