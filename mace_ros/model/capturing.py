# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Capture CUDA graphs such that a failure leaves the process as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


class CaptureFailed(RuntimeError):
    """A capture was begun and failed. Nothing more should be captured in this process."""


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
    except RuntimeError as error:
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):    # newer versions have done it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        with suppress(RuntimeError):
            torch.cuda.synchronize()
        raise CaptureFailed(str(error.__context__ or error)) from error


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
