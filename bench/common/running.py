# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The skeleton of every benchmark: parse, measure, evaluate, record, print."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
import tempfile
import time
from typing import Any

from bench.common.options import Options
from bench.common.recording import Recorder
from bench.common.rendering import summary
from bench.common.results import Result

Samples = dict[str, Any]


@dataclass
class Run:
    """One run of a benchmark: its options, a temporary folder, and the notes for its results."""

    args: argparse.Namespace
    folder: Path
    recorder: Recorder
    notes: list[str] = field(default_factory=list)
    started_at: float = field(default_factory=time.monotonic)

    @property
    def minutes(self) -> float:
        """Minutes since the run began."""
        return (time.monotonic() - self.started_at) / 60.0

    def say(self, text: str) -> None:
        """Print the progress of the run."""
        print(f'[{self.minutes:5.1f} min] {text}', flush=True)

    def record(self, result: Result) -> Path:
        """Write the results, also those of an unfinished run; return the path of the file."""
        return self.recorder.write(result, self.args.results)

    def earlier(self, name: str) -> Samples:
        """
        Return the samples in the file that :meth:`record` would replace; empty if none.

        The results name the run of those that are returned by ``measure`` unchanged.
        """
        return self.recorder.earlier(name, self.args.results)


@dataclass(frozen=True)
class Recorded:
    """A finished run, its results, and the path of the file that holds them."""

    run: Run
    result: Result
    path: Path


def run_benchmark(
    options: Options, arguments: Sequence[str] | None, *, measure: Callable[[Run], Samples],
    evaluate: Callable[[Samples, Run], Result],
    prepare: Callable[[argparse.Namespace], None] | None = None,
) -> Recorded:
    """
    Run a benchmark and record its results.

    ``prepare`` runs before the machine is recorded, and ends the program with ``SystemExit``
    if the benchmark cannot run here. ``measure`` returns the samples, from which ``evaluate``
    computes the checks.
    """
    args = options.parse(arguments)
    if prepare is not None:
        prepare(args)
    recorder = Recorder(vars(args), quick=args.quick)
    with tempfile.TemporaryDirectory(prefix='mace-bench-') as folder:
        run = Run(args, Path(folder), recorder)
        samples = measure(run)
    result = evaluate(samples, run)
    result.notes += run.notes
    path = run.record(result)
    print(f'\n{summary(result, recorder.origins(result.samples))}\n\n{path}')
    return Recorded(run, result, path)
