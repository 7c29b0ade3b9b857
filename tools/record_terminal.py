#!/usr/bin/env python3
# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Run a command in a terminal, and save what it prints as a moving SVG.

A line of the picture appears when it did in the terminal, but long waits are shortened. ``make
docs`` records the demo with it. The exit code is that of the command; a run that fails is not
saved.
"""

from __future__ import annotations

import argparse
import io
from itertools import accumulate, pairwise
import os
from pathlib import Path
import pty
import re
import sys
import time

from rich.console import Console
from rich.text import Text

ESCAPE = re.compile(r'\x1b\[[0-9;]*m')
LONGEST_WAIT_S = 2.0    # between two lines of the picture
HOLD_S = 4.0            # how long the last line stays; the picture begins with it


def record(command: list[str]) -> tuple[int, list[tuple[float, str]]]:
    """Run a command; return its exit code, and its lines with the seconds of their beginnings."""
    started = time.monotonic()
    lines: list[tuple[float, str]] = []
    rest = ''

    def read(descriptor: int) -> bytes:
        nonlocal rest
        data = os.read(descriptor, 4096)
        seconds = time.monotonic() - started
        *complete, rest = (rest + data.decode(errors='replace')).replace('\r\n', '\n').split('\n')
        for text in complete:
            lines.append((lines_begin.pop() if lines_begin else seconds, text))
        if rest and not lines_begin:
            lines_begin.append(seconds)
        return data

    lines_begin: list[float] = []
    code = os.waitstatus_to_exitcode(pty.spawn(command, read))
    return code, lines


def picture(lines: list[tuple[float, str]], title: str, width: int) -> str:
    """Return the SVG of the lines: first all of them, and then each at its time."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    begins: list[float] = []        # of each line on the screen, which may be a part of a line
    for seconds, line in lines:
        wrapped = Text.from_ansi(line).wrap(console, width)
        begins += [seconds] * max(len(wrapped), 1)
        console.print(wrapped)
    svg = console.export_svg(title=title, unique_id='demo')
    svg = re.sub(r'@font-face \{.*?\}\s*', '', svg, flags=re.DOTALL)    # nothing is downloaded
    return with_motion(svg, begins)


def with_motion(svg: str, begins: list[float]) -> str:
    """Return a still picture of a terminal as one whose lines appear at their times, in seconds."""
    waits = [min(b - a, LONGEST_WAIT_S) for a, b in pairwise([begins[0], *begins])]
    begins = list(accumulate(waits))
    length = begins[-1] + HOLD_S
    rules = [f'@keyframes line-{n} {{ 0%, {100 * begin / length:.2f}% {{ opacity: 0 }} '
             f'{min(100 * begin / length + 0.01, 100):.2f}%, 100% {{ opacity: 1 }} }}\n'
             f'.line-{n} {{ animation: line-{n} {length:.1f}s step-end {HOLD_S - length:.1f}s '
             'infinite }'
             for n, begin in enumerate(begins)]
    style = ('<style>@media (prefers-reduced-motion: no-preference) {\n'
             + '\n'.join(rules) + '\n}</style>')
    svg = re.sub(r'<text class="(demo-r\d+)"([^>]*demo-line-(\d+)\))',
                 r'<text class="\1 line-\3"\2', svg)
    return re.sub(r'(<svg[^>]*>)', lambda match: match[1] + style, svg, count=1)


def main() -> int:
    """Run the program; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path, help='the SVG file')
    parser.add_argument('--title', default='', help='title of the window')
    parser.add_argument('--width', type=int, default=100, help='columns (default: %(default)s)')
    parser.add_argument('--skip', default='^$a', metavar='REGEX',
                        help='lines that are not shown, without their colours')
    parser.add_argument('command', nargs='+', help='the command, after --')
    args = parser.parse_args()
    code, lines = record(args.command)
    shown = [(at, line) for at, line in lines if not re.search(args.skip, ESCAPE.sub('', line))]
    if code == 0 and shown:
        args.output.write_text(picture(shown, args.title, args.width))
    return code


if __name__ == '__main__':
    sys.exit(main())
