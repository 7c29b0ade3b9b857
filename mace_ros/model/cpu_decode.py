# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Decode rows on a CPU, with a few compiled calls in each layer.

Between products, a model's own code runs some sixty small operations per layer. The weights evict
their code from the caches, so that each takes several times as long as in a loop of its own. Here,
all that a layer of Llama's form computes beside products and attention is in
:mod:`mace_ros.model.cpu_kernels`. Other passes and other forms run the model's own code. Import
this module only where Numba is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import math
from typing import Any

import numpy as np
import torch
from torch import nn, Tensor

from mace_ros.model import cpu_kernels
from mace_ros.model.attention import (
    attend_decode_rows,
    AttentionMetadata,
    ForwardContext,
    ScoreArguments,
)
from mace_ros.model.cpu_matmul import SMALL_BATCH
from mace_ros.model.fused_layers import eps_of, is_norm, norm_kind
from mace_ros.model.lora_linear import LoRALinear
from mace_ros.model.merged_linear import MergedLinear
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import is_decode, PiggybackSpans, Span

# The modules of a layer, by the names that Llama's form has in transformers.
LAYER = {'self_attn', 'mlp', 'input_layernorm', 'post_attention_layernorm'}
ATTENTION = {'q_proj', 'k_proj', 'v_proj', 'o_proj'}
HEAD_NORMS = {'q_norm', 'k_norm'}
MLP = {'gate_proj', 'up_proj', 'down_proj', 'act_fn'}

# The kernels run in one thread, and are faster than several threads of PyTorch for little work.
# At most: rows * keys * heads * head size in the attention of a layer, and rows * the ranks of all
# shards of a merged layer in its update by adapters.
ATTENDED_VALUES = 2 ** 18
LOW_RANK_VALUES = 512


class OtherForm(ValueError):
    """A model's layers have another form than Llama's."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor, and its memory as the kernels take it."""

    tensor: Tensor
    array: np.ndarray

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        """Return a contiguous tensor with its memory."""
        return cls(tensor, array(tensor))


def array(tensor: Tensor) -> np.ndarray:
    """Return the memory of a tensor; bfloat16 as ``uint16``, which NumPy knows."""
    found: np.ndarray = (
        tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


class AdaptedProduct:
    """The product of a merged layer with few tokens, each under its own adapter."""

    def __init__(self, linear: MergedLinear) -> None:
        """Take the layer, and its adapters in fp32."""
        self._linear = linear
        if linear.width:
            self._a, self._b = (
                array(x).reshape(-1, linear.width, x.shape[1])
                for x in (linear.exact_a, linear.exact_b))

    def __call__(self, x: Operand, slots: np.ndarray | None) -> Operand:
        """Return ``[rows, out]`` for ``x``, ``[rows, in]``; ``slots`` are ``[rows]``, if any."""
        y = Operand.of(self._linear.base_output(x.tensor))
        if self._linear.width and slots is not None:
            cpu_kernels.add_update(y.array, x.array, self._a, self._b, slots)
        return y


@dataclass(frozen=True)
class Norm:
    """A root mean square norm."""

    weight: np.ndarray
    eps: float

    @classmethod
    def of(cls, norm: Any) -> Norm:
        """Return the norm that a module computes; raises :class:`OtherForm`."""
        if (not is_norm(norm) or norm.weight.dim() != 1
                or norm_kind(norm) != {'relative': False, 'centered': False}):
            raise OtherForm
        return cls(array(norm.weight.detach()), float(eps_of(norm)))


@dataclass(frozen=True)
class DecoderLayer:
    """A layer of Llama's form."""

    input_norm: Norm
    qkv: AdaptedProduct
    head_norms: Sequence[Norm]      # of queries and keys, or none
    rotates: bool
    keys: Operand        # of the KV cache, [cache slots, KV heads, size]
    values: Operand
    scores: ScoreArguments
    out: AdaptedProduct
    middle_norm: Norm
    gate_and_up: AdaptedProduct
    down: AdaptedProduct

    @classmethod
    def of(cls, layer: Any, context: ForwardContext) -> DecoderLayer:
        """Return what a module computes; raises :class:`OtherForm`."""
        if set(dict(layer.named_children())) != LAYER:
            raise OtherForm
        attention, mlp = layer.self_attn, layer.mlp
        inside = set(dict(attention.named_children()))
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if inside == ATTENTION | HEAD_NORMS:
            norms += [attention.q_norm, attention.k_norm]
        elif inside != ATTENTION:
            raise OtherForm
        if set(dict(mlp.named_children())) != MLP or not is_silu(mlp.act_fn):
            raise OtherForm
        first, middle, *of_heads = map(Norm.of, norms)
        index, cache = attention.layer_idx, context.kv_cache
        assert cache is not None
        keys, values = Operand.of(cache.keys[index]), Operand.of(cache.values[index])
        if (keys.array.shape != values.array.shape
                or any(len(norm.weight) != keys.array.shape[2] for norm in of_heads)):
            raise OtherForm
        return cls(
            first, merged(attention.q_proj, attention.k_proj, attention.v_proj), of_heads,
            bool(getattr(attention, 'use_rope', True)), keys, values,
            context.score_arguments[index], merged(attention.o_proj), middle,
            merged(mlp.gate_proj, mlp.up_proj), merged(mlp.down_proj))


def merged(*linears: nn.Module) -> AdaptedProduct:
    """Return the product of the merged layer of exactly these shards; raises OtherForm."""
    first = linears[0]
    if not isinstance(first, LoRALinear):
        raise OtherForm
    found = [(getattr(x, 'merged', None), getattr(x, 'index', None)) for x in linears]
    if found != [(first.merged, i) for i in range(len(first.merged.shards))]:
        raise OtherForm
    return AdaptedProduct(first.merged)


def is_silu(activation: Any) -> bool:
    """Return whether a function is SiLU."""
    x = torch.linspace(-8.0, 8.0, 33)
    return torch.allclose(activation(x), nn.functional.silu(x))


class CpuDecode:
    """Computes passes of decode rows only, on a CPU, for models of Llama's form."""

    best_tokens: Tensor | None = None

    def __init__(self, model: PackedModel) -> None:
        """
        Take the layers, adapter slots and KV cache of ``model``, which must stay where they are.

        Raises :class:`OtherForm` if they have another form than Llama's.
        """
        self._model, decoder = model, model.model.get_decoder()
        try:
            self._embed, self._rotary = decoder.embed_tokens, decoder.rotary_emb
            self._norm = Norm.of(decoder.norm)
        except AttributeError:
            raise OtherForm from None
        self._layers = [DecoderLayer.of(layer, model.context) for layer in model.layers]
        width = max(linear.width for linear in model.linears)
        self._max_rows = min(SMALL_BATCH, LOW_RANK_VALUES // width if width else SMALL_BATCH)
        self._head = model.model.get_output_embeddings()

    @classmethod
    def of(cls, model: PackedModel) -> CpuDecode | None:
        """Return the passes of a model; None if it has another form than Llama's."""
        try:
            return cls(model)
        except OtherForm:
            return None

    @torch.no_grad()
    def run(self, spans: Sequence[Span], piggyback: PiggybackSpans | None) -> Tensor | None:
        """Compute a pass as the model does; return None if it is not of a few decode rows."""
        if (piggyback is not None or not 0 < len(spans) <= self._max_rows
                or not all(map(is_decode, spans))):
            return None
        rows = sorted(spans, key=lambda s: s.cache_position)
        hidden = self._embed(self._model.tensor([s.tokens[0] for s in rows]))
        cos, sin = self._rotary(hidden, self._model.tensor([[s.position for s in rows]]))
        slots = np.array([s.adapter_slots[0] for s in rows])
        last = self._run_layers(
            Operand.of(hidden),
            _Pass(self._model.attention_metadata(rows, ()), array(cos[0]), array(sin[0])),
            slots if slots.any() else None)
        row = {id(span): i for i, span in enumerate(rows)}
        logits: Tensor = self._head(last[[row[id(s)] for s in spans if s.wants_logits]])
        return logits.float()

    def _run_layers(self, hidden: Operand, attention: _Pass,
                    slots: np.ndarray | None) -> Tensor:
        """Return the normalized output of the last layer."""
        x, norm = Operand.of(torch.empty_like(hidden.tensor)), self._layers[0].input_norm
        cpu_kernels.normalize(x.array, hidden.array, norm.weight, norm.eps)
        following = [*(layer.input_norm for layer in self._layers[1:]), self._norm]
        for layer, norm in zip(self._layers, following, strict=True):
            y = layer.out(attention.attend(layer, layer.qkv(x, slots)), slots)
            middle = layer.middle_norm
            cpu_kernels.add_and_normalize(
                x.array, hidden.array, y.array, middle.weight, middle.eps)
            y = layer.gate_and_up(x, slots)
            gated = Operand.of(y.tensor.new_empty(len(y.array), y.array.shape[1] // 2))
            cpu_kernels.multiply_gate(gated.array, y.array)
            y = layer.down(gated, slots)
            cpu_kernels.add_and_normalize(x.array, hidden.array, y.array, norm.weight, norm.eps)
        return x.tensor


class _Pass:
    """The attention of a pass."""

    def __init__(self, metadata: AttentionMetadata, cos: np.ndarray, sin: np.ndarray) -> None:
        """``cos`` and ``sin`` are ``[rows, rotated values of a head]``."""
        self._metadata, self._cos, self._sin = metadata, cos, sin
        assert metadata.write_slots is not None
        self._write = metadata.write_slots.numpy()
        first = metadata.decode_rows[0]
        self._slots, self._lengths = first.slots.numpy(), first.lengths.numpy()
        self._keys = self._slots.size if len(metadata.decode_rows) == 1 else math.inf

    def attend(self, layer: DecoderLayer, y: Operand) -> Operand:
        """Return the output of a layer's attention for its queries, keys and values."""
        keys, values, scores = layer.keys, layer.values, layer.scores
        kv_heads, size = keys.array.shape[1:]
        heads, first = y.array.shape[1] // size - 2 * kv_heads, 0
        for norm, count in zip(layer.head_norms, (heads, kv_heads), strict=False):
            cpu_kernels.normalize_heads(y.array, first, norm.weight, norm.eps, count)
            first += count * size
        rotated = None if layer.rotates else 0      # values of a head; None: as many as cosines
        cpu_kernels.rotate_and_write(y.array, self._cos[:, :rotated], self._sin[:, :rotated],
                                     keys.array, values.array, self._write)
        if self._keys * heads * size > ATTENDED_VALUES or scores.changes_scores:
            query = y.tensor[:, :heads * size].view(-1, heads, size)
            out = attend_decode_rows(
                query, keys.tensor, values.tensor, self._metadata, scores)
            return Operand.of(out.reshape(len(query), -1))
        out = y.tensor.new_empty(len(y.array), heads * size)
        result = Operand.of(out)
        cpu_kernels.attend(
            result.array, y.array, keys.array, values.array, self._slots, self._lengths,
            self._slots.shape[1] if scores.window is None else scores.window,
            size ** -0.5 if scores.scaling is None else scores.scaling)
        return result
