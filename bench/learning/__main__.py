# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Run the benchmark of learning."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import json
from typing import Any

from bench.common.load import LESSONS
from bench.common.options import Options, settings_from
from bench.common.results import Result
from bench.common.running import Run, run_benchmark, Samples
import bench.learning
from bench.learning import drift_checks, forty, one
from bench.learning.aims import SIMILAR
from bench.learning.drift_systems import SYSTEMS
from bench.learning.drift_trace import require_corpus

PARTS = ('one', 'forty', 'drift')
QUICK_SYSTEMS = ('mace', 'periodic')
FACTS, QUICK_FACTS = 40, 8


def options() -> Options:
    """Return the options."""
    result = Options('learning', bench.learning.__doc__, quick='a little of each part')
    result.parts(PARTS, '--only')
    result.size('--corrections', 10, 2, 'corrections of each robot in the part one')
    result.size('--robots', 4, 1, 'robots of the part one, all without a version at first')
    result.size('--many', 40, 3, 'corrections of the part forty')
    result.size('--questions', 300, 24, 'questions of the drift trace')
    result.size('--rate', 0.48, 0.8, 'questions per second of the drift trace; at 0.48 each '
                'system takes 11 minutes')
    result.add('--seed', default='drift',
               help='seed of the drift trace: questions, times and true answers')
    result.add('--systems', nargs='+', choices=list(SYSTEMS),
               help='systems that run the drift trace (default: all); with --only drift, the last '
               'results of the other systems are kept if their trace, CPU and --set are the '
               'same, or if only one of the two systems is overloaded')
    result.parameters()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, prepare=prepare,
                  evaluate=lambda samples, run: evaluate(samples))


def prepare(args: argparse.Namespace) -> None:
    """Choose the systems of the drift trace; end the program if the trace cannot be made."""
    args.systems = args.systems or list(QUICK_SYSTEMS if args.quick else SYSTEMS)
    if 'drift' in args.only:
        require_corpus()      # checked first: the other parts take an hour


def measure(run: Run) -> Samples:
    """Run the selected parts; return their samples, with the last ones of the other parts."""
    # Imported here, so that --help does not load torch.
    from bench.learning import drift

    args = run.args
    settings = settings_from(args.set)
    samples = run.earlier('learning') if set(args.only) != set(PARTS) else {}
    lessons = json.loads(LESSONS.read_text())
    facts = QUICK_FACTS if args.quick else FACTS
    if 'one' in args.only:
        samples |= one.measure(settings, lessons, run.folder, robots=args.robots,
                               count=args.corrections, facts=facts)
    if 'forty' in args.only:
        samples |= forty.measure(
            settings, lessons, run.folder / 'forty', count=args.many, facts=facts)
    for system in args.systems if 'drift' in args.only else ():
        samples |= drift.measure(
            settings, run.folder, samples, system=system, questions=args.questions,
            rate=args.rate, seed=args.seed, commit=run.recorder.commit,
            conditions={'cpu': run.recorder.cpu, 'set': args.set})
        # A system takes long: its results are kept even if the next one fails.
        run.record(evaluate(samples))
    return samples


def evaluate(samples: Mapping[str, Any]) -> Result:
    """Return the results of all parts that have samples."""
    result = Result('learning', dict(samples))
    if 'corrections' in samples:
        result.checks += one.checks(samples, SIMILAR)
        result.reported += one.reported(samples)
        result.tables.append(one.table(samples))
    if 'forty' in samples:
        result.checks += forty.checks(samples, SIMILAR)
    if 'drift' in samples:
        result.checks += drift_checks.checks(samples)
        result.reported += drift_checks.reported(samples)
        result.tables.append(drift_checks.table(samples))
    return result


if __name__ == '__main__':
    main()
