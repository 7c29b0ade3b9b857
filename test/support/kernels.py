# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Where tests run Triton kernels: on a GPU, or else in Triton's interpreter.

Triton reads the environment when it is imported, which transformers does. So import this module
before.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
import os

from packaging.version import Version
import pytest
import torch

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
if DEVICE.type == 'cpu':
    os.environ.setdefault('TRITON_INTERPRET', '1')


def _obstacle() -> str:
    """Return why kernels can't run here; empty if they can."""
    if find_spec('triton') is None:
        return 'Triton is not installed'
    if (DEVICE.type == 'cpu' and Version(version('triton')) < Version('3.7')
            and Version(version('numpy')) >= Version('2.4')):
        return 'the interpreter of Triton before 3.7 fails with NumPy 2.4'
    return ''


needs_triton = pytest.mark.skipif(bool(_obstacle()), reason=_obstacle())
