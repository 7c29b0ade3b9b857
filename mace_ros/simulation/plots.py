# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Plots of a study as SVG; the same study gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
import io
import math
from typing import Any

from mace_ros.simulation.replay import Outcome, tpot_s

COLOURS = {'mace': '#d62728', 'periodic': '#1f77b4', 'continuous': '#2ca02c',
           'inference_only': '#7f7f7f', 'static_split': '#9467bd'}
STAGES = {'prefill': '#4c78a8', 'decode': '#72b7b2', 'finetune': '#e45756'}
POINTS = 400    # per curve


def draw(outcomes: Sequence[Outcome], sweep: Sequence[Mapping[str, Any]],
         targets: Mapping[str, float]) -> dict[str, str]:
    """
    Return the plots by name, as SVG elements; none if matplotlib is not installed.

    ``sweep`` holds the summaries at all loads, ``targets`` the objectives ttft_ms and tpot_ms.
    """
    if find_spec('matplotlib') is None:
        return {}
    import matplotlib

    matplotlib.use('svg')
    from matplotlib import pyplot, rc_context

    found = {}
    # A fixed salt makes the ids reproducible; fonttype none keeps text as text.
    with rc_context({'svg.hashsalt': 'mace', 'svg.fonttype': 'none', 'font.size': 9,
                     'axes.grid': True, 'grid.alpha': 0.3}):
        for name, fill in _pictures(outcomes, sweep, targets).items():
            figure = pyplot.figure(figsize=(6.4, 3.4), layout='constrained')
            fill(figure)
            file = io.StringIO()
            figure.savefig(file, format='svg', metadata={
                'Date': None, 'Creator': None, 'Format': None, 'Type': None})
            pyplot.close(figure)
            text = file.getvalue()
            found[name] = text[text.index('<svg'):].strip() + '\n'
    return found


def _pictures(outcomes: Sequence[Outcome], sweep: Sequence[Mapping[str, Any]],
              targets: Mapping[str, float]) -> dict[str, Callable[[Any], None]]:
    made: dict[str, Callable[[Any], None]] = {
        'ttft': lambda f: _distribution(
            f, {o.policy: [(r.first_token_at or 0.0) - r.arrival for r in o.requests]
                for o in outcomes}, 'time to first token (ms)', targets['ttft_ms']),
        'tpot': lambda f: _distribution(
            f, {o.policy: [tpot_s(r) for r in o.requests if r.output_tokens > 1]
                for o in outcomes}, 'time per output token (ms)', targets['tpot_ms']),
        'stages': lambda f: _stages(f, outcomes),
        'shares': lambda f: _shares(f, outcomes)}
    if any(o.learned for o in outcomes):
        made['freshness'] = lambda f: _freshness(f, outcomes)
    if len({row['load'] for row in sweep}) > 1:
        made['attainment'] = lambda f: _attainment(f, sweep)
    return made


def _distribution(figure: Any, values: Mapping[str, list[float]], label: str,
                  objective: float) -> None:
    axes = figure.subplots()
    for policy, seconds in values.items():
        x = [1e3 * s for s in sorted(seconds)]
        if not x:
            continue
        places = sorted({round(i * (len(x) - 1) / POINTS) for i in range(POINTS + 1)})
        axes.step([x[i] for i in places], [(i + 1) / len(x) for i in places], where='post',
                  label=policy, color=COLOURS.get(policy))
    axes.axvline(objective, color='black', linestyle=':', label='objective')
    axes.set(xscale='log', xlabel=label, ylabel='share of requests', ylim=(0.0, 1.0))
    axes.legend(fontsize=7)


def _stages(figure: Any, outcomes: Sequence[Outcome]) -> None:
    axes = figure.subplots()
    names = [o.policy for o in outcomes]
    left = [0.0] * len(outcomes)
    for stage, colour in STAGES.items():
        widths = [o.stages[stage] / o.ends_at for o in outcomes]
        axes.barh(names, widths, left=left, color=colour, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel='share of the time', xlim=(0.0, 1.0))
    axes.legend(fontsize=7)


def _shares(figure: Any, outcomes: Sequence[Outcome]) -> None:
    rows = figure.subplots(len(outcomes), sharex=True, squeeze=False)[:, 0]
    for axes, outcome in zip(rows, outcomes, strict=True):
        count = len(outcome.shares['serving'])
        x = [outcome.ends_at * i / count / 60.0 for i in range(count)]
        axes.stackplot(x, outcome.shares['serving'], outcome.shares['learning'],
                       colors=[STAGES['decode'], STAGES['finetune']],
                       labels=['serving', 'learning'])
        axes.set(ylim=(0.0, 1.0), yticks=[0, 1])
        axes.set_ylabel(outcome.policy, rotation=0, ha='right', va='center')
    rows[0].legend(fontsize=6, loc='upper right')
    rows[-1].set_xlabel('minutes')


def _freshness(figure: Any, outcomes: Sequence[Outcome]) -> None:
    axes = figure.subplots()
    for outcome in outcomes:
        steps = [(0.0, 0.0)]
        for i in range(POINTS + 1):
            now = outcome.ends_at * i / POINTS
            oldest = min([each.correction.at for each in outcome.learned
                          if each.correction.at <= now < each.live_at], default=now)
            steps.append((now / 60.0, now - oldest))
        axes.plot(*zip(*steps, strict=True), label=outcome.policy,
                  color=COLOURS.get(outcome.policy))
    axes.set(xlabel='minutes', ylabel='age of the oldest correction\nnot yet live (s)')
    axes.set_yscale('symlog', linthresh=10.0)
    axes.set_ylim(bottom=0.0)
    axes.legend(fontsize=7)


def _attainment(figure: Any, sweep: Sequence[Mapping[str, Any]]) -> None:
    axes = figure.subplots()
    for policy in dict.fromkeys(row['policy'] for row in sweep):
        rows = sorted((r for r in sweep if r['policy'] == policy), key=lambda r: r['load'])
        points = [(r['load'], r['slo_attainment']) for r in rows
                  if math.isfinite(r['slo_attainment'])]
        axes.plot(*zip(*points, strict=True), marker='o', markersize=3, label=policy,
                  color=COLOURS.get(policy))
    axes.set(xlabel='load, as a factor', ylabel='share of requests in time', ylim=(0.0, 1.02))
    axes.legend(fontsize=7)
