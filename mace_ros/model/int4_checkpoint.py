# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A model whose linear layers have 4 bits: made from another, kept on disk, and loaded again.

A file holds the packed weights in the order of this machine's kernel, so that a start only maps
them, and the rest of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
import json
from pathlib import Path
import tempfile

from safetensors import safe_open, SafetensorError
from safetensors.torch import save_file
import torch
from torch import Tensor
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from mace_ros.model.int4 import Int4Weight, quantizable, quantize
from mace_ros.model.int4_kernels import Int4Kernel
from mace_ros.model.packed_model import PackedModel

VERSION = 2     # of the file; increase it when merged layers or the format change


@dataclass(frozen=True)
class Int4Checkpoint:
    """
    The weights of a model.

    ``linears`` are the merged linear layers in 4 bits by :attr:`MergedLinear.name`, ``sizes``
    the outputs of each of the layers in them, and ``others`` the rest of the state dict.
    ``rounded`` is the share of the groups that were rounded to 4 bits; the others have the values
    of the source.
    """

    linears: Mapping[str, Int4Weight]
    sizes: Mapping[str, Mapping[str, int]]
    others: Mapping[str, Tensor]
    rounded: float

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the state dict of the model before its layers are merged, dequantised."""
        result = dict(self.others)
        for name, weight in self.linears.items():
            sizes = self.sizes[name]
            # On a CPU, from where the model moves to the device: there, all dense weights at once
            # would take several times the memory of those in 4 bits.
            parts = weight.dense(dtype).cpu().split(list(sizes.values()))
            result |= {f'{layer}.weight': part.contiguous()
                       for layer, part in zip(sizes, parts, strict=True)}
        return result


def checkpoint_of(model: PreTrainedModel, kernel: Int4Kernel,
                  dtype: torch.dtype) -> Int4Checkpoint:
    """Return ``model`` (changed by this) in 4 bits; ``dtype`` is that of its other parts."""
    others, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:       # the head may share the embedding's weight
            seen.add(tensor.data_ptr())
            # Some families keep vectors in fp32.
            others[name] = tensor.to(dtype) if tensor.dim() > 1 else tensor
    linears, sizes, rounded, groups = {}, {}, 0, 0
    for layer in PackedModel(model).linears:
        if not quantizable(layer.weight):
            continue
        values = quantize(layer.weight, dtype=kernel.dtype)
        rounded, groups = rounded + values.rounded, groups + values.scales.numel()
        linears[layer.name] = Int4Weight.of(values, kernel)
        sizes[layer.name] = {s.name: s.size for s in layer.shards}
        for shard in layer.shards:
            del others[f'{shard.name}.weight']
    return Int4Checkpoint(linears, sizes, others, rounded / max(groups, 1))


def model_of(checkpoint: Int4Checkpoint, folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model with dequantised weights; its configuration is in ``folder``."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device('meta'):
        kind = type(AutoModelForCausalLM.from_config(config))
    model: PreTrainedModel = kind.from_pretrained(
        None, config=config, state_dict=checkpoint.state_dict(dtype), dtype=dtype,
        attn_implementation='eager')
    if (Path(folder) / transformers.utils.GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def file_for(folder: Path, kernel: Int4Kernel, dtype: torch.dtype) -> Path:
    """Return the file in ``folder`` that holds the checkpoint of a kernel and a dtype."""
    names = (str(x).removeprefix('torch.') for x in (kernel.dtype, dtype))
    layout = kernel.layout.name + '-rows' * kernel.has_rows
    return folder / f'int4-{VERSION}-{layout}-{"-".join(names)}.safetensors'


def save(checkpoint: Int4Checkpoint, path: Path) -> None:
    """Write the file atomically: a crash leaves the old one, or none."""
    tensors = {f'other.{name}': t.contiguous() for name, t in checkpoint.others.items()}
    for name, weight in checkpoint.linears.items():
        tensors[f'packed.{name}'] = weight.packed.cpu()
        tensors[f'scales.{name}'] = weight.scales_and_zeros.cpu()
        if weight.rows is not None:
            tensors[f'rows.{name}'] = weight.rows
    about = {'sizes': checkpoint.sizes, 'rounded': checkpoint.rounded}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.stem}-') as work:
        file = Path(work) / path.name
        save_file(tensors, file, metadata={'format': 'pt', 'int4': json.dumps(about)})
        file.replace(path)


def read(path: Path, kernel: Int4Kernel) -> Int4Checkpoint | None:
    """Return the checkpoint in a file, or None if there is none that can be read."""
    try:
        with safe_open(path, 'pt') as file:
            about = json.loads(file.metadata()['int4'])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None

    def named(kind: str) -> dict[str, Tensor]:
        return {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)}

    scales, rows = named('scales.'), named('rows.')
    linears = {
        name: Int4Weight(packed.to(kernel.device), scales[name].to(kernel.device), kernel,
                         rows.get(name))
        for name, packed in named('packed.').items()}
    return Int4Checkpoint(linears, about['sizes'], named('other.'), about['rounded'])
