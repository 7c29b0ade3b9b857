# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Memory: what a training step adds to it.

Results: bench/results/memory.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import os
from pathlib import Path
import statistics
import tempfile
from typing import Any

from bench.report import summary
from bench.results import Check, check, Recorder, Reported, Result, Table

PARTS = ('training',)
SAMPLE_TOKENS = 512


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    result = argparse.ArgumentParser(prog='python -m bench.memory', description=__doc__.strip())
    add = result.add_argument
    add('--quick', action='store_true',
        help='once and little of each part: says that all runs, not how well')
    add('--parts', nargs='+', choices=PARTS, default=list(PARTS),
        help='what to measure; the checks of the others do not hold (default: all)')
    add('--repeats', type=int, help='of each measurement (default: 3; quick: 1)')
    add('--threads', type=int, default=0, help='(default: one per core)')
    add('--results', type=Path, metavar='FOLDER', help='where to write the results')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    args.repeats = args.repeats or (1 if args.quick else 3)
    args.threads = args.threads or len(os.sched_getaffinity(0))
    recorder = Recorder(vars(args), quick=args.quick)
    with tempfile.TemporaryDirectory(prefix='mace-bench-') as folder:
        samples = measure(args, Path(folder))
    result = Result('memory', samples, checks(samples), reported(samples), tables(samples),
                    [f'{args.threads} threads.'])
    path = recorder.write(result, args.results)
    print(summary(result))
    print(f'\n{path}')


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the parts that are asked for; return their samples."""
    # Only here, so that --help answers at once.
    samples: dict[str, Any] = {}
    if 'training' in args.parts:
        from bench.memory_training import compare

        samples['training'] = compare(
            folder, tokens=SAMPLE_TOKENS,
            precisions=('float32',) if args.quick else ('float32', 'bfloat16', 'int8'),
            repeats=args.repeats, threads=args.threads,
            say=lambda text: print(text, flush=True))
    return samples


# -- what the samples say ----------------------------------------------------------------


def checks(samples: Mapping[str, Any]) -> list[Check]:
    """Return the checks of what issue 5 asks for."""
    return training_checks(samples.get('training', []))


def training_checks(rows: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Return the checks of a training step."""
    found = [
        check(f'memory that a training step adds, recompute always {p} / PEFT {_peer(p)}',
              _share(rows, 'mace_ros, always', p), '<= 0.25', _spread(rows, p))
        for p in dict.fromkeys(r['precision'] for r in rows) or ('float32',)]
    errors = [r['gradient_error'] for r in rows
              if 'gradient_error' in r and r['system'] != 'peft']
    return [*found, check('its gradients, largest relative error against PEFT, float32',
                          max(errors, default=None), '<= 0.0001',
                          'over all tensors; recompute always and auto')]


def reported(samples: Mapping[str, Any]) -> list[Reported]:
    """Return the numbers that nothing hangs on."""
    rows = samples.get('training', [])
    return [Reported(f'memory that a training step adds, recompute auto {p} / PEFT {_peer(p)}',
                     _share(rows, 'mace_ros, auto', p))
            for p in dict.fromkeys(r['precision'] for r in rows)]


def tables(samples: Mapping[str, Any]) -> list[Table]:
    """Return a table for each part."""
    return [_training_table(samples['training'])] if 'training' in samples else []


def _training_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = dict.fromkeys((r['system'], r['precision']) for r in rows)
    return Table(
        f'One training step over {rows[0]["tokens"]} tokens',
        ['system', 'weights', 'adds MB', 'seconds'],
        [[system, _peer(precision) if system == 'peft' else precision,
          _median(rows, system, precision, 'added_mb'),
          _median(rows, system, precision, 'seconds')] for system, precision in names],
        'Medians. Peak of resident memory in a fresh process, less what was resident before; '
        "gradients and the optimizer's state included on both sides.")


def _peer(precision: str) -> str:
    return 'float32' if precision == 'float32' else 'in the type that ours computes in'


def _median(rows: Sequence[Mapping[str, Any]], system: str, precision: str,
            column: str) -> float | None:
    values = [r[column] for r in rows if (r['system'], r['precision']) == (system, precision)]
    return statistics.median(values) if values else None


def _share(rows: Sequence[Mapping[str, Any]], system: str, precision: str) -> float | None:
    ours, theirs = (_median(rows, s, precision, 'added_mb') for s in (system, 'peft'))
    return ours / theirs if ours is not None and theirs else None


def _spread(rows: Sequence[Mapping[str, Any]], precision: str) -> str:
    if not rows:
        return ''
    ours, theirs = (_median(rows, s, precision, 'added_mb') for s in ('mace_ros, always', 'peft'))
    return f'{ours:.0f} of {theirs:.0f} MB, medians; peak resident memory of fresh processes'


if __name__ == '__main__':
    main()
