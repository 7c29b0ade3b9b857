# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Compare the fast paths of a packed model with plain ones, on the device where it is."""

from __future__ import annotations

from typing import Any


def errors(model: Any) -> list[tuple[str, float]]:
    """Return the relative errors of fast paths against plain ones, by the path."""
    import torch

    from mace_ros.model import fused_check, paged_check
    from mace_ros.model.batch_descriptor import BatchDescriptor
    from mace_ros.model.checked_passes import checked_passes
    from mace_ros.model.cuda_graph_runner import CudaGraphRunner
    from mace_ros.model.graph_check import largest_error

    fixed = CudaGraphRunner(model)      # the same code without a graph
    for each in checked_passes(model):
        fixed.prepare(BatchDescriptor.of(each.spans, each.piggyback))
    found = [('fixed addresses: {1}', largest_error(model, fixed))]
    if model.fast_passes is not None:
        found.append(('graphs: {1}', largest_error(model, model.fast_passes)))
    rows = [(name.format(*worst), worst[0]) for name, worst in found]
    rows += [(f'gradients under graphs: {layers.tokens} tokens', layers.error(model))
             for layers in model.graphed_layers]
    if model.context.paged is not None:
        rows.append(('paged attention', paged_check.difference(model, model.context.paged)))
    for part in model.fused_parts:
        rows.append((part.name, fused_check.difference(model, part)))
    if model.lora_mapping.fused:
        rows.append(('update of mixed adapters', fused_check.update_error(model)))
    for tokens in (1, 16, 100):
        for layer in model.linears[:4]:
            if layer.stored is not None:
                x = torch.randn(tokens, layer.in_features, device=model.device).to(model.dtype)
                exact = x.float() @ layer.stored.dense(model.dtype).float().t()
                error = (layer.stored.product(x).float() - exact).norm() / exact.norm()
                rows.append((f'product of {tokens}, {layer.name.rpartition(".")[2]}',
                             float(error)))
    return rows
