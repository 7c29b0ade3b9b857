# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
What a compiled pass knows of a model: records with the addresses of its weights and KV cache.

Import this module only where Numba is installed.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn, Tensor

from mace_ros.model.cpu_kernels import DENSE, GROUP_BYTES, INT4, INT8, LAYER, MODEL
from mace_ros.model.cpu_matmul import PrepackedWeight
from mace_ros.model.fused_layers import eps_of, is_norm, norm_kind
from mace_ros.model.int4 import Int4Weight
from mace_ros.model.lora_linear import LoRALinear
from mace_ros.model.merged_linear import MergedLinear
from mace_ros.model.packed_model import PackedModel

# The modules of a layer, by the names that Llama's form has in transformers.
LAYER_PARTS = {'self_attn', 'mlp', 'input_layernorm', 'post_attention_layernorm'}
ATTENTION = {'q_proj', 'k_proj', 'v_proj', 'o_proj'}
HEAD_NORMS = {'q_norm', 'k_norm'}
MLP = {'gate_proj', 'up_proj', 'down_proj', 'act_fn'}

PARTS_PER_THREAD = 3    # of a product: with one, a thread that begins late keeps the others waiting
ENDLESS = 2 ** 62       # a window that no context reaches
NO_NORM = 0, 0.0

# The fields of a record, as np.array() takes them.
Fields: TypeAlias = tuple[Any, ...]


class OtherForm(ValueError):
    """A model's layers have another form than Llama's."""


class OtherLayout(ValueError):
    """A weight has a layout that the kernels can't read."""


class ModelRecords:
    """
    The records of a model, whose weights, adapter slots and KV cache must stay where they are.

    ``layers`` are :data:`LAYER`, ``model`` is one :data:`MODEL`, and ``widths`` are the values of a
    row that norms, products, attention and gates write.
    """

    def __init__(self, model: PackedModel, threads: int) -> None:
        """Raise :class:`OtherForm` or :class:`OtherLayout` if the kernels don't fit the model."""
        self._owner = model     # of the memory at the addresses
        self._dtype, self._threads, self._context = model.dtype, threads, model.context
        self.layers = np.array([self._layer(layer) for layer in model.layers], LAYER)
        width, attended, gated = (self.layers[0][x]['inputs'] for x in ('qkv', 'out', 'down'))
        cache = model.kv_cache
        slots, kv_heads, size = cache.keys[0].shape
        merged = attended + 2 * kv_heads * size
        for name, inputs, outputs in (
                ('qkv', width, merged), ('out', attended, width),
                ('gate_and_up', width, 2 * gated), ('down', gated, width)):
            products = self.layers[name]
            if (products['inputs'] != inputs).any() or (products['outputs'] != outputs).any():
                raise OtherForm
        if attended % (kv_heads * size) or any(
                x.shape != cache.keys[0].shape for x in (*cache.keys, *cache.values)):
            raise OtherForm
        head = self._product(model.model.get_output_embeddings())
        self.model = np.array([(
            attended // size, kv_heads, size, slots, self._norm(model.model.get_decoder().norm),
            head)], MODEL)
        self.widths = width, max(merged, 2 * gated), attended, gated

    def _layer(self, layer: Any) -> Fields:
        """Return a ``LAYER``."""
        if _children(layer) != LAYER_PARTS:
            raise OtherForm
        attention, mlp = layer.self_attn, layer.mlp
        inside, index, cache = _children(attention), attention.layer_idx, self._context.kv_cache
        scores = self._context.score_arguments[index]
        if (inside not in (ATTENTION, ATTENTION | HEAD_NORMS) or scores.changes_scores
                or _children(mlp) != MLP or not is_silu(mlp.act_fn)):
            raise OtherForm
        assert cache is not None
        keys, values = cache.keys[index], cache.values[index]
        size = keys.shape[2]
        head_norms = [NO_NORM] * 2 if inside == ATTENTION else [
            self._norm(norm, size) for norm in (attention.q_norm, attention.k_norm)]
        return (
            self._norm(layer.input_layernorm),
            self._product(attention.q_proj, attention.k_proj, attention.v_proj), *head_norms,
            getattr(attention, 'use_rope', True), self._address(keys), self._address(values),
            ENDLESS if scores.window is None else scores.window,
            size ** -0.5 if scores.scaling is None else scores.scaling,
            self._product(attention.o_proj), self._norm(layer.post_attention_layernorm),
            self._product(mlp.gate_proj, mlp.up_proj), self._product(mlp.down_proj))

    def _norm(self, norm: Any, width: int | None = None) -> Fields:
        """Return the ``NORM`` of a module, which has this width if it is given."""
        if (not is_norm(norm) or norm.weight.dim() != 1 or width not in (None, len(norm.weight))
                or norm_kind(norm) != {'relative': False, 'centered': False}):
            raise OtherForm
        return self._address(norm.weight), float(eps_of(norm))

    def _product(self, *linears: nn.Module) -> Fields:
        """Return the ``PRODUCT`` of the merged layer of exactly these."""
        first = linears[0]
        if not isinstance(first, LoRALinear):
            raise OtherForm
        found = [(getattr(x, 'merged', None), getattr(x, 'index', None)) for x in linears]
        if found != [(first.merged, i) for i in range(len(first.merged.shards))]:
            raise OtherForm
        linear = first.merged
        return (
            *self._weight(linear), self._address(linear.bias), linear.in_features,
            linear.out_features, -(-linear.out_features // (PARTS_PER_THREAD * self._threads)),
            self._address(linear.exact_a, torch.float32),
            self._address(linear.exact_b, torch.float32), linear.width)

    def _weight(self, linear: MergedLinear) -> tuple[int, int, int]:
        """Return a weight's form, and the addresses of its values and scales."""
        if linear.int8 is not None:
            values, scales = linear.int8.tensors
            return INT8, self._address(values, torch.int8), self._address(scales)
        match linear.stored:
            case None:
                return DENSE, self._address(linear.weight), 0
            case PrepackedWeight(tensors=(weight,)):
                return DENSE, self._address(weight), 0
            case Int4Weight(rows=Tensor() as rows) if rows.shape[1] == GROUP_BYTES:
                return INT4, self._address(rows, torch.uint8), 0
        raise OtherLayout('its weights have another layout than the kernels read')

    def _address(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> int:
        """
        Return the address of a contiguous tensor; 0 if there is none, or no values in it.

        It must have ``dtype``, by default that of the model.
        """
        if tensor is None or not tensor.numel():
            return 0
        if tensor.dtype != (dtype or self._dtype) or not tensor.is_contiguous():
            raise OtherLayout(f'a tensor is {tensor.dtype}, or not contiguous')
        return tensor.data_ptr()


def _children(module: nn.Module) -> set[str]:
    """Return the names of a module's own modules."""
    return set(dict(module.named_children()))


def is_silu(activation: Any) -> bool:
    """Return whether a function is SiLU."""
    x = torch.linspace(-8.0, 8.0, 33)
    return torch.allclose(activation(x), nn.functional.silu(x))
