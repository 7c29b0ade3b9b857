# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Convert a transformers model to a packed model, and check that it still computes the same."""

from __future__ import annotations

from collections.abc import Mapping
import math

import torch
from transformers import PreTrainedModel

from mace_ros.model import self_check
from mace_ros.model.architectures import check_supported, context_length, UnsupportedModel
from mace_ros.model.attention import whole_sequences
from mace_ros.model.cpu_matmul import prepacks
from mace_ros.model.hardware import avoid_cudnn_attention
from mace_ros.model.int4 import Int4Weight
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import BLOCK_TOKENS


def pack(model: PreTrainedModel, *, kv_tokens: int, kv_bytes: float = math.inf,
         int8: bool = False, int4: Mapping[str, Int4Weight] | None = None) -> PackedModel:
    """
    Convert ``model`` in place.

    The KV cache holds ``kv_tokens``, or fewer if they need more than ``kv_bytes``. With
    ``int8``, the weights of the linear layers are rounded to 8 bits. With ``int4``, each merged
    linear layer gets the 4-bit weight under its name, which is its own but for rounding. The other
    layers are rounded to 8 bits on a CPU, and unchanged elsewhere.

    Raises :class:`UnsupportedModel` for an unsupported architecture, and if packed passes or
    training layers do not reproduce the model's own logits on a few random tokens.
    """
    if model.device.type == 'cuda':
        avoid_cudnn_attention()
    check_supported(model)
    model.eval().requires_grad_(False)
    context = context_length(model)
    with self_check.short_windows(model, context):
        samples = self_check.random_samples(model, context)
        reference = self_check.reference_logits(model, samples)
    packed = PackedModel(model)
    with self_check.failing_by_name(model.config.model_type):
        shapes = _kv_shapes(packed)
    with self_check.short_windows(model, context):
        packed.allocate_kv_cache(shapes, self_check.KV_BLOCKS)
        self_check.compare(packed, samples, reference)
    if int8:     # only now, because the check is about the code and not about rounding
        packed.round_to_int8()
    elif int4:
        packed.use_int4(int4)
    if not int4 and prepacks(packed.device, packed.dtype):
        packed.prepack()
    block_bytes = packed.kv_cache.slot_bytes * BLOCK_TOKENS
    packed.allocate_kv_cache(
        shapes, int(min(-(-kv_tokens // BLOCK_TOKENS), max(kv_bytes // block_bytes, 1))))
    if packed.device.type == 'cuda':    # the separate weights of layers that were merged
        torch.cuda.empty_cache()
    return packed


def _kv_shapes(packed: PackedModel) -> list[tuple[int, int, int]]:
    """Return each layer's KV heads, key size and value size, found by running one token."""
    context, kind = packed.context, packed.model.config.model_type
    shapes = context.kv_shapes = {}
    context.metadata = whole_sequences((1,), packed.device)
    with torch.no_grad():
        packed.model(input_ids=packed.tensor([[0]]), position_ids=packed.tensor([[0]]),
                     use_cache=False, logits_to_keep=packed.tensor([]))
    context.kv_shapes = None
    packed.clear()
    if sorted(shapes) != list(range(len(packed.layers))):
        raise UnsupportedModel(
            f'{kind}: only layers {sorted(shapes)} of '
            f'{len(packed.layers)} use the attention interface with keys of their own')
    if context.unsupported:
        raise UnsupportedModel(
            f'{kind}: its attention needs {", ".join(sorted(context.unsupported))}, '
            'which packed passes do not support')
    return [shapes[i] for i in range(len(packed.layers))]
