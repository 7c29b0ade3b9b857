# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Capture CUDA graphs such that a failure leaves the process as it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
import gc
from typing import Any, NamedTuple, TypeVar

import torch

Result = TypeVar('Result')

# What ends allocations in a pool: its name since torch 2.8, and before.
_END_ALLOCATION = ('_cuda_endAllocateToPool', '_cuda_endAllocateCurrentStreamToPool')


class CaptureFailed(RuntimeError):
    """A capture was begun and failed. Nothing more should be captured in this process."""


class Failure(NamedTuple):
    """Why something failed; without the exception, whose frames hold the tensors in use."""

    kind: type[Exception]
    reason: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return the failure that an exception tells of."""
        named = isinstance(error, RuntimeError)     # PyTorch's own say enough
        return cls(type(error), str(error) if named else f'{type(error).__name__}: {error}')


def attempt(compute: Callable[[], Result]) -> Result | Failure:
    """
    Return the result of ``compute``, or why it failed.

    Any exception is a failure, since Triton's compilers and the code of a model's family raise
    others than ``RuntimeError``.
    """
    try:
        return compute()
    except Exception as error:
        return Failure.of(error)


def captured(compute: Callable[[], Result], stream: torch.cuda.Stream,
             pool: Any) -> tuple[Callable[[], None], Result]:
    """
    Capture a CUDA graph of ``compute`` on ``stream`` and into ``pool``, a graph pool handle.

    Returns what replays it, and its result, whose tensors each replay overwrites. Raises
    :class:`CaptureFailed`, or another exception before anything was captured.
    """
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            compute()     # lazy initialisation of libraries must not be captured
            with no_waiting():
                compute()
    finally:    # kernels of a pass that failed may still use its memory
        current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(pool), torch.cuda.graph(graph, pool=pool, stream=stream):
        result = compute()
    return graph.replay, result


@contextmanager
def capturing(pool: Any) -> Iterator[None]:
    """
    While open, capture graphs into ``pool``, a graph pool handle.

    torch up to 2.11 leaves its side stream current after a failure, and sends every further
    allocation to the pool, from which nothing is freed. Both are undone here. Raises
    :class:`CaptureFailed` with the first error, which that of ending the capture hides.
    """
    stream = torch.cuda.current_stream()
    try:
        yield
    except Exception as error:
        torch.cuda.set_stream(stream)
        with suppress(Exception):    # newer versions have done it
            _end_allocation(pool)
        with suppress(Exception):
            torch.cuda.synchronize()
        raise CaptureFailed(Failure.of(_first(error)).reason) from error


def _end_allocation(pool: Any) -> None:
    """Let allocations leave ``pool``. Raises ``RuntimeError`` if they have left it."""
    end: Any = next(filter(None, (getattr(torch._C, name, None) for name in _END_ALLOCATION)))
    end(torch.cuda.current_device(), pool)


def _first(error: Exception) -> Exception:
    """Return the error that an error of ending the capture hides, or the error itself."""
    hidden = error.__context__
    return hidden if isinstance(hidden, Exception) and 'capture' in str(error) else error


@contextmanager
def no_waiting() -> Iterator[None]:
    """
    While open, an operation that waits for the device raises ``RuntimeError``.

    Such an operation can't be captured, and would invalidate a capture that has begun.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def without_collections() -> Iterator[None]:
    """
    While open, garbage is not collected, after one collection at the beginning.

    torch up to 2.8 collects before each capture, which takes longer than the capture: while all
    older objects are frozen, it looks at few. A collection in a capture could free what must not
    be freed then. The one at the beginning frees autograd graphs in cycles, whose nodes belong to
    streams that are not captured.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
