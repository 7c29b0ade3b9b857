# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Measure how much memory passes and fine-tune steps of a model take."""

from __future__ import annotations

import torch
from torch import Tensor

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.memory.budget import Footprint, head_rows, PREFIX_TOKENS
from mace_ros.model.attention import whole_sequences
from mace_ros.model.cpu_attention import MAX_TOKENS, prefers_one_mask
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.paged_attention import row_bytes

# Workspace that products of torch 2.13 keep per thread, by mallinfo2() on a Xeon with AMX.
KERNEL_BYTES = 4_500_000
# Of a token and a key while a mask is built: their distance, and what is compared.
MASK_BYTES = 8 + 3
LENGTHS = (16, 64, 256, MAX_TOKENS, 512)     # of the sequences whose layer graphs are measured


def measure_footprint(model: PackedModel, lora: LoRAManager) -> Footprint:
    """Return the footprint; runs a few layers forward under the training slot."""
    lengths = sorted({min(n, model.context_length) for n in LENGTHS})
    masters = sum(p.nbytes for p in lora.parameters())
    config = model.model.config.get_text_config()
    window = getattr(config, 'sliding_window', None) or model.context_length
    return Footprint(
        kv_block=model.kv_cache.slot_bytes * BLOCK_TOKENS,
        # Six copies of the master weights: AdamW's two moments, the weights at the job's start,
        # gradients, accumulated gradients or swapped-out weights, and what the first job adds.
        adapters=(lora.nbytes + 6 * masters + lora.null_space_nbytes
                  + PREFIX_TOKENS * model.kv_cache.slot_bytes),
        layers=len(model.layers), hidden_token=config.hidden_size * model.dtype.itemsize,
        logits_row=config.vocab_size * 4,
        graphs=tuple((n, _graph_bytes(model, n)) for n in lengths),
        packed=(model.device.type != 'cpu'
                or prefers_one_mask(MAX_TOKENS, model.dtype, model.device)
                or window < model.context_length),
        kernels=model.workspace_nbytes + (
            KERNEL_BYTES * torch.get_num_threads() if model.device.type == 'cpu' else 0),
        decode_row=0 if model.context.paged is None else max(
            row_bytes(config.num_attention_heads, values.shape[2], values.itemsize)
            for values in model.kv_cache.values),
        attended_key=0 if model.device.type == 'cpu' else attended_key_bytes(model),
        head_rows=head_rows(model.device.type))


def attended_key_bytes(model: PackedModel) -> int:
    """Return what a token of a chunk takes on a GPU for each key of the pass, in bytes."""
    config, size = model.model.config.get_text_config(), model.dtype.itemsize
    heads = config.num_attention_heads
    if model.context.changes_scores and not model.context.block_kernel:
        return heads * max(3 * size, 2 * size + 4)      # scores, also in fp32
    # The mask for each query head that shares a KV head, and twice as PyTorch adds it to scores:
    # the second time padded.
    groups = heads // min(keys.shape[1] for keys in model.kv_cache.keys)
    return max(1 + groups * (1 + 2 * size), MASK_BYTES)


def _graph_bytes(model: PackedModel, tokens: int) -> int:
    """Return the most that the first, middle or last layer keeps for its backward, in bytes."""
    metadata = whole_sequences((tokens,), model.device)
    if model.device.type != 'cpu':
        metadata.lengths = ()       # the sequences of a step attend behind one mask there
    ids = model.tensor([[0] * tokens])
    last = len(model.layers) - 1
    most = 0
    with model.training(metadata):
        with torch.no_grad():
            hidden, calls = model.shell.call_layers(ids, model.tensor([list(range(tokens))]))
        for index in {0, last // 2, last}:
            # Keep the storages alive: the address of a freed one may be allocated again.
            kept: dict[int, torch.UntypedStorage] = {}

            # Save an empty tensor instead: a graph that holds its own output is never freed.
            def count(tensor: Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> Tensor:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage
                return torch.empty(0)

            x = hidden.detach().requires_grad_()
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(
                    count, lambda empty: empty):
                y = run_layer(model.layers[index], x, calls[index])
            weights = {t.untyped_storage().data_ptr()
                       for t in (*model.model.parameters(), *model.model.buffers())}
            most = max(most, y.nbytes + sum(
                storage.nbytes() for address, storage in kept.items() if address not in weights))
    return most
