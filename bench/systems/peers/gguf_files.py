# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""GGUF files for llama.cpp, with the same weights as the other systems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# Names of torch's types. llama.cpp always keeps vectors (norms) in float32.
TYPES = {
    'float32': gguf.GGMLQuantizationType.F32,
    'float16': gguf.GGMLQuantizationType.F16,
    'bfloat16': gguf.GGMLQuantizationType.BF16,
    'int8': gguf.GGMLQuantizationType.Q8_0,
    'int4': None,       # the source as it is
}

# Names of linear layers, by those of PEFT.
LAYERS = {'q_proj': 'attn_q', 'k_proj': 'attn_k', 'v_proj': 'attn_v', 'o_proj': 'attn_output',
          'gate_proj': 'ffn_gate', 'up_proj': 'ffn_up', 'down_proj': 'ffn_down'}


def convert(source: Path, target: Path, dtype: str) -> Path:
    """Write the model of a GGUF file, tokenizer included, in another precision."""
    if TYPES[dtype] is None:
        return source
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, _text(reader, 'general.architecture'))
    for field in reader.fields.values():
        # The writer has set the header and the name of the architecture.
        if field.name.startswith('GGUF.') or field.name == 'general.architecture':
            continue
        if field.name == 'general.file_type':
            continue    # the source's quantisation
        kind = field.types[0]
        inner = field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        _add(writer, tensor.name, values, TYPES[dtype] if values.ndim > 1 else TYPES['float32'])
    return _write(writer, target)


def adapter(source: Path, target: Path, published: Path) -> Path:
    """
    Write an adapter for the model in a GGUF file, of the form of a ``published`` one of PEFT.

    Its weights are random and small: only its cost is compared.
    """
    config = json.loads((published / 'adapter_config.json').read_text())
    rank, adapted = config['r'], {LAYERS[name] for name in config['target_modules']}
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, _text(reader, 'general.architecture'))
    writer.add_string('general.type', 'adapter')
    writer.add_string('adapter.type', 'lora')
    writer.add_float32('adapter.lora.alpha', config['lora_alpha'])
    rng = np.random.default_rng(0)
    for tensor in reader.tensors:
        if not adapted & set(tensor.name.split('.')) or len(tensor.shape) < 2:
            continue
        # GGUF lists the innermost dimension first.
        inputs, outputs = (int(n) for n in tensor.shape)
        for part, shape in (('lora_a', (rank, inputs)), ('lora_b', (outputs, rank))):
            values = rng.normal(0.0, 1e-3, shape).astype(np.float32)
            _add(writer, f'{tensor.name}.{part}', values, TYPES['float32'])
    return _write(writer, target)


def _text(reader: gguf.GGUFReader, name: str) -> str:
    field = reader.fields[name]
    return str(field.contents())


def _add(writer: gguf.GGUFWriter, name: str, values: Any, kind: Any) -> None:
    if kind == TYPES['float32']:
        writer.add_tensor(name, values)
    elif kind == TYPES['float16']:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _write(writer: gguf.GGUFWriter, target: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
