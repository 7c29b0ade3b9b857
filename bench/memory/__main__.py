# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Memory: what sharing, one budget, recomputing and pruning save, and what they cost.

Results: bench/results/memory.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import os
from pathlib import Path
import tempfile
from typing import Any

from bench.memory_checks import checks, reported, tables
from bench.report import summary
from bench.results import Recorder, Result

PARTS = ('sharing', 'budget', 'training', 'pruning')
SYSTEM_TOKENS = 256     # of a system prompt that is shared
SHARE = 0.25            # of the length that requests may come to, which the budget has room for
SAMPLE_TOKENS = 512     # of a training step
CONTEXT_TOKENS = 1500   # of a prompt that is pruned
PRUNED = 0.5


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    result = argparse.ArgumentParser(prog='python -m bench.memory', description=__doc__.strip())
    add = result.add_argument
    add('--quick', action='store_true',
        help='once and little of each part: says that all runs, not how well')
    add('--parts', nargs='+', choices=PARTS, default=list(PARTS),
        help='what to measure (default: all); what earlier runs found out about the others is kept')
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
    if set(args.parts) != set(PARTS):
        samples = recorder.earlier('memory', args.results) | samples
    result = Result('memory', samples, checks(samples), reported(samples), tables(samples),
                    [f'{args.threads} threads.'])
    path = recorder.write(result, args.results)
    print(summary(result))
    print(f'\n{path}')


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the parts that are asked for; return their samples."""
    parts = {'sharing': _sharing, 'budget': _budget, 'training': _training, 'pruning': _pruning}
    samples: dict[str, Any] = {}
    for part in args.parts:
        say(part)
        samples[part] = parts[part](args, folder / part)
    return samples


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, flush=True)


# What they import they import when they run, so that --help answers at once.


def _sharing(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from bench.memory_serving import sharing

    return sharing(folder, repeats=args.repeats, count=1 if args.quick else 3,
                   threads=args.threads, system_tokens=SYSTEM_TOKENS,
                   max_tokens=8 if args.quick else 24, say=say)


def _budget(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from bench.memory_budget import budgets

    return budgets(folder, repeats=args.repeats, count=8 if args.quick else 16,
                   max_tokens=128 if args.quick else 256, share=SHARE, threads=args.threads,
                   say=say)


def _training(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from bench.memory_training import compare

    folder.mkdir()
    return compare(folder, tokens=SAMPLE_TOKENS,
                   precisions=('float32',) if args.quick else ('float32', 'bfloat16', 'int8'),
                   repeats=1 if args.quick else 2, threads=args.threads, say=say)


def _pruning(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    from bench.memory_serving import pruning

    return pruning(folder, fraction=PRUNED, more=(0.75,), contexts=1 if args.quick else 8,
                   tokens=600 if args.quick else CONTEXT_TOKENS, max_tokens=8 if args.quick else 32,
                   continued=8 if args.quick else 128, threads=args.threads, say=say)


if __name__ == '__main__':
    main()
