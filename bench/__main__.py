# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Run every benchmark, then report all checks."""

from __future__ import annotations

import argparse
import sys

from bench import colocation, decode, durability, kernels, learning, memory, operation, report

BENCHES = (kernels, decode, learning, durability, memory, operation, colocation)


def main() -> int:
    """Run them; return the exit code of the report."""
    parser = argparse.ArgumentParser(prog='python -m bench', description=__doc__)
    parser.add_argument('--quick', action='store_true',
                        help='a few requests only: says that all runs, not how well')
    quick = ['--quick'] if parser.parse_args().quick else []
    for bench in BENCHES:
        bench.main(quick)
    return report.main(quick)


if __name__ == '__main__':
    sys.exit(main())
