# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Free memory of the process goes back to the system."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest

from mace_ros.model.heap import AFTER_LEARNING_S, CHECK_S, HeapTrimmer, NEAR


def test_matrix_products_of_many_sizes_do_not_fill_the_memory() -> None:
    """The kernel cache is bounded; without a bound it would take several hundred MB."""
    script = """
from pathlib import Path
import re

import torch

from mace_ros.model.hardware import limit_kernel_caches

def resident_mb():
    return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1e3

limit_kernel_caches()
weights = [torch.randn(n, 576, dtype=torch.bfloat16) for n in (960, 576, 1536, 3072)]
before = resident_mb()
for tokens in range(100, 260):
    for weight in weights:
        torch.nn.functional.linear(torch.zeros(tokens, 576, dtype=torch.bfloat16), weight)
print(resident_mb() - before)
"""
    ran = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 150.0


def test_gaps_in_the_heap_are_returned_to_the_system() -> None:
    script = """
from pathlib import Path
import re

import torch

from mace_ros.model.heap import limit_heap, return_free_memory

def resident_mb():
    return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1e3

def gaps(megabytes, count):
    'Return the growth of resident memory by freed tensors between ones that stay.'
    before, large = resident_mb(), []
    for _ in range(count):
        large.append(torch.ones(int(megabytes * 250_000)))
        stays.append(torch.ones(10_000))
    del large
    return resident_mb() - before

stays = []
limit_heap()
for megabytes in (8, 16, 30):     # by default glibc would map none of these sizes from now on
    torch.ones(megabytes * 250_000)
print(gaps(2, 50), gaps(0.5, 200))
before = resident_mb()
return_free_memory()
print(before - resident_mb())
"""
    ran = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    large, small, returned = map(float, ran.stdout.split())
    assert large < 20.0
    assert small > 80.0       # which is why ...
    assert returned > 80.0


def test_free_memory_is_returned_near_the_budget(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Also some time after a fine-tune step, but not repeatedly without effect."""
    private, returned = [1000.0], []
    monkeypatch.setattr('mace_ros.model.heap.private_bytes', lambda: private[0])
    monkeypatch.setattr('mace_ros.model.heap.return_free_memory', lambda: returned.append(1))
    heap = HeapTrimmer(300.0, 0.0)      # the remaining 700 do not count towards the budget
    returned.clear()
    times = iter(range(10 ** 6))

    def tended(budget: float, seconds: float = 2 * CHECK_S) -> int:
        before = len(returned)
        now = next(times) * 60.0
        heap.trim(now, budget)
        heap.trim(now + CHECK_S / 2, budget)      # too soon to measure again
        heap.trim(now + seconds, budget)
        return len(returned) - before

    assert tended(301.0 / NEAR) == 0
    assert tended(299.0 / NEAR) == 2
    private[0] = math.nan
    assert tended(0.0) == 0
    heap.step_ended(next(times) * 60.0 - 59.0)
    assert tended(0.0) == 1
    assert AFTER_LEARNING_S < 59.0

    now = next(times) * 60.0
    heap.step_ended(now)
    heap.trim(now, math.inf)
    assert len(returned) == 3
    heap.trim(now, math.inf, idle=True)     # no request is waiting
    heap.trim(now, math.inf, idle=True)
    assert len(returned) == 4

    def slow() -> None:
        returned.append(1)
        time.sleep(0.03)

    private[0] = 1000.0
    monkeypatch.setattr('mace_ros.model.heap.return_free_memory', slow)
    assert tended(299.0) == 1
    assert tended(299.0, 55.0) == 2        # the machine may have slept for longer
