# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""How much memory passes and fine-tune steps of a model take: counted, not guessed."""

from __future__ import annotations

import torch
from torch import Tensor

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.memory.budget import Footprint
from mace_ros.model.attention import whole_sequences
from mace_ros.model.cpu_attention import are_few, LONGEST
from mace_ros.model.lora import LoRAManager
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel

# What products of torch 2.13 keep for each thread, as mallinfo2() tells on a Xeon with AMX.
KERNEL_BYTES = 4_500_000
LENGTHS = (16, 64, 256, LONGEST, 512)     # of the sequences of which a layer's graph is counted


def measure_footprint(model: PackedModel, bank: LoRAManager) -> Footprint:
    """Return the footprint; runs a few layers forward under the master weights."""
    cache = model.attention.cache
    assert cache is not None
    lengths = sorted({min(n, model.context_length) for n in LENGTHS})
    masters = sum(p.nbytes for p in bank.parameters())
    config = model.model.config.get_text_config()
    window = getattr(config, 'sliding_window', None) or model.context_length
    return Footprint(
        kv_block=cache.slot_bytes * BLOCK_TOKENS,
        # With AdamW's two moments, what a job began with, the gradients and those of a step's
        # earlier parts, or what was trained while other weights are in its place, and what the
        # first job adds.
        adapters=bank.nbytes + 6 * masters + bank.spared_nbytes,
        layers=len(model.layers), hidden_token=config.hidden_size * model.dtype.itemsize,
        logits_row=config.vocab_size * 4,
        graphs=tuple((n, _graph_bytes(model, n)) for n in lengths),
        packed=(model.device.type != 'cpu' or are_few(LONGEST, model.dtype, model.device)
                or window < model.context_length),
        kernels=KERNEL_BYTES * torch.get_num_threads() if model.device.type == 'cpu' else 0)


def _graph_bytes(model: PackedModel, tokens: int) -> int:
    """Return what a layer keeps for its backward; of the first, middle and last, the most."""
    row = whole_sequences((tokens,), model.device)
    ids = model.tensor([[0] * tokens])
    last = len(model.layers) - 1
    most = 0
    with model.training(row):
        with torch.no_grad():
            hidden, calls = model.skeleton.call_layers(ids, model.tensor([list(range(tokens))]))
        for index in {0, last // 2, last}:
            # The storages themselves: of one that is let go, the address may be given again.
            kept: dict[int, torch.UntypedStorage] = {}

            # Not the tensor in its place: a graph that holds its own output is for ever.
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
