# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Run the benchmark of serving and learning on one CPU."""

from __future__ import annotations

from collections.abc import Sequence

import bench.colocation
from bench.colocation.benchmark import ColocationRun
from bench.colocation.checks import checks, reported, SPLIT, SYSTEMS, table
from bench.common.options import Options
from bench.common.results import check, Result
from bench.common.running import Run, run_benchmark, Samples


def options() -> Options:
    """Return the options."""
    result = Options('colocation', bench.colocation.__doc__,
                     quick='a few requests, within five minutes')
    result.size('--blocks', 6, 2, 'number of interleaved blocks')
    result.size('--requests', 20, 2, 'requests per block and system')
    result.size('--peer-blocks', 3, 1, f'blocks of the peers other than {SPLIT}')
    add = result.add
    add('--systems', nargs='+', choices=list(SYSTEMS), default=list(SYSTEMS), metavar='SYSTEM',
        help=f'systems to run, of {", ".join(SYSTEMS)} (default: all)')
    add('--busy', type=float, default=0.4,
        help='share of the device time that serving takes (default: %(default)s)')
    add('--rate', type=float, help='arrivals per second, instead of --busy')
    add('--prompt-tokens', type=int, default=64, help='(default: %(default)s)')
    add('--output-tokens', type=int, default=32, help='(default: %(default)s)')
    add('--sample-tokens', type=int, default=128,
        help='tokens of a fine-tune step (default: %(default)s)')
    add('--dtype', default='auto',
        help='model.weight_dtype of mace_ros (default: %(default)s)')
    add('--peer-dtype', default='',
        help="precision of the peers' weights (default: the precision of mace_ros)")
    result.threads()
    add('--minutes', type=float, default=95.0,
        help='start no block that would end later than this (default: %(default)s)')
    add('--seed', type=int, default=0, help='seed of arrivals and prompts (default: %(default)s)')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, evaluate=evaluate)


def measure(run: Run) -> Samples:
    """Run all systems; return the samples."""
    colocation = ColocationRun(run)
    try:
        colocation.prepare()
        colocation.measure()
    finally:
        colocation.close()
    return colocation.samples


def evaluate(samples: Samples, run: Run) -> Result:
    """Return the results of the samples."""
    limit = '<= 5' if run.args.quick else '<= 100'
    return Result(
        'colocation', samples,
        [*checks(samples), check('minutes that the run took', run.minutes, limit)],
        reported(samples), [table(samples)])


if __name__ == '__main__':
    main()
