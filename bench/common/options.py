# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Command-line options of the benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import os
from pathlib import Path
from typing import Any

from mace_ros.api.settings import PARAMETERS, Settings


class Options:
    """
    The options of one benchmark.

    Every benchmark has ``--quick`` and ``--results``; the methods add the others. The number of
    repeats and the like (:meth:`size`) have a smaller default in a quick run.
    """

    def __init__(self, name: str, description: str | None, *, quick: str) -> None:
        """Name the benchmark, describe it, and say what a ``quick`` run is."""
        self.name = name
        self._parser = argparse.ArgumentParser(
            prog=f'python -m bench.{name}', description=(description or '').strip())
        self._sizes: dict[str, tuple[Any, Any]] = {}
        self._has_threads = False
        self.add('--quick', action='store_true',
                 help=f'{quick}: shows that all parts run, measures nothing')
        self.add('--results', type=Path, metavar='FOLDER', help='folder for the results')

    def add(self, *flags: str, **keywords: Any) -> None:
        """Add an option, with the keywords of ``ArgumentParser.add_argument``."""
        self._parser.add_argument(*flags, **keywords)

    def size(self, flag: str, full: float, quick: float, what: str) -> None:
        """Add a number whose default is ``full``, or ``quick`` in a quick run."""
        self.add(flag, type=type(full), help=f'{what} (default: {full}; quick: {quick})')
        self._sizes[flag.lstrip('-').replace('-', '_')] = full, quick

    def threads(self) -> None:
        """Add ``--threads``; its default is one thread per available core."""
        self._has_threads = True
        self.add('--threads', type=int, default=0,
                 help='number of compute threads (default: one per core)')

    def parts(self, names: Sequence[str], *flags: str) -> None:
        """Add an option that selects parts of the benchmark; ``flags`` are its names."""
        self.add(*flags, nargs='+', choices=list(names), default=list(names),
                 help=f'parts to run, of {", ".join(names)} (default: all); the samples of the '
                 'other parts are taken from the last results')

    def parameters(self) -> None:
        """Add ``--set``, which sets parameters of the node; see :func:`settings_from`."""
        self.add('--set', nargs='+', default=[], metavar='NAME=VALUE',
                 help='parameters of the node')

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line and fill in the defaults that depend on ``--quick``."""
        args = self._parser.parse_args(arguments)
        for name, (full, quick) in self._sizes.items():
            if getattr(args, name) is None:
                setattr(args, name, quick if args.quick else full)
        if self._has_threads:
            args.threads = args.threads or len(os.sched_getaffinity(0))
        return args


def settings_from(assignments: Sequence[str]) -> Settings:
    """Return the node's default settings, changed by ``name=value`` assignments."""
    values: dict[str, Any] = {}
    for name, _, value in (each.partition('=') for each in assignments):
        kind = type(PARAMETERS[name].default)
        values[name] = value == 'true' if kind is bool else kind(value)
    return Settings().updated(values)
