# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The check, on the CPU itself, that compiled decode passes compute the model's own logits."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from mace_ros.model.checked_passes import random_adapter, random_ids
from mace_ros.model.fused_layers import fused_norms, fused_rotary
from mace_ros.model.graph_check import kernel_limit
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.self_check import row_errors
from mace_ros.model.spans import BLOCK_TOKENS, Span

if TYPE_CHECKING:
    from mace_ros.model.cpu_decode import CpuDecode

DTYPES = (torch.float32, torch.bfloat16)    # those that the kernels know
# Prompts of the check: their tokens, which end within a block or at its end, their adapter slots,
# and whether they come late in a long sequence, of which earlier tokens were dropped. Some models
# compute late tokens in another way.
PROMPTS = (23, FIRST_SERVED_SLOT, False), (15, BASE_SLOT, False), (12, FIRST_SERVED_SLOT, True)


def use_cpu_decode(model: PackedModel) -> str:
    """
    Let one compiled function compute passes of decode rows, if the device is a CPU.

    Returns why not; an empty string if all is well, or if the model has another form than Llama's.
    The first call on a machine compiles it. Overwrites KV blocks, so call it before the
    first request, and after the adapter slots were allocated.
    """
    if model.device.type != 'cpu' or model.dtype not in DTYPES:
        return ''
    if find_spec('numba') is None:
        return 'Numba is not installed'
    try:
        from mace_ros.model.cpu_decode import CpuDecode  # needs Numba

        decode = CpuDecode.of(model)
        if decode is None:
            return ''
        error = difference(model, decode)
    except Exception as failure:    # of Numba or its compiler, or of a family's own code
        reason = str(failure).partition('\n')[0]
        return f'{type(failure).__name__}: {reason}'
    if error > kernel_limit(model):
        return f'its logits are off by {error:.2g} (relative)'
    model.fast_passes = decode
    return ''


def difference(model: PackedModel, decode: CpuDecode) -> float:
    """
    Return the largest relative difference of logits by ``decode`` from those by plain operations.

    These round where the kernels do: once. A model's own code rounds more often, which makes other
    logits where keys are large.
    """
    prompts, rows = _spans(model)
    parts = fused_norms(model), fused_rotary(model)
    for part in parts:
        part.use_plain()
    try:
        with random_adapter(model, FIRST_SERVED_SLOT):
            model.run_plainly(prompts)
            # First: it must not find the rows' keys written. A row alone takes other kernels.
            found = [decode.run(some, None) for some in ([rows[0]], rows)]
            expected = [model.run_plainly(some) for some in ([rows[0]], rows)]
    finally:
        for part in parts:
            part.undo()
    return max(error for ours, theirs in zip(found, expected, strict=True) if ours is not None
               for error in row_errors(ours, theirs))


def _spans(model: PackedModel) -> tuple[list[Span], list[Span]]:
    """Return prompts, and the decode rows that follow them."""
    prompts, rows, first = [], [], 0
    for seed, (length, slot, late) in enumerate(PROMPTS):
        tokens = min(length, model.context_length - 1)
        dropped = (model.context_length - tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS * late
        blocks = range(first, first + tokens // BLOCK_TOKENS + 1)
        ids, first = random_ids(model, tokens + 1, seed), blocks.stop
        prompts.append(Span(ids[:tokens], dropped, blocks, slot, False, dropped))
        rows.append(Span(ids[tokens:], dropped + tokens, blocks, slot, True, dropped))
    return prompts, rows
