# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Run the benchmark of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.common.options import Options
from bench.common.results import Result
from bench.common.running import Run, run_benchmark, Samples
import bench.memory
from bench.memory.checks import checks, reported, tables

SYSTEM_TOKENS = 256     # length of the shared system prompt
SHARE = 0.25            # of the longest possible requests, for which the budget has room
SAMPLE_TOKENS = 512     # of a training step
CONTEXT_TOKENS = 1500   # of a prompt that is pruned
PRUNED = 0.5


def options() -> Options:
    """Return the options."""
    result = Options('memory', bench.memory.__doc__, quick='once, and little of each part')
    result.parts(tuple(PARTS), '--parts', '--only')
    result.size('--repeats', 3, 1, 'repeats of each measurement')
    result.threads()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, evaluate=evaluate)


def measure(run: Run) -> Samples:
    """Run the selected parts; return their samples, with the last ones of the other parts."""
    samples: Samples = {}
    if set(run.args.parts) != set(PARTS):
        samples = run.earlier('memory')
    for part in run.args.parts:
        run.say(part)
        samples[part] = PARTS[part](run)
    return samples


def evaluate(samples: Samples, run: Run) -> Result:
    """Return the results of the samples."""
    return Result('memory', samples, checks(samples), reported(samples), tables(samples),
                  [f'{run.args.threads} threads.'])


# -- the parts; their modules are imported late, so that --help does not load torch --------


def measure_sharing(run: Run) -> list[dict[str, Any]]:
    """Measure prefix sharing."""
    from bench.memory.sharing import sharing

    args = run.args
    return sharing(run.folder / 'sharing', repeats=args.repeats, count=1 if args.quick else 3,
                   threads=args.threads, system_tokens=SYSTEM_TOKENS,
                   max_tokens=8 if args.quick else 24, say=run.say)


def measure_budget(run: Run) -> list[dict[str, Any]]:
    """Measure a small memory budget."""
    from bench.memory.budget import budgets

    args = run.args
    return budgets(run.folder / 'budget', repeats=args.repeats, count=8 if args.quick else 16,
                   max_tokens=128 if args.quick else 256, share=SHARE, threads=args.threads,
                   say=run.say)


def measure_training(run: Run) -> list[dict[str, Any]]:
    """Measure the memory of a training step."""
    from bench.memory.training import compare

    args = run.args
    folder = run.folder / 'training'
    folder.mkdir()
    return compare(folder, tokens=SAMPLE_TOKENS,
                   precisions=('float32',) if args.quick else ('float32', 'bfloat16', 'int8'),
                   repeats=1 if args.quick else 2, threads=args.threads, say=run.say)


def measure_pruning(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Measure KV pruning."""
    from bench.memory.pruning import pruning

    args = run.args
    return pruning(run.folder / 'pruning', fraction=PRUNED, more=(0.75,),
                   contexts=1 if args.quick else 8,
                   tokens=600 if args.quick else CONTEXT_TOKENS,
                   max_tokens=8 if args.quick else 32, continued=8 if args.quick else 128,
                   threads=args.threads, say=run.say)


PARTS = {'sharing': measure_sharing, 'budget': measure_budget, 'training': measure_training,
         'pruning': measure_pruning}


if __name__ == '__main__':
    main()
