# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Run the durability benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from bench.common.options import Options
from bench.common.results import Result
from bench.common.running import Run, run_benchmark, Samples
import bench.durability
from bench.durability.checks import checks, reported, table
from bench.durability.kills import AIMS, kill_repeatedly, ROUNDS, tiny_model
from bench.durability.node_run import SYNC_S
from bench.systems.node import isolate


def options() -> Options:
    """Return the options."""
    result = Options('durability', bench.durability.__doc__, quick='one kill of each kind')
    result.size('--rounds', ROUNDS, len(AIMS), 'number of kills')
    result.add('--seed', type=int, default=6,
               help='seed of the times of kills and of the questions (default: %(default)s)')
    result.add('--model', default='',
               help='model.source (default: a tiny model with random weights)')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, evaluate=evaluate,
                  prepare=lambda _: isolate())


def measure(run: Run) -> Samples:
    """Kill the node ``--rounds`` times; return the samples."""
    args = run.args
    model = args.model or str(tiny_model(run.folder / 'model'))
    aims = [AIMS[i % len(AIMS)] for i in range(args.rounds)]
    return kill_repeatedly(run.folder, model, aims, args.seed)


def evaluate(samples: Samples, run: Run) -> Result:
    """Return the results of the samples."""
    return Result(
        'durability', samples, checks(samples), reported(samples), [table(samples)],
        [f'Each fsync of a file or folder takes {SYNC_S * 1e3:g} ms longer, as on an SD card, so '
         'that kills fall between them.'])


if __name__ == '__main__':
    main()
