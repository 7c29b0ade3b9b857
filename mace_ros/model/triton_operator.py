# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Operators of PyTorch (``torch.ops.mace_ros``) that launch the package's Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Launch = TypeVar('Launch', bound=Callable[..., None])

_LIBRARY = torch.library.Library('mace_ros', 'FRAGMENT')


def triton_operator(schema: str) -> Callable[[Launch], Launch]:
    """
    Define an operator of this schema that calls the decorated function.

    On a CPU, only Triton's interpreter can run the function. On the ``meta`` device, where tensors
    have no values, nothing is launched: tests can run the code that a GPU would.
    """
    def define(launch: Launch) -> Launch:
        name = schema.partition('(')[0]
        _LIBRARY.define(schema)
        for device in ('CUDA', 'CPU'):
            _LIBRARY.impl(name, launch, device)
        _LIBRARY.impl(name, _launch_nothing, 'Meta')
        return launch

    return define


def _launch_nothing(*_: object) -> None:
    """Launch no kernel."""
