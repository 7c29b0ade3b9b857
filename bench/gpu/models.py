# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Models with random weights in the shapes of well-known ones."""

from __future__ import annotations

from typing import Any

# hidden size, intermediate size, layers, heads, KV heads, vocabulary
SHAPES = {
    'tiny': (64, 128, 2, 4, 2, 49152),
    '0.5b': (896, 4864, 24, 14, 2, 151936),
    '1b': (2048, 8192, 16, 32, 8, 128256),
    '3b': (3072, 8192, 28, 24, 8, 128256),
    '8b': (4096, 14336, 32, 32, 8, 128256),
}
WEIGHTS = ('bfloat16', 'int4')
RANK = 8


def random_model(shape: str, device: str) -> Any:
    """Return a transformers model of the shape with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        max_position_embeddings=32768, tie_word_embeddings=shape != '8b', eos_token_id=None,
        pad_token_id=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def packed(base: Any, weights: str) -> tuple[Any, Any, list[str]]:
    """
    Return a packed model, its linear layers in ``weights``, and its adapters.

    Also returns which kernels of the package it can't use, and why.
    """
    import torch

    from mace_ros.model.fused_check import use_fused_layers
    from mace_ros.model.int4 import Int4Weight, quantizable, quantize
    from mace_ros.model.int4_kernels import find_kernel
    from mace_ros.model.int4_limit import with_measured_limit
    from mace_ros.model.lora_manager import LoRAManager
    from mace_ros.model.lora_mapping import FIRST_SERVED_SLOT
    from mace_ros.model.packing import pack
    from mace_ros.model.paged_check import use_paged_attention

    model = pack(base, kv_tokens=4096)
    if weights == 'int4':
        kernel = with_measured_limit(find_kernel(model.device, torch.bfloat16))
        for layer in model.linears:
            if quantizable(layer.weight):
                layer.store(Int4Weight.of(quantize(layer.weight, dtype=kernel.dtype), kernel))
    lora = LoRAManager(model.linears, targets='all-linear', rank=RANK, alpha=16.0, slots=2)
    lora.write_slot(FIRST_SERVED_SLOT)
    reason = use_paged_attention(model)
    return model, lora, [f'paged attention: {reason}'] * bool(reason) + use_fused_layers(model)
