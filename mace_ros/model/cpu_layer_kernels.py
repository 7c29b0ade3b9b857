# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Norms and rotary embeddings with their gradients, compiled by Numba.

Arrays of ``uint16`` hold bfloat16. Each function computes in fp32, and rounds what it writes. All
arrays are contiguous. Import this module only where Numba is installed.
"""

from __future__ import annotations

from numba import njit
import numpy as np

from mace_ros.model.cpu_instructions import load, store

# Identifies the content of cpu_instructions.py: Numba compiles again when this file changes.
# test/model/test_cpu_kernels.py knows the right value.
INSTRUCTIONS = 'cdc6f7111d6f2d65'

# A sum may be computed in any order, so in vectors. NaN and infinity stay what they are.
compiled = njit(cache=True, nogil=True, error_model='numpy',
                fastmath={'reassoc', 'contract', 'arcp', 'nsz'})


@compiled
def normalize(out: np.ndarray, factors: np.ndarray, x: np.ndarray, weight: np.ndarray,
              eps: np.float32) -> None:
    """
    Divide each row of ``x`` by its root mean square, and multiply it by ``weight``.

    ``x`` is ``[rows, width]``. Writes each row's factor to ``factors``, ``[rows]`` in fp32.
    """
    width = x.shape[1]
    for row in range(len(x)):
        own, result = x[row], out[row]
        squares = np.float32(0)
        for i in range(width):
            squares += load(own, i) * load(own, i)
        factor = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
        factors[row] = factor
        for i in range(width):
            store(result, i, load(own, i) * factor * load(weight, i))


@compiled
def normalize_backward(out: np.ndarray, gradient: np.ndarray, factors: np.ndarray, x: np.ndarray,
                       weight: np.ndarray) -> None:
    """Write the gradient of the ``x`` of :func:`normalize`, for the gradient of its result."""
    width = x.shape[1]
    for row in range(len(x)):
        own, result, given, factor = x[row], out[row], gradient[row], factors[row]
        along = np.float32(0)       # of the gradient, along the row itself
        for i in range(width):
            along += load(own, i) * load(given, i) * load(weight, i)
        along *= factor * factor / np.float32(width)
        for i in range(width):
            store(result, i, factor * (load(given, i) * load(weight, i) - load(own, i) * along))


@compiled
def rotate(out: np.ndarray, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
    """
    Rotate each head's values, those of its first half with those of its second.

    ``x`` is ``[tokens, heads, size]``; ``cos`` and ``sin`` are ``[tokens, size]``.
    """
    tokens, heads, size = x.shape
    half = size // 2
    for token in range(tokens):
        c, s = cos[token], sin[token]
        for head in range(heads):
            own, result = x[token, head], out[token, head]
            for i in range(half):
                first, second = load(own, i), load(own, i + half)
                store(result, i, first * load(c, i) - second * load(s, i))
                store(result, i + half, second * load(c, i + half) + first * load(s, i + half))


@compiled
def rotate_backward(out: np.ndarray, gradient: np.ndarray, cos: np.ndarray,
                    sin: np.ndarray) -> None:
    """Write the gradient of the ``x`` of :func:`rotate`, for the gradient of its result."""
    tokens, heads, size = gradient.shape
    half = size // 2
    for token in range(tokens):
        c, s = cos[token], sin[token]
        for head in range(heads):
            given, result = gradient[token, head], out[token, head]
            for i in range(half):
                first, second = load(given, i), load(given, i + half)
                store(result, i, first * load(c, i) + second * load(s, i + half))
                store(result, i + half, second * load(c, i + half) - first * load(s, i))
