# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Decode rows on a CPU, in one compiled function for the whole pass.

A model's own code runs some two thousand operations for each token. The weights evict their code
from the caches, so that each takes several times as long as in a loop of its own. Here, a whole
pass of a model of Llama's form is one function (:mod:`mace_ros.model.cpu_kernels`). Other passes
and other forms run the model's own code. Import this module only where Numba is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn, Tensor

from mace_ros.model import cpu_kernels
from mace_ros.model.attention import ForwardContext
from mace_ros.model.cpu_kernels import DENSE, GROUP_BYTES, INT4, INT8, LAYER, MODEL
from mace_ros.model.cpu_matmul import PrepackedWeight, SMALL_BATCH
from mace_ros.model.fused_layers import eps_of, is_norm, norm_kind
from mace_ros.model.int4 import Int4Weight
from mace_ros.model.lora_linear import LoRALinear
from mace_ros.model.merged_linear import MergedLinear
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import BLOCK_TOKENS, is_decode, PiggybackSpans, Span

# The modules of a layer, by the names that Llama's form has in transformers.
LAYER_PARTS = {'self_attn', 'mlp', 'input_layernorm', 'post_attention_layernorm'}
ATTENTION = {'q_proj', 'k_proj', 'v_proj', 'o_proj'}
HEAD_NORMS = {'q_norm', 'k_norm'}
MLP = {'gate_proj', 'up_proj', 'down_proj', 'act_fn'}
PRODUCTS = ('qkv', 'out', 'gate_and_up', 'down')        # of a LAYER

PARTS_PER_THREAD = 3    # of a product: with one, a thread that begins late keeps the others waiting
ENDLESS = 2 ** 62       # a window that no context reaches
NO_NORM = 0, 0.0

# The fields of a record of cpu_kernels, as np.array() takes them.
Record: TypeAlias = tuple[Any, ...]


class OtherForm(ValueError):
    """A model's layers have another form than Llama's."""


class CpuDecode:
    """Computes passes of decode rows only, on a CPU, for models of Llama's form."""

    best_tokens: Tensor | None = None

    def __init__(self, model: PackedModel) -> None:
        """
        Take the weights, adapter slots and KV cache of ``model``, which must stay where they are.

        Raises :class:`OtherForm` if the layers have another form than Llama's.
        """
        self._threads = torch.get_num_threads()
        decoder, head, cache = (
            model.model.get_decoder(), model.model.get_output_embeddings(), model.kv_cache)
        try:
            self._embed, self._rotary, norm = (
                decoder.embed_tokens, decoder.rotary_emb, decoder.norm)
        except AttributeError:
            raise OtherForm from None
        self._layers = np.array(
            [layer_record(x, model.context, self._threads) for x in model.layers], LAYER)
        slots, kv_heads, size = cache.keys[0].shape
        if any(x.shape != cache.keys[0].shape for x in (*cache.keys, *cache.values)):
            raise OtherForm
        heads = self._layers['qkv']['outputs'][0] // size - 2 * kv_heads
        self._model = np.array([(
            heads, kv_heads, size, slots, norm_record(norm),
            product_record(self._threads, head))], MODEL)
        # The values in a row that norms, products, attention and gates write.
        self._widths = (
            self._layers['qkv']['inputs'][0], max(self._layers[x]['outputs'][0] for x in PRODUCTS),
            self._layers['out']['inputs'][0], self._layers['down']['inputs'][0])
        self._vocabulary, self._dtype = self._model['head']['outputs'][0], model.dtype
        self._executor = ThreadPoolExecutor(max(self._threads - 1, 1), 'decode')
        self._helpers: list[Future[None]] = []

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
        if (piggyback is not None or not 0 < len(spans) <= SMALL_BATCH
                or not all(map(is_decode, spans))):
            return None
        hidden = self._embed(torch.tensor([s.tokens[0] for s in spans]))
        cos, sin = self._rotary(hidden, torch.tensor([[s.position for s in spans]]))
        blocks = [s.blocks[:s.cache_position // BLOCK_TOKENS + 1] for s in spans]
        tables = np.zeros((len(spans), max(map(len, blocks))), np.int64)
        for table, own in zip(tables, blocks, strict=True):
            table[:len(own)] = own
        logits = torch.empty(len(spans), self._vocabulary)
        self._run_in_threads(
            logits.numpy(), array(hidden),
            tuple(array(hidden.new_empty(len(spans), width)) for width in self._widths),
            array(cos[0]), array(sin[0]), tables,
            np.array([s.cache_position + 1 for s in spans]),
            np.array([s.adapter_slots[0] for s in spans]), self._layers, self._model,
            np.zeros((2, cpu_kernels.stages(len(self._layers))), np.int64))
        wanted = [i for i, s in enumerate(spans) if s.wants_logits]
        return logits if len(wanted) == len(spans) else logits[wanted]

    def _run_in_threads(self, *arguments: Any) -> None:
        """Run a pass in this thread, with the help of the others."""
        # This thread does not wait for one that begins late: that one will find no work left.
        self._helpers = [x for x in self._helpers if not x.done()]
        for _ in range(self._threads - 1 - len(self._helpers)):
            self._helpers.append(self._executor.submit(cpu_kernels.run_pass, *arguments))
        cpu_kernels.run_pass(*arguments)


# -- records -----------------------------------------------------------------------------


def layer_record(layer: Any, context: ForwardContext, threads: int) -> Record:
    """Return a ``LAYER``; raises :class:`OtherForm`."""
    if children(layer) != LAYER_PARTS:
        raise OtherForm
    attention, mlp = layer.self_attn, layer.mlp
    inside, index, cache = children(attention), attention.layer_idx, context.kv_cache
    scores = context.score_arguments[index]
    if (inside not in (ATTENTION, ATTENTION | HEAD_NORMS) or scores.changes_scores
            or children(mlp) != MLP or not is_silu(mlp.act_fn)):
        raise OtherForm
    assert cache is not None
    keys, values = cache.keys[index], cache.values[index]
    size = keys.shape[2]
    head_norms = [NO_NORM] * 2 if inside == ATTENTION else [
        norm_record(norm, size) for norm in (attention.q_norm, attention.k_norm)]
    return (
        norm_record(layer.input_layernorm),
        product_record(threads, attention.q_proj, attention.k_proj, attention.v_proj),
        *head_norms, getattr(attention, 'use_rope', True), address(keys), address(values),
        ENDLESS if scores.window is None else scores.window,
        size ** -0.5 if scores.scaling is None else scores.scaling,
        product_record(threads, attention.o_proj), norm_record(layer.post_attention_layernorm),
        product_record(threads, mlp.gate_proj, mlp.up_proj),
        product_record(threads, mlp.down_proj))


def norm_record(norm: Any, width: int | None = None) -> Record:
    """Return the ``NORM`` of a module, of this width if given; raises :class:`OtherForm`."""
    if (not is_norm(norm) or norm.weight.dim() != 1 or width not in (None, len(norm.weight))
            or norm_kind(norm) != {'relative': False, 'centered': False}):
        raise OtherForm
    return address(norm.weight), float(eps_of(norm))


def product_record(threads: int, *linears: nn.Module) -> Record:
    """Return the ``PRODUCT`` of the merged layer of exactly these; raises :class:`OtherForm`."""
    first = linears[0]
    if not isinstance(first, LoRALinear):
        raise OtherForm
    found = [(getattr(x, 'merged', None), getattr(x, 'index', None)) for x in linears]
    if found != [(first.merged, i) for i in range(len(first.merged.shards))]:
        raise OtherForm
    linear = first.merged
    return (
        *weight_fields(linear), address(linear.bias), linear.in_features, linear.out_features,
        -(-linear.out_features // (PARTS_PER_THREAD * threads)), address(linear.exact_a),
        address(linear.exact_b), linear.width)


def weight_fields(linear: MergedLinear) -> tuple[int, int, int]:
    """Return a weight's form, and the addresses of its values and scales."""
    if linear.int8 is not None:
        values, scales = linear.int8.tensors
        return INT8, address(values), address(scales)
    match linear.stored:
        case None:
            return DENSE, address(linear.weight), 0
        case PrepackedWeight(tensors=(weight,)):
            return DENSE, address(weight), 0
        case Int4Weight(rows=Tensor() as rows) if rows.shape[1] == GROUP_BYTES:
            return INT4, address(rows), 0
    raise OtherForm


def children(module: nn.Module) -> set[str]:
    """Return the names of a module's own modules."""
    return set(dict(module.named_children()))


def is_silu(activation: Any) -> bool:
    """Return whether a function is SiLU."""
    x = torch.linspace(-8.0, 8.0, 33)
    return torch.allclose(activation(x), nn.functional.silu(x))


def address(tensor: Tensor | None) -> int:
    """Return the address of a contiguous tensor; 0 if there is none, or no values in it."""
    if tensor is None or not tensor.numel():
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def array(tensor: Tensor) -> np.ndarray:
    """Return the memory of a tensor; bfloat16 as ``uint16``, which NumPy knows."""
    found: np.ndarray = (
        tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found
