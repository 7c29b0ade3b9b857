# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What the demo prints: lines anywhere, and below them in a terminal what the device does."""

from __future__ import annotations

from abc import ABC, abstractmethod
import math
import os
import sys
import threading
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mace_ros.cli.dashboard import number, share
from mace_ros.msg import Scheduler

QUIET_S = 2.0       # without output, after which the elapsed time is printed

# Styles of rich, and the same as codes of a terminal.
HEADING, QUESTION, ANSWER, ASIDE = 'bold cyan', 'bold', 'green', 'dim'
FAILED, PASSED = 'bold red', 'bold green'
CODES = {HEADING: '1;36', QUESTION: '1', ANSWER: '32', ASIDE: '2', FAILED: '1;31', PASSED: '1;32'}


class Screen(ABC):
    """
    Prints the demo from several threads.

    A line may be printed in pieces; lines of the node wait until it is complete.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._started = time.monotonic()
        self._line_open = False
        self._node_lines: list[str] = []
        self._scheduler: Scheduler | None = None
        self._stage, self._expected_s = '', math.nan

    def step(self, text: str, expected_s: float = math.nan) -> None:
        """Begin a part of the demo, which is expected to take this long."""
        self._started = time.monotonic()
        self._stage, self._expected_s = '', expected_s
        about = '' if math.isnan(expected_s) else f' (about {expected_s:.0f} s)'
        self.line(f'\n== {text}{about}', HEADING)

    def stage(self, name: str) -> None:
        """Name what is being done within the part."""
        self._stage = name

    def line(self, text: str, style: str = '') -> None:
        """Print a line, after the one that is open."""
        with self._lock:
            if self._line_open:
                self._end_line()
            self._line_open = False
            self._print(text, style)
            while self._node_lines:
                self._print(self._node_lines.pop(0), ASIDE)

    def node_line(self, text: str) -> None:
        """Print a line of the node."""
        with self._lock:
            if self._line_open:
                self._node_lines.append(text)
            else:
                self._print(text, ASIDE)

    def piece(self, text: str, style: str = '') -> None:
        """Print a part of a line."""
        with self._lock:
            self._line_open = True
            self._add(text, style)

    def now(self, message: Scheduler) -> None:
        """Take notice of what the device does."""
        self._scheduler = message

    @abstractmethod
    def close(self) -> None:
        """End the output; lines may still be printed."""

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def _progress(self) -> str:
        """The time that the part has taken, how long it is expected to take, and its stage."""
        elapsed_s, expected = self._elapsed_s, ''
        if not math.isnan(self._expected_s):
            relation = ' of' if elapsed_s <= self._expected_s else ', usually'
            expected = f'{relation} about {self._expected_s:.0f} s'
        return f'{elapsed_s:.0f} s{expected}' + (self._stage and f': {self._stage}')

    @abstractmethod
    def _print(self, text: str, style: str) -> None:
        """Print a whole line."""

    @abstractmethod
    def _add(self, text: str, style: str) -> None:
        """Print a part of the open line."""

    @abstractmethod
    def _end_line(self) -> None:
        """End the open line."""


class PlainScreen(Screen):
    """Prints lines, and the elapsed time when nothing else is printed for a while."""

    def __init__(self) -> None:
        super().__init__()
        self._colours = sys.stdout.isatty() and 'NO_COLOR' not in os.environ
        self._printed = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()

    def close(self) -> None:
        """Print no more times."""
        self._closed.set()

    def _print(self, text: str, style: str) -> None:
        self._add(text, style)
        self._end_line()

    def _add(self, text: str, style: str) -> None:
        colour = CODES.get(style) if self._colours else None
        print(f'\033[{colour}m{text}\033[0m' if colour else text, end='', flush=True)
        self._printed = time.monotonic()

    def _end_line(self) -> None:
        print(flush=True)

    def _tick(self) -> None:
        while not self._closed.wait(0.2):
            with self._lock:
                if time.monotonic() - self._printed > QUIET_S:
                    self.line(f'   ... {self._progress}', ASIDE)


class LiveScreen(Screen):
    """Prints lines above a few that change: the open line, and what the device does."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._open = Text()
        self._spinner = Spinner('dots')
        self._live = Live(get_renderable=self._page, console=console or Console(highlight=False),
                          refresh_per_second=8, transient=True)
        self._live.start()

    def close(self) -> None:
        """Remove what changes."""
        self._live.stop()

    def _print(self, text: str, style: str) -> None:
        self._live.console.print(Text(text, style))

    def _add(self, text: str, style: str) -> None:
        self._open = self._open.copy().append(text, style)     # the page may be drawn meanwhile

    def _end_line(self) -> None:
        self._live.console.print(self._open)
        self._open = Text()

    def _page(self) -> Group:
        self._spinner.update(text=Text(f' {self._progress}', ASIDE))
        return Group(self._open, Text(), self._bars(), self._spinner)

    def _bars(self) -> Table:
        table = Table.grid(padding=(0, 2))
        if not math.isnan(self._expected_s):
            part = min(self._elapsed_s / self._expected_s, 1.0)
            table.add_row(Text('progress', ASIDE), ProgressBar(1.0, part, width=24),
                          Text(share(part).rjust(4), ASIDE))
        now = self._scheduler
        if now is None:
            return table
        for name, part, about in (
                ('answering', now.serving_share, f'{number(now.decode_rate)} tokens/s'),
                ('learning', now.learning_share,
                 f'{number(now.finetune_rate)} tokens/s, step {now.finetune_steps}')):
            known = part if 0.0 < part <= 1.0 else 0.0       # NaN at first
            table.add_row(Text(name, ASIDE), ProgressBar(1.0, known, width=24),
                          Text(share(part).rjust(4), ASIDE), Text(about, ASIDE))
        return table


def screen(*, plain: bool) -> Screen:
    """Return a screen for this process's output."""
    console = Console(highlight=False)
    if plain or not console.is_terminal or console.is_dumb_terminal:
        return PlainScreen()
    return LiveScreen(console)
