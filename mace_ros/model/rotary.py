# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Rotary embedding of queries and keys, and writing keys and values to the KV cache, in one kernel.

A model rotates its queries and keys by about ten operations, and the cache is written by two more.
"""

from __future__ import annotations

import torch
from torch import Tensor

# An operator, so that tests can run it on the `meta` device, where nothing can be launched.
_LIBRARY = torch.library.Library('mace_ros', 'FRAGMENT')
_LIBRARY.define(
    'rotate_and_write(Tensor(a!) query, Tensor(b!) key, Tensor value, Tensor cos, Tensor sin, '
    'Tensor(c!) keys, Tensor(d!) values, Tensor slots) -> ()')


def rotate_and_write(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
                     keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """
    Rotate ``query`` and ``key`` in place, and write the keys and values to the cache.

    ``query``, ``key`` and ``value`` are ``[1, heads, tokens, size]``; the first two are contiguous
    in their last dimension. ``cos`` and ``sin``, ``[1, tokens, rotated]``, rotate the first
    ``rotated`` values of a head: those of its first half are paired with those of the second.
    ``keys`` and ``values`` are the cache, ``[cache slots, KV heads, size]``; ``slots`` are the
    tokens' cache slots, ``[tokens]``.
    """
    if value.stride(3) != 1:
        value = value.contiguous()
    torch.ops.mace_ros.rotate_and_write(query, key, value, cos, sin, keys, values, slots)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what the kernel computes, without it: ``x`` with all of its values rotated."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _launch(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor,
            values: Tensor, slots: Tensor) -> None:
    """Run the kernel; on a CPU, only Triton's interpreter can."""
    from mace_ros.model.rotary_kernels import launch  # needs Triton

    launch(query, key, value, cos, sin, keys, values, slots)


def _launch_nothing(*_: object) -> None:
    """Tensors of the `meta` device have no values."""


for _key, _function in (('CUDA', _launch), ('CPU', _launch), ('Meta', _launch_nothing)):
    _LIBRARY.impl('rotate_and_write', _function, _key)
