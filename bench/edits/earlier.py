# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The robot of an earlier commit: this benchmark with the engine of another checkout.

Run as a program, ``earlier.py CHECKOUT OPTIONS``, it is ``python -m bench.edits OPTIONS`` with the
``mace_ros`` of the checkout.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def earlier_robot(args: argparse.Namespace, data: str, folder: Path) -> dict[str, Any]:
    """
    Teach the edits in ``data`` to the robot in the checkout ``args.earlier``; return the samples.

    Raises ``CalledProcessError`` if that fails.
    """
    subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), str(args.earlier.resolve()),
         '--data', data, '--modes', 'sequential', '--systems', 'mace',
         '--corrections', str(args.earlier_corrections), '--offset', str(args.offset),
         '--seed', str(args.seed), '--restart-after', str(args.restart_after),
         '--results', str(folder), *(['--quick'] if args.quick else []),
         *(['--set', *args.set] if args.set else [])], cwd=ROOT, check=True)
    samples = json.loads((folder / 'edits.json').read_text())['samples']
    return {kind: [{name: value for name, value in row.items() if name not in ('set', 'system')}
                   for row in samples[kind]] for kind in ('edits', 'unrelated')}


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout, abbreviated as in the results."""
    return subprocess.run(['git', 'rev-parse', '--short=12', 'HEAD'], cwd=checkout, check=True,
                          capture_output=True, text=True).stdout.strip()


def main(checkout: str, *options: str) -> None:
    """Run the benchmark with the engine of a checkout."""
    # The folder of this file is the first of sys.path.
    sys.path[0] = checkout
    import mace_ros  # its modules come from the checkout from now on

    if Path(mace_ros.__file__).parents[1] != Path(checkout):
        raise SystemExit(f'{checkout} has no mace_ros')
    from mace_ros.simulation import report

    # Results are written with this function, which was private before.
    vars(report).setdefault('plain', vars(report).get('_plain'))
    sys.path[0] = str(ROOT)
    from bench.edits.__main__ import main as run

    run(options)


if __name__ == '__main__':
    main(*sys.argv[1:])
