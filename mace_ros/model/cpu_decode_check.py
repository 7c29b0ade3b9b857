# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The check, on the CPU itself, that compiled decode passes compute the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mace_ros.model.checked_passes import checked_passes, random_adapter
from mace_ros.model.fused_layers import fused_norms, fused_rotary
from mace_ros.model.graph_check import kernel_limit, largest_difference
from mace_ros.model.lora_mapping import FIRST_SERVED_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import PiggybackSpans, Span

if TYPE_CHECKING:
    from mace_ros.model.cpu_decode import CpuDecode

DTYPES = (torch.float32, torch.bfloat16)    # those that the kernels know


def use_cpu_decode(model: PackedModel) -> str:
    """
    Let decode rows take a few compiled calls in each layer, if the device is a CPU.

    Returns why not; an empty string if all is well, or if the model has another form than Llama's.
    The first call on a machine compiles the kernels. Overwrites KV blocks, so call it before the
    first request, and after the adapter slots were allocated.
    """
    if model.device.type != 'cpu' or model.dtype not in DTYPES:
        return ''
    if find_spec('numba') is None:
        return 'Numba is not installed'
    from mace_ros.model.cpu_decode import CpuDecode, OtherForm  # needs Numba

    try:
        decode = CpuDecode(model)
        error = difference(model, decode)
    except OtherForm:
        return ''
    except Exception as failure:    # of Numba's compiler, or of a family's own code
        return f'{type(failure).__name__}: {str(failure).splitlines()[0]}'
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
    def compiled(spans: Sequence[Span], piggyback: PiggybackSpans | None) -> Tensor | None:
        logits = decode.run(spans, piggyback)
        if logits is None:      # later passes read its keys and values
            model.run_plainly(spans, piggyback)
        return logits

    parts = fused_norms(model), fused_rotary(model)
    for part in parts:
        part.use_plain()
    try:
        with random_adapter(model, FIRST_SERVED_SLOT):
            return largest_difference(model, lambda seed: checked_passes(model, seed),
                                      model.run_plainly, compiled, samples=1)[0]
    finally:
        for part in parts:
            part.undo()
