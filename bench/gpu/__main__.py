# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Run the benchmark of a GPU's limits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from bench.common.options import Options
from bench.common.results import check, Result
from bench.common.running import Run, run_benchmark, Samples
import bench.gpu
from bench.gpu.beside import measure_beside
from bench.gpu.checks import checks, reported, tables
from bench.gpu.claims import verdicts
from bench.gpu.models import SHAPES, WEIGHTS
from bench.gpu.passes import measure_shape

# The kinds of samples of each part.
PARTS = {'correctness': ('errors',), 'passes': ('passes', 'segments', 'weights'),
         'contexts': ('contexts',), 'beside': ('beside', 'memory')}
ALWAYS = ('captures',)      # of every part that loads a model by itself
CPU_REQUESTS = 48       # enough to test the benchmark itself


def options() -> Options:
    """Return the options."""
    result = Options('gpu', bench.gpu.__doc__, quick='few repeats')
    result.add('--device', default='cuda', help='(default: %(default)s)')
    result.add('--shapes', nargs='+', choices=list(SHAPES), default=['1b', '8b'], metavar='SHAPE',
               help=f'shapes to measure, of {", ".join(SHAPES)} (default: 1b 8b)')
    result.parts(tuple(PARTS), '--only')
    result.size('--repeats', 30, 3, 'repeats of each measurement, interleaved')
    result.size('--requests', 80, 4, 'requests at each load, with and without fine-tuning; on a '
                f'CPU at most {CPU_REQUESTS}')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, evaluate=evaluate, prepare=prepare)


def prepare(args: argparse.Namespace) -> None:
    """End the program if there is no CUDA device and none was named; limit a rehearsal."""
    import torch  # imported before the machine is recorded, so that its GPU is named

    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('bench.gpu: there is no CUDA device (--device cpu --shapes tiny tests '
                         'the benchmark itself)')
    if args.device == 'cpu':
        args.requests = min(args.requests, CPU_REQUESTS)


def measure(run: Run) -> Samples:
    """Measure all shapes, and serving beside fine-tuning with the first one."""
    args = run.args
    earlier = run.earlier('gpu') if len(args.only) < len(PARTS) else {}
    of_shapes = args.only != ['beside']
    measured = {kind for part in args.only for kind in PARTS[part]} | {
        kind for kind in ALWAYS if of_shapes}
    samples: Samples = {
        kind: of_others(earlier.get(kind, ()), args.shapes) if kind in measured
        else earlier.get(kind, []) for kinds in (*PARTS.values(), ALWAYS) for kind in kinds}
    for shape in args.shapes if of_shapes else ():
        for weights in WEIGHTS:
            run.say(f'{shape} {weights}')
            measure_shape(shape, weights, run, samples)
            run.record(evaluate(samples, run))
    if 'beside' in args.only:
        run.say(f'{args.shapes[0]}: serving beside fine-tuning')
        samples['beside'], samples['memory'] = measure_beside(args.shapes[0], run)
    return samples


def of_others(rows: Sequence[dict[str, Any]], shapes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the samples of other shapes, which a run in several sittings has measured before."""
    return [row for row in rows if 'shape' in row and row['shape'].split()[0] not in shapes]


def evaluate(samples: Samples, run: Run) -> Result:
    """Return the results of the samples."""
    shapes = run.args.shapes
    within = '<= 9' if run.args.device == 'cuda' else '<= 5'
    return Result('gpu', samples, [*checks(shapes, samples), check(
        'minutes that the run took', run.minutes, within)], reported(shapes, samples),
                  [*tables(samples), verdicts(samples, on_gpu=run.args.device == 'cuda')])


if __name__ == '__main__':
    main()
