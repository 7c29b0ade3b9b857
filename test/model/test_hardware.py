# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The identity and the memory of a CUDA device, with stand-ins for torch's functions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mace_ros.api.hardware import Hardware
from mace_ros.model.hardware import avoid_cudnn_attention, hardware, release_memory


@pytest.mark.parametrize('properties, integrated', [
    ({'is_integrated': 1}, True), ({'is_integrated': 0}, False), ({}, False)])
def test_torch_tells_whether_a_gpu_is_integrated(
        properties: dict[str, int], integrated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(
        name='a GPU', uuid='1234', **properties))
    assert hardware(torch.device('cuda')) == Hardware(
        'cuda', 'a GPU', 'GPU-1234', integrated=integrated)


def test_a_closed_engine_leaves_no_workspaces_of_its_streams(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """They would pile up with each cycle of configure and cleanup."""
    freed: list[str] = []
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: freed.append('cache'))
    monkeypatch.setattr(torch._C, '_cuda_clearCublasWorkspaces',
                        lambda: freed.append('workspaces'), raising=False)
    release_memory()
    assert freed == ['workspaces', 'cache']


def test_attention_needs_no_plan_for_each_shape() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        avoid_cudnn_attention()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
