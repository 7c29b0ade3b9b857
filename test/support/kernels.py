# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Where tests run Triton kernels: on a GPU, or else in Triton's interpreter.

Triton reads the environment when it is imported, which transformers does. So import this module
before.
"""

from __future__ import annotations

from importlib.util import find_spec
import os

import pytest
import torch

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
if DEVICE.type == 'cpu':
    os.environ.setdefault('TRITON_INTERPRET', '1')

needs_triton = pytest.mark.skipif(find_spec('triton') is None, reason='Triton is not installed')
