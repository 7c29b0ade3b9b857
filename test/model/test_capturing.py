# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A capture that fails leaves the process as it was; with torch's functions of CUDA replaced."""

from __future__ import annotations

from contextlib import nullcontext
import gc
from typing import Any
import weakref

import pytest
import torch

from mace_ros.model.capturing import (
    attempt,
    captured,
    CaptureFailed,
    capturing,
    no_waiting,
    without_collections,
)

# Names of the function that ends allocations in a pool, of torch 2.8 and newer, and before.
NEW, OLD = '_cuda_endAllocateToPool', '_cuda_endAllocateCurrentStreamToPool'


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return the calls of what restores stream and allocator."""
    found: list[object] = []

    def end(*pool: object) -> None:
        found.append(pool)
        raise RuntimeError('not recording')     # as newer versions do

    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: 'stream')
    monkeypatch.setattr(torch.cuda, 'set_stream', found.append)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(torch._C, NEW, end, raising=False)
    return found


@pytest.mark.parametrize('error', [RuntimeError, ValueError])
def test_a_failed_capture_restores_the_stream_and_the_allocator(
        error: type[Exception], calls: list[object]) -> None:
    """A graph whose end fails hides the first error, which may be one of Triton's compilers."""
    with pytest.raises(CaptureFailed, match='first'), capturing('pool'):
        try:
            raise error('first')
        finally:
            raise RuntimeError('capture_end failed')
    assert calls == ['stream', (0, 'pool')]


def test_a_failed_capture_restores_the_allocator_of_older_versions(
        calls: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, OLD, getattr(torch._C, NEW), raising=False)
    monkeypatch.delattr(torch._C, NEW)
    with pytest.raises(CaptureFailed, match='first'), capturing('pool'):
        raise RuntimeError('first')
    assert calls == ['stream', (0, 'pool')]


@pytest.mark.usefixtures('calls')
def test_a_failed_capture_names_its_own_error_and_not_one_that_was_handled_before() -> None:
    with pytest.raises(CaptureFailed, match='second'), capturing('pool'):
        try:
            raise KeyError('first')
        except KeyError:
            raise RuntimeError('second')        # noqa: B904


class Stream:
    """Records for which streams it waits."""

    def __init__(self) -> None:
        self.waits: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waits.append(other)


def test_what_a_failed_pass_has_launched_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    current, side = Stream(), Stream()
    stream: Any = side
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: current)
    monkeypatch.setattr(torch.cuda, 'stream', nullcontext)

    def fails() -> None:
        assert side.waits == [current]
        raise torch.OutOfMemoryError('injected')

    with pytest.raises(torch.OutOfMemoryError):
        captured(fails, stream, 'pool')
    assert current.waits == [side]


@pytest.mark.parametrize('error, reason', [
    (torch.OutOfMemoryError, 'injected'), (ValueError, 'ValueError: injected')])
def test_a_failure_holds_no_tensors(error: type[Exception], reason: str) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fails() -> None:
        x = torch.zeros(1)
        held.append(weakref.ref(x))
        raise error('injected')

    with without_collections():
        assert attempt(fails) == (error, reason)
        assert held[0]() is None
    assert attempt(lambda: 3) == 3


def test_operations_that_wait_are_errors_only_while_told_so(
        monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, 'get_sync_debug_mode', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', modes.append)
    with pytest.raises(RuntimeError, match='waits'), no_waiting():
        raise RuntimeError('waits')
    assert modes == ['error', 1]


def test_no_garbage_is_collected_while_graphs_are_captured(
        monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ('collect', 'freeze', 'unfreeze'):
        monkeypatch.setattr(gc, name, lambda name=name: calls.append(name))
    with pytest.raises(RuntimeError, match='injected'), without_collections():
        assert not gc.isenabled()
        assert calls == ['collect', 'freeze']
        raise RuntimeError('injected')
    assert gc.isenabled()
    assert calls == ['collect', 'freeze', 'unfreeze']
