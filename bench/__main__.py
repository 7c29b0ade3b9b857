# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Run all benchmarks, then report all checks."""

from __future__ import annotations

import argparse
import sys

from bench import constrained, decode, everywhere, kernels, publication, report
from bench.colocation import __main__ as colocation
from bench.durability import __main__ as durability
from bench.learning import __main__ as learning
from bench.memory import __main__ as memory
from bench.operation import __main__ as operation

BENCHMARKS = (kernels, decode, constrained, publication, learning, everywhere, durability, memory,
              operation, colocation)


def main() -> int:
    """Run all benchmarks; return the exit code of the report."""
    parser = argparse.ArgumentParser(prog='python -m bench', description=__doc__)
    parser.add_argument('--quick', action='store_true',
                        help='a few requests only: shows that all parts run, measures nothing')
    quick = ['--quick'] if parser.parse_args().quick else []
    for benchmark in BENCHMARKS:
        benchmark.main(quick)
    return report.main(quick)


if __name__ == '__main__':
    sys.exit(main())
