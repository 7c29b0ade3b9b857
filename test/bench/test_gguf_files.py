# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Files for llama.cpp hold what the other systems serve."""

from __future__ import annotations

import json
from pathlib import Path

import gguf

from bench.systems.peers.gguf_files import adapter
from mace_ros.model.loading import packaged_gguf


def test_an_adapter_has_the_layers_of_the_published_one(tmp_path: Path) -> None:
    (tmp_path / 'adapter_config.json').write_text(json.dumps(
        {'r': 4, 'lora_alpha': 8.0, 'target_modules': ['down_proj', 'o_proj']}))
    reader = gguf.GGUFReader(adapter(packaged_gguf(), tmp_path / 'adapter.gguf', tmp_path))
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    source = {tensor.name: tuple(map(int, tensor.shape))
              for tensor in gguf.GGUFReader(packaged_gguf()).tensors}
    adapted = {name: shape for name, shape in source.items()
               if name.split('.')[-2] in ('ffn_down', 'attn_output')}
    assert adapted
    assert shapes == {f'{name}.{part}': shape for name, (inputs, outputs) in adapted.items()
                      for part, shape in (('lora_a', (inputs, 4)), ('lora_b', (4, outputs)))}
    assert reader.fields['adapter.lora.alpha'].contents() == 8.0
