# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Parts of a decoder layer as one kernel each: norms, and rotary embeddings with the cache's write.

In a model's code the first is eight operations or more, and the second ten or more, beside two that
write the KV cache. PyTorch's own ``F.rms_norm`` is one kernel only in newer versions, and takes no
weight in fp32 beside 16-bit inputs, as Gemma's norms need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
import torch.nn.functional as F

from mace_ros.model.triton_operator import triton_operator


@dataclass(frozen=True)
class Pairing:
    """
    Which values of a head are rotated as a pair, and by which cosine and sine.

    Of n pairs, pair i is the values i and i + n, or 2 i and 2 i + 1 if ``interleaved``. Each value
    has a cosine and a sine at its own place among 2 n, or pair i shares those at i of n if
    ``shared``.
    """

    interleaved: bool = False
    shared: bool = False


def normalize(x: Tensor, weight: Tensor, eps: float, *, relative: bool, centered: bool) -> Tensor:
    """
    Return ``x``, divided by the root mean square of its last dimension, times ``weight``.

    ``x`` is ``[1, tokens, width]`` or ``[1, tokens, heads, width]``, and ``weight`` ``[width]`` or
    ``[heads, width]``. With ``relative``, the result is multiplied by 1 + ``weight`` instead. With
    ``centered``, the mean is subtracted before.
    """
    out = x.new_empty(x.shape)
    torch.ops.mace_ros.normalize(
        out, x if x.stride(-1) == 1 else x.contiguous(), weight, eps, relative, centered)
    return out


def plain_norm(x: Tensor, weight: Tensor, eps: float, *, relative: bool, centered: bool) -> Tensor:
    """Return what :func:`normalize` does, without its kernel."""
    exact = x.float()
    if centered:
        exact = exact - exact.mean(-1, keepdim=True)
    scale = weight.float() + float(relative)
    return (F.rms_norm(exact, exact.shape[-1:], eps=eps) * scale).type_as(x)


def rotate_and_write(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
                     keys: Tensor, values: Tensor, slots: Tensor, *,
                     pairing: Pairing = Pairing(), first: int = 0) -> None:
    """
    Rotate ``query`` and ``key`` in place, and write the keys and values to the cache.

    ``query``, ``key`` and ``value`` are ``[1, heads, tokens, size]``; the first two are contiguous
    in their last dimension. ``cos`` and ``sin``, ``[1, tokens, columns]`` with the same stride of
    columns, rotate the values of a head from ``first`` on, as ``pairing`` says. ``keys`` and
    ``values`` are the cache, ``[cache slots, KV heads, size]``; ``slots`` are the tokens' cache
    slots, ``[tokens]``.
    """
    if value.stride(3) != 1:
        value = value.contiguous()
    torch.ops.mace_ros.rotate_and_write(query, key, value, cos, sin, keys, values, slots, first,
                                        pairing.interleaved, pairing.shared)


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing = Pairing()) -> Tensor:
    """Return ``x`` with all of its values rotated, as :func:`rotate_and_write` does."""
    def pairs(of_values: Tensor) -> tuple[Tensor, Tensor]:
        if pairing.interleaved:
            return of_values[..., ::2], of_values[..., 1::2]
        first, second = of_values.chunk(2, -1)
        return first, second

    first, second = pairs(x)
    (cos_1, cos_2), (sin_1, sin_2) = (
        (c, c) if pairing.shared else pairs(c) for c in (cos, sin))
    rotated = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
    return torch.stack(rotated, -1).flatten(-2) if pairing.interleaved else torch.cat(rotated, -1)


@triton_operator(
    'normalize(Tensor(a!) out, Tensor x, Tensor weight, float eps, bool relative, '
    'bool centered) -> ()')
def _normalize(out: Tensor, x: Tensor, weight: Tensor, eps: float, relative: bool,
               centered: bool) -> None:
    """Run the kernel; on a CPU, only Triton's interpreter can."""
    from mace_ros.model.layer_kernels import launch_norm  # needs Triton

    launch_norm(out, x, weight, eps, relative=relative, centered=centered)


@triton_operator(
    'rotate_and_write(Tensor(a!) query, Tensor(b!) key, Tensor value, Tensor cos, Tensor sin, '
    'Tensor(c!) keys, Tensor(d!) values, Tensor slots, int first, bool interleaved, '
    'bool shared) -> ()')
def _rotate(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor,
            values: Tensor, slots: Tensor, first: int, interleaved: bool, shared: bool) -> None:
    """Run the kernel; on a CPU, only Triton's interpreter can."""
    from mace_ros.model.layer_kernels import launch_rotation  # needs Triton

    launch_rotation(query, key, value, cos, sin, keys, values, slots, first=first,
                    interleaved=interleaved, shared=shared)
