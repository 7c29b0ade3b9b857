# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Parts of a decoder layer as one kernel each: RMSNorm, and rotary embeddings with the cache's write.

In a model's code the first is eight operations, and the second ten, beside two that write the KV
cache. PyTorch's own ``F.rms_norm`` is one kernel only in newer versions, and takes no weight in
fp32 beside 16-bit inputs, as Gemma's norms need.
"""

from __future__ import annotations

import torch
from torch import Tensor
import torch.nn.functional as F

# An operator, so that tests can run it on the `meta` device, where nothing can be launched.
_LIBRARY = torch.library.Library('mace_ros', 'FRAGMENT')
_LIBRARY.define('rms_norm(Tensor(a!) out, Tensor x, Tensor weight, float eps, bool relative) -> ()')
_LIBRARY.define(
    'rotate_and_write(Tensor(a!) query, Tensor(b!) key, Tensor value, Tensor cos, Tensor sin, '
    'Tensor(c!) keys, Tensor(d!) values, Tensor slots) -> ()')


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, relative: bool) -> Tensor:
    """
    Return ``x``, divided by the root mean square of its last dimension, times ``weight``.

    ``x`` is ``[1, tokens, width]`` or ``[1, tokens, heads, width]``, and ``weight`` ``[width]``.
    With ``relative``, the result is multiplied by 1 + ``weight`` instead.
    """
    out = x.new_empty(x.shape)
    torch.ops.mace_ros.rms_norm(
        out, x if x.stride(-1) == 1 else x.contiguous(), weight, eps, relative)
    return out


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, *, relative: bool) -> Tensor:
    """Return what :func:`rms_norm` does, without its kernel."""
    scale = weight.float() + float(relative)
    return F.rms_norm(x.float(), scale.shape, scale, eps).type_as(x)


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


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` with all of its values rotated, as :func:`rotate_and_write` does."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _normalize(out: Tensor, x: Tensor, weight: Tensor, eps: float, relative: bool) -> None:
    """Run the kernel; on a CPU, only Triton's interpreter can."""
    from mace_ros.model.layer_kernels import launch_norm  # needs Triton

    launch_norm(out, x, weight, eps, relative)


def _rotate(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor,
            values: Tensor, slots: Tensor) -> None:
    """Run the kernel; on a CPU, only Triton's interpreter can."""
    from mace_ros.model.layer_kernels import launch_rotation  # needs Triton

    launch_rotation(query, key, value, cos, sin, keys, values, slots)


def _launch_nothing(*_: object) -> None:
    """Tensors of the `meta` device have no values."""


for _name, _function in (('rms_norm', _normalize), ('rotate_and_write', _rotate)):
    for _key in ('CUDA', 'CPU'):
        _LIBRARY.impl(_name, _function, _key)
    _LIBRARY.impl(_name, _launch_nothing, 'Meta')
