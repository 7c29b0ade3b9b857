# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The check, on the CPU itself, that compiled decode passes compute the model's own logits."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import islice
import math
import platform
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
PROMPTS = ((23, FIRST_SERVED_SLOT, False), (15, BASE_SLOT, False), (12, FIRST_SERVED_SLOT, True),
           (40, BASE_SLOT, False), (7, FIRST_SERVED_SLOT, False))


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
        if not reads_float16():
            return 'the CPU has no instructions for float16'
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


def reads_float16() -> bool:
    """Return whether the CPU has instructions for float16: LLVM would call a missing library."""
    from llvmlite import binding  # comes with Numba

    return platform.machine() != 'x86_64' or bool(binding.get_host_cpu_features().get('f16c'))


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
            # A row alone, two of them and more take other ways through the kernels. The compiled
            # passes come first: they must not find the rows' keys written.
            passes = [rows[i:] for i in range(len(rows))]
            found = [decode.run(each, None) for each in passes]
            expected = [model.run_plainly(each) for each in passes]
    finally:
        for part in parts:
            part.undo()
    return max(math.inf if ours is None else max(row_errors(ours, theirs))
               for ours, theirs in zip(found, expected, strict=True))


def _spans(model: PackedModel) -> tuple[list[Span], list[Span]]:
    """Return prompts, and the decode rows that follow them."""
    prompts, rows = [], []
    # The blocks of a sequence lie in any order in the cache.
    free = iter(range(sum(n // BLOCK_TOKENS + 1 for n, *_ in PROMPTS))[::-1])
    for seed, (length, slot, late) in enumerate(PROMPTS):
        tokens = min(length, model.context_length - 1)
        unused = (model.context_length - tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        dropped = unused if late else 0
        blocks = list(islice(free, tokens // BLOCK_TOKENS + 1))
        ids = random_ids(model, tokens + 1, seed)
        prompts.append(Span(ids[:tokens], dropped, blocks, slot, False, dropped))
        rows.append(Span(ids[tokens:], dropped + tokens, blocks, slot, True, dropped))
    return prompts, rows
