# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Searches the parameters that meet the SLOs with the most learning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mace_ros.api.settings import PARAMETERS, Settings, Value
from mace_ros.simulation.replay import summary
from mace_ros.simulation.report import markdown
from mace_ros.simulation.study import run, Study, Task

# Candidate values; the search varies one parameter at a time.
CANDIDATES: Mapping[str, tuple[Value, ...]] = {
    'scheduler.max_batch_tokens': (128, 256, 512, 1024),
    'scheduler.max_slowdown': (1.0, 1.02, 1.05, 1.1, 1.2, 1.5),
    'finetune.max_blocking_ms': (10.0, 25.0, 50.0, 100.0, 200.0),
    'finetune.min_share': (0.0, 0.05, 0.1, 0.2)}
ROUNDS = 2
# Attainment that learning may cost where the target cannot be reached.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Trial:
    """Some parameters, and the result of a replay with them."""

    values: tuple[tuple[str, Value], ...]
    attainment: float
    learning: float      # fine-tune tokens per second

    def is_better(self, other: Trial, target: float) -> bool:
        """Return whether it meets the target with more learning, or comes closer to it."""
        meets, other_meets = self.attainment >= target, other.attainment >= target
        if meets and other_meets:
            return self.learning > other.learning
        return meets or (not other_meets and self.attainment > other.attainment)


@dataclass(frozen=True)
class Tuning:
    """The result of a search: all trials in order, the target, and the best trial."""

    trials: tuple[Trial, ...]
    target: float
    best: Trial


def tune(study: Study, *, processes: int,
         on_progress: Callable[[int], object] | None = None) -> Tuning:
    """
    Search the parameters of :data:`CANDIDATES`, one at a time.

    The target is ``monitor.slo_target``, or, where serving without learning does not reach it,
    the attainment of that less a tolerance. ``on_progress`` is called with the number of
    replays since its last call.
    """
    known: dict[tuple[tuple[str, Value], ...], Trial] = {}

    def trials(policy: str, all_values: list[dict[str, Value]]) -> list[Trial]:
        keys = [tuple(sorted(values.items())) for values in all_values]
        new = [key for key in dict.fromkeys(keys) if policy != 'mace' or key not in known]
        rows = [summary(o) for o in run(
            [Task(study, policy, study.requests, values=key) for key in new],
            processes=processes)]
        if on_progress is not None:
            on_progress(len(new))
        found = {key: Trial(key, row['slo_attainment'], row['finetune_tokens_per_s'])
                 for key, row in zip(new, rows, strict=True)}
        if policy != 'mace':
            return list(found.values())
        known.update(found)
        return [known[key] for key in keys]

    batches = CANDIDATES['scheduler.max_batch_tokens']
    alone = max(t.attainment for t in trials(
        'inference_only', [{'scheduler.max_batch_tokens': n} for n in batches]))
    target = min(study.settings.monitor.slo_target, alone - TOLERANCE)
    values: dict[str, Value] = {name: study.settings.value(name) for name in CANDIDATES}
    best = trials('mace', [values])[0]
    for _ in range(ROUNDS):
        before = best
        for name, candidates in CANDIDATES.items():
            for trial in trials('mace', [{**values, name: each} for each in candidates]):
                if trial.is_better(best, target):
                    best = trial
            values = dict(best.values)
        if best is before:
            break
    return Tuning(tuple(known.values()), target, best)


def table(tuning: Tuning) -> str:
    """Return the trials as a Markdown table, the best one first."""
    ordered = sorted(tuning.trials, key=lambda t: (t is not tuning.best, -t.learning))
    return markdown(
        (*CANDIDATES, 'in time', 'fine-tune tokens/s'),
        [(*(f'{dict(t.values)[name]:g}' for name in CANDIDATES), f'{t.attainment:.1%}',
          f'{t.learning:.4g}') for t in ordered])


def yaml(study: Study, tuning: Tuning) -> str:
    """Return a parameter file for the node: the best values, and all that are not defaults."""
    settings = study.settings.updated({'scheduler.policy': 'mace', **dict(tuning.best.values)})
    best = tuning.best
    lines = [
        f'# For {study.target.model} on {study.target.device} ({study.target.mode}), '
        f'{study.source.name}, scale {study.source.scale:g}.',
        f'# Simulated: {best.attainment:.1%} of the requests in time (target '
        f'{tuning.target:.1%}), {best.learning:.4g} fine-tune tokens/s.',
        '# Written by: python -m mace_ros.simulation --tune', '', '/**:', '  ros__parameters:']
    defaults = Settings()
    group = ''
    for name in PARAMETERS:
        value = settings.value(name)
        if name not in CANDIDATES and name != 'scheduler.policy' and (
                value == defaults.value(name)):
            continue
        first, _, key = name.partition('.')
        if first != group:
            group = first
            lines.append(f'    {group}:')
        lines.append(f'      {key}: {_literal(value)}')
    return '\n'.join(lines) + '\n'


def _literal(value: Value) -> str:
    if isinstance(value, bool):
        return 'true' if value else 'false'
    quoted = str(value).replace("'", "''")
    return f"'{quoted}'" if isinstance(value, str) else repr(value)
