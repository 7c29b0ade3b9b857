# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Measure how much memory passes and fine-tune steps of a model take."""

from __future__ import annotations

import torch
from torch import Tensor

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.memory.budget import Footprint, head_rows, PREFIX_TOKENS
from mace_ros.model.attention import GATHERED_KEYS, whole_sequences
from mace_ros.model.cpu_attention import MAX_TOKENS, prefers_one_mask
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.paged_attention import row_bytes
from mace_ros.model.spans import OBSERVATION_TOKENS

# Workspace that products of torch 2.13 keep per thread, by mallinfo2() on a Xeon with AMX.
KERNEL_BYTES = 4_500_000
# For each token and key: the masks of layers with and without a window, and the result of a
# comparison while a mask is built.
MASK_BYTES = 2 + 1
SLOT_BYTES = 8      # of a key: its slot, sequence or position
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
        attended_key=attended_key_bytes(model), observed_key=observed_key_bytes(model),
        key=key_bytes(model), **decode_bytes(model),
        head_rows=head_rows(model.device.type))


def attended_key_bytes(model: PackedModel) -> int:
    """Return what a token of a chunk takes for each key of the pass, in bytes."""
    size = model.dtype.itemsize
    if model.context.changes_scores and not model.context.block_kernel:
        return MASK_BYTES + scores_bytes(model)
    if model.device.type == 'cpu':      # the mask as PyTorch adds it to scores, and before padded
        return MASK_BYTES + size
    # The mask for each query head that shares a KV head, and twice as PyTorch adds it to scores:
    # the second time padded.
    return MASK_BYTES - 1 + query_heads(model) * (1 + 2 * size)


def query_heads(model: PackedModel) -> int:
    """Return the most query heads that share a KV head."""
    heads: int = model.model.config.get_text_config().num_attention_heads
    return heads // min(keys.shape[1] for keys in model.kv_cache.keys)


def scores_bytes(model: PackedModel) -> int:
    """Return what plain operations take for the scores of a token and a key, in bytes."""
    size = model.dtype.itemsize
    # Before, within and after the softcap; or before, within and after the softmax in fp32.
    each = max(3 * size, size + (8 if size < 4 else 4))
    return int(model.model.config.get_text_config().num_attention_heads) * each


def observed_key_bytes(model: PackedModel) -> int:
    """Return what it takes for each key to sum up attention, to choose what to prune."""
    size = max(keys.shape[2] for keys in model.kv_cache.keys)
    # Scores and the softmax's in fp32 of a KV head, their mask, and the head.
    return OBSERVATION_TOKENS * (query_heads(model) * 8 + 1) + 4 * size


def key_bytes(model: PackedModel) -> int:
    """Return what each key of a pass takes beside its copy, in bytes."""
    if model.device.type != 'cpu':
        return 3 * SLOT_BYTES
    # Values are padded to the size of keys; where 16 bits are multiplied in tiles, both are.
    padded = padded_bytes(model) if model.dtype.itemsize == 4 else (
        padded_bytes(model) + model.kv_cache.slot_bytes // len(model.layers))
    return 3 * SLOT_BYTES + padded


def padded_bytes(model: PackedModel) -> int:
    """Return the size of a token's values, padded to the size of its keys, in bytes."""
    cache = model.kv_cache
    return max((k[0].nbytes for k, v in zip(cache.keys, cache.values, strict=True)
                if v.shape[2] < k.shape[2]), default=0) if model.device.type == 'cpu' else 0


def decode_bytes(model: PackedModel) -> dict[str, int]:
    """Return the parts of a footprint that decode rows add while a layer attends."""
    heads = model.model.config.get_text_config().num_attention_heads
    if model.context.paged is not None:
        return {'decode_row': max(row_bytes(heads, values.shape[2], values.itemsize)
                                  for values in model.kv_cache.values)}
    copied = model.kv_cache.slot_bytes // len(model.layers) + padded_bytes(model)
    # Plain products of several rows copy their keys, or values, once more.
    plain = scores_bytes(model) + copied if model.context.changes_scores else 0
    return {'row_key': SLOT_BYTES + MASK_BYTES, 'gathered': GATHERED_KEYS * (copied + plain),
            'gathered_key': plain}


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
