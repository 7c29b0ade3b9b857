# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What several test files share."""

from __future__ import annotations

import pytest

from mace_ros.execution.loading import load_model, LoadedModel


@pytest.fixture(scope='session')
def base_model() -> LoadedModel:
    """Return the packaged model, in fp32 on the CPU; tests must not change it."""
    return load_model(device='cpu', dtype='float32')
