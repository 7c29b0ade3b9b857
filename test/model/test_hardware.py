# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The identity and the memory of a CUDA device, with stand-ins for torch's functions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mace_ros.api.hardware import Hardware
from mace_ros.model import packing
from mace_ros.model.architectures import UnsupportedModel
from mace_ros.model.hardware import hardware, release_memory


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


@pytest.mark.parametrize('device, enabled', [('cuda', False), ('cpu', True)])
def test_attention_on_cuda_builds_no_plan_for_each_shape(
        device: str, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing a model switches cuDNN's attention off before the first pass."""
    def stop(_: object) -> None:
        raise UnsupportedModel('packing ends here')

    monkeypatch.setattr(packing, 'check_supported', stop)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        with pytest.raises(UnsupportedModel):
            packing.pack(SimpleNamespace(device=torch.device(device)), kv_tokens=1)
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
