# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Model files that are read, and files that are rejected."""

from __future__ import annotations

import json
from pathlib import Path
import pickle
import shutil
from typing import Any

import pytest
from support.families import random_adapter
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mace_ros.model.int4_kernels import plain_kernel
from mace_ros.model.loading import (
    conversion_name,
    load_model,
    ModelNotFound,
    packaged_gguf,
    weights_digest,
)
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import FIRST_SERVED_SLOT
from mace_ros.model.packing import pack


class Trap:
    """Creates a file if it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that a test may change."""
    copy = tmp_path / 'model'
    shutil.copytree(model_folder, copy)
    return copy


def test_a_model_in_safetensors_is_loaded(folder: Path) -> None:
    assert load_model(str(folder), device='cpu').name == str(folder)


def test_weights_go_to_another_device_one_by_one(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in the place of a GPU; the whole model is never on a second device."""
    places: list[object] = []
    load = AutoModelForCausalLM.from_pretrained

    def on_cpu(*args: Any, device_map: str | None = None, **others: Any) -> Any:
        places.append(device_map)
        return load(*args, device_map=device_map and 'cpu', **others)

    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', on_cpu)
    monkeypatch.setattr(PreTrainedModel, 'to', lambda model, device: model)
    expected = load_model(str(folder), device='cpu', dtype='float32').model
    found = load_model(str(folder), device='cuda', dtype='float32').model
    assert places == [None, 'cuda']
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_loading_leaves_no_free_memory_that_would_count_as_used(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    to = PreTrainedModel.to

    def record(model: PreTrainedModel, *args: Any, **others: Any) -> Any:
        steps.append('moved')
        return to(model, *args, **others)

    monkeypatch.setattr(PreTrainedModel, 'to', record)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: steps.append('emptied'))
    load_model(str(folder), device='cpu', dtype='float32',
               int4=plain_kernel(torch.device('cpu'), torch.float32))
    assert steps[-2:] == ['moved', 'emptied']


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'model.pickle'])
def test_a_pickle_is_rejected_by_name_and_never_read(folder: Path, name: str) -> None:
    (folder / 'model.safetensors').unlink()
    trace = folder / 'unpickled'
    (folder / name).write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(ModelNotFound, match='folder with safetensors') as refused:
        load_model(str(folder), device='cpu')
    assert str(folder) in str(refused.value)
    assert not trace.exists()


def test_code_in_a_model_folder_is_never_run(folder: Path) -> None:
    trace = folder / 'imported'
    (folder / 'trap.py').write_text(f"import pathlib; pathlib.Path({str(trace)!r}).touch()\n")
    config = json.loads((folder / 'config.json').read_text())
    config |= {'model_type': 'trap', 'auto_map': {
        'AutoConfig': 'trap.TrapConfig', 'AutoModelForCausalLM': 'trap.TrapModel'}}
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ModelNotFound, match=r'model\.source'):
        load_model(str(folder), device='cpu')
    assert not trace.exists()


def test_truncated_weights_are_rejected(folder: Path) -> None:
    weights = folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelNotFound, match=r'model\.source: .*damaged'):
        load_model(str(folder), device='cpu')


@pytest.mark.parametrize('size', [0, 3, 1000, 2 * 10**6])
def test_a_truncated_gguf_file_is_rejected(tmp_path: Path, size: int) -> None:
    cut = tmp_path / 'cut.gguf'
    with packaged_gguf().open('rb') as file:
        cut.write_bytes(file.read(size))
    with pytest.raises(ModelNotFound, match=f'^model.source: {cut}'):
        load_model(str(cut), device='cpu', cache=str(tmp_path / 'cache'))
    assert list((tmp_path / 'cache').iterdir()) == []


def test_gguf_files_with_different_weights_have_different_conversions(tmp_path: Path) -> None:
    """If a model is fine-tuned and saved again, only the last bytes may differ."""
    names = set()
    for end in (b'0', b'1', b'0'):
        gguf = tmp_path / 'model.gguf'
        gguf.write_bytes(bytes(2**22 + 5) + end)
        names.add(conversion_name(gguf))
    assert len(names) == 2


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_models_of_the_same_shape_have_different_digests(model_folder: Path, dtype: str) -> None:
    model = load_model(str(model_folder), device='cpu', dtype=dtype).model
    before = weights_digest(model)
    again = load_model(str(model_folder), device='cpu', dtype=dtype).model
    assert weights_digest(again) == before
    with torch.no_grad():   # by more than the spacing of bfloat16, which is at most 1/128
        model.get_input_embeddings().weight.mul_(1.01)
    assert weights_digest(model) != before


def packed_digest(folder: Path, weights: str, factor: float, *, adapted: bool = False) -> str:
    """Return the digest of a packed model, one of whose linear layers is multiplied."""
    four_bits = weights == 'int4'
    loaded = load_model(
        str(folder), device='cpu', dtype='bfloat16' if weights == 'bfloat16' else 'float32',
        int4=plain_kernel(torch.device('cpu'), torch.float32) if four_bits else None)
    name = 'model.layers.1.mlp.down_proj'
    with torch.no_grad():
        (loaded.int4[name].scales_and_zeros if four_bits
         else loaded.model.get_submodule(name).weight).mul_(factor)
    packed = pack(loaded.model, kv_tokens=64, int8=weights == 'int8', int4=loaded.int4)
    if adapted:
        lora = LoRAManager(packed.linears, targets='all-linear', rank=2, alpha=2.0, slots=1)
        lora.write_slot(FIRST_SERVED_SLOT, random_adapter(lora, 0))
    return weights_digest(packed.model)


@pytest.mark.parametrize('weights', ['float32', 'bfloat16', 'int8', 'int4'])
def test_packed_models_with_different_linear_layers_have_different_digests(
        model_folder: Path, weights: str) -> None:
    """As a model and its fine-tune have. Adapters make no difference."""
    plain = packed_digest(model_folder, weights, 1.0)
    assert packed_digest(model_folder, weights, 1.0, adapted=True) == plain
    assert packed_digest(model_folder, weights, 1.5) != plain
