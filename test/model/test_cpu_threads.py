# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Threads and the cores that other programs leave."""

from __future__ import annotations

from collections.abc import Iterator
import os
import subprocess
import sys
import time

import pytest
import torch

from mace_ros.model.cpu_threads import CpuThreads, INTERVAL_S, used_by_others

CORES = 4


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Machine:
    """A machine with four cores, on which other programs take some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.used = 1000.0
        monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(CORES)))

    def threads(self, fixed: int = 0) -> CpuThreads:
        return CpuThreads(fixed, clock=lambda: self.now, used=lambda cores: self.used)

    def passes(self, seconds: float, taken: float) -> None:
        """Let time pass in which other programs take ``taken`` cores."""
        self.now += seconds
        self.used += seconds * taken


@pytest.mark.parametrize(('taken', 'expected'), [
    (0.0, 4), (0.3, 4), (0.5, 3), (1.0, 3), (1.3, 3), (1.5, 2), (3.0, 1), (4.0, 1),
    (-1.0, 4)])         # clocks of different resolution
def test_other_programs_keep_their_cores(
        taken: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    threads = machine.threads()
    assert torch.get_num_threads() == CORES
    machine.passes(INTERVAL_S, taken)
    threads.adapt()
    assert torch.get_num_threads() == expected


def test_each_decision_counts_only_what_was_used_since_the_last_one(
        monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    threads = machine.threads()
    for taken, expected in ((2.0, 2), (0.0, 4), (1.0, 3)):
        machine.passes(INTERVAL_S / 2, taken)
        before = torch.get_num_threads()
        threads.adapt()         # too early
        assert torch.get_num_threads() == before
        machine.passes(INTERVAL_S / 2, taken)
        threads.adapt()
        assert torch.get_num_threads() == expected


def test_the_same_number_is_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting it empties oneDNN's cache of kernels."""
    machine = Machine(monkeypatch)
    threads = machine.threads()
    monkeypatch.setattr(torch, 'set_num_threads', None)     # would raise
    machine.passes(INTERVAL_S, 0.0)
    threads.adapt()
    assert torch.get_num_threads() == CORES


def test_a_fixed_number_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    threads = machine.threads(3)
    machine.passes(10 * INTERVAL_S, 2.0)
    threads.adapt()
    assert torch.get_num_threads() == 3


def test_the_cpu_time_of_another_program_is_seen() -> None:
    core = frozenset([min(os.sched_getaffinity(0))])
    with subprocess.Popen(
            [sys.executable, '-c', f'import os; os.sched_setaffinity(0, {set(core)})\n'
             'print(flush=True)\nwhile True: pass'], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout and other.stdout.readline()
            before = used_by_others(core)
            time.sleep(1.0)
            assert used_by_others(core) - before > 0.2
        finally:
            other.kill()


def test_our_own_cpu_time_and_that_of_other_cores_do_not_count(
        monkeypatch: pytest.MonkeyPatch) -> None:
    columns = '1 2 4 800 1600 8 16 32 6400 12800'      # 63 ticks busy
    stat = f'cpu {columns}\ncpu0 {columns}\ncpu1 {columns}\ncpu10 {columns}\nintr 5\n'
    monkeypatch.setattr('mace_ros.model.cpu_threads.Path.read_text', lambda path: stat)
    monkeypatch.setattr(os, 'sysconf', lambda name: 100)
    monkeypatch.setattr(time, 'process_time', lambda: 0.25)
    assert used_by_others(frozenset([0, 10])) == pytest.approx(2 * 0.63 - 0.25)


def test_without_proc_stat_no_other_program_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr('mace_ros.model.cpu_threads.Path.read_text', missing)
    assert used_by_others(frozenset([0])) == 0.0
