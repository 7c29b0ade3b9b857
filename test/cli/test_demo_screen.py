# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The output of the demo."""

from __future__ import annotations

import io
import re
import time

from mace_ros.msg import Scheduler
import pytest
from rich.console import Console

from mace_ros.cli import demo_screen
from mace_ros.cli.demo_screen import ANSWER, LiveScreen, PlainScreen, QUESTION, Screen


def show(screen: Screen) -> None:
    """Print a question, its answer, and a line of the node that comes between them."""
    screen.step('Ask')
    screen.piece('Who? ', QUESTION)
    screen.node_line('node | ready')
    screen.piece('Rover.', ANSWER)
    screen.line('after 1 ms')
    screen.node_line('node | done')
    screen.close()


def test_without_a_terminal_lines_of_the_node_wait_for_the_end_of_a_line(
        capsys: pytest.CaptureFixture[str]) -> None:
    show(PlainScreen())
    assert capsys.readouterr().out == (
        '\n== Ask\nWho? Rover.\nafter 1 ms\nnode | ready\nnode | done\n')


def test_without_a_terminal_the_time_is_printed_while_nothing_else_is(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_screen, 'QUIET_S', 0.1)
    screen = PlainScreen()
    screen.piece('Who? ')
    end = time.monotonic() + 60.0
    shown = ''
    while '...' not in shown and time.monotonic() < end:
        time.sleep(0.05)
        shown += capsys.readouterr().out
    screen.close()
    assert re.match(r'Who\? \n   \.\.\. \d+ s\n', shown), shown


@pytest.mark.parametrize(('expected_s', 'shown'), [
    (100.0, r'\.\.\. \d+ s of about 100 s: training'),
    (0.0, r'\.\.\. \d+ s, usually about 0 s: training')])
def test_without_a_terminal_the_stage_and_its_usual_time_are_printed(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, expected_s: float,
        shown: str) -> None:
    screen = PlainScreen()
    screen.step('Correct', expected_s)
    screen.stage('training')
    monkeypatch.setattr(demo_screen, 'QUIET_S', 0.1)
    end = time.monotonic() + 60.0
    printed = ''
    while '...' not in printed and time.monotonic() < end:
        time.sleep(0.05)
        printed += capsys.readouterr().out
    screen.close()
    assert re.match(
        rf'\n== Correct \(about {expected_s:.0f} s\)\n   {shown}\n', printed), printed


def test_in_a_terminal_a_bar_shows_how_much_of_the_expected_time_is_over() -> None:
    screen = LiveScreen(Console(file=io.StringIO(), force_terminal=True, width=80))
    screen.step('Correct', 1e9)
    screen.stage('training')
    page = Console(width=80, color_system=None)
    with page.capture() as captured:
        page.print(screen._page())
    assert re.search(r'progress .* 0%', captured.get())
    assert ' s of about 1000000000 s: training' in captured.get()
    screen.step('Ask')
    with page.capture() as captured:
        page.print(screen._page())
    assert 'progress' not in captured.get() and 'training' not in captured.get()
    screen.close()


def test_in_a_terminal_lines_stay_above_what_the_device_does() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80, color_system=None)
    screen = LiveScreen(console)
    screen.now(Scheduler(serving_share=0.25, learning_share=0.7, finetune_steps=3,
                         decode_rate=20.0, finetune_rate=150.0))
    page = Console(width=80, color_system=None)
    with page.capture() as captured:
        page.print(screen._page())
    assert 'learning' in captured.get() and '70%' in captured.get()
    assert '150 tokens/s, step 3' in captured.get()
    show(screen)
    plain = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', output.getvalue().replace('\r', '\n'))
    kept = [line.strip() for line in plain.splitlines()
            if line.startswith(('== ', 'Who? Rover.', 'after', 'node |'))]
    assert kept == ['== Ask', 'Who? Rover.', 'after 1 ms', 'node | ready', 'node | done']
