# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Intermediate results share the memory of earlier ones."""

import torch

from mace_ros.model.workspace import Workspace


def test_a_name_keeps_its_memory_until_it_is_too_small_or_freed() -> None:
    workspace = Workspace()
    first = workspace.tensor('a', (4, 3), torch.float32)
    smaller = workspace.tensor('a', (2, 5), torch.float32)
    assert smaller.shape == (2, 5) and smaller.is_contiguous()
    assert smaller.data_ptr() == first.data_ptr()
    others = (workspace.tensor('b', (4, 3), torch.float32),
              workspace.tensor('a', (4, 3), torch.bfloat16),
              workspace.tensor('a', (4, 4), torch.float32))
    addresses = {t.data_ptr() for t in (first, *others)}
    assert len(addresses) == 4
    workspace.clear()
    assert workspace.tensor('a', (4, 4), torch.float32).data_ptr() != others[2].data_ptr()
