# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The figure of the colocation benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.colocation.checks import SYSTEMS
from bench.common.figures import figure


def draw(samples: Mapping[str, Any], path: Path) -> None:
    """Draw the latencies and fine-tune rates of all systems; needs matplotlib."""
    systems = [s for s in SYSTEMS if any(b['system'] == s for b in samples['blocks'])]
    with figure(path, columns=3, size=(14, 4.2)) as (pyplot, (ttft, tpot, rates)):
        colours = dict(zip(systems, pyplot.get_cmap('tab10').colors, strict=False))
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
        blocks = [[b for b in samples['blocks'] if b['system'] == s] for s in systems]
        rates.barh(
            systems, [sum(b['finetune_tokens'] for b in each) / sum(b['wall_s'] for b in each)
                      for each in blocks], color=[colours[s] for s in systems])
        rates.invert_yaxis()
        rates.set(xlabel='fine-tune tokens per second')
