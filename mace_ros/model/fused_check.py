# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The check, on the device itself, that fused parts of layers compute what plain ones compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TypeAlias

import torch
from torch import Tensor

from mace_ros.model.attention import whole_sequences
from mace_ros.model.checked_passes import checked_passes, random_ids
from mace_ros.model.cpu_decode_check import DTYPES as COMPILED_DTYPES
from mace_ros.model.fused_experts import fused_experts
from mace_ros.model.fused_layers import fused_norms, fused_rotary, FusedChunks, FusedLoRA
from mace_ros.model.graph_check import (
    kernel_limit,
    largest_difference,
    relative_error,
    routes_tokens,
    SAMPLES,
)
from mace_ros.model.graphs import FusedPart
from mace_ros.model.mixed_lora import add_update
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.self_check import row_errors
from mace_ros.model.spans import PiggybackSpans, Span

# Of the update of an adapter, relative: in 16 bits it is rounded twice.
MAX_ERROR, MAX_ERROR_FP32 = 0.02, 1e-3
TOKENS = (1, 5, 40)     # of passes that mix adapters: part of a tile, and several
TRAINED_TOKENS = 24     # of a sequence that is computed as in training

# Takes a model, and returns a part of it.
MakePart: TypeAlias = Callable[[PackedModel], FusedPart]
# Returns the relative error of a part.
ErrorOf: TypeAlias = Callable[[PackedModel, FusedPart], float]
PARTS: tuple[MakePart, ...] = (fused_norms, fused_rotary, fused_experts, FusedChunks, FusedLoRA)


def use_fused_layers(model: PackedModel) -> list[str]:
    """
    Let layers take fewer kernels, if the device can.

    Returns a line for each part for which it can't. Overwrites KV blocks, so call it before the
    first request, after the adapter slots were allocated, and before graphs are captured.
    """
    if model.device.type == 'cpu':
        return _use_compiled_layers(model)
    if find_spec('triton') is None:
        return ['Triton is not installed']
    return [reason for make in PARTS if (reason := use_part(model, make))]


def _use_compiled_layers(model: PackedModel) -> list[str]:
    if find_spec('numba') is None or model.dtype not in COMPILED_DTYPES:
        return []
    try:
        from mace_ros.model.cpu_layers import compiled_norms, compiled_rotary  # needs Numba
    except Exception as failure:    # of Numba or its compiler
        return [_first_line(failure)]
    return [reason for make in (compiled_norms, compiled_rotary)
            if (reason := use_part(model, make, trained_difference))]


def difference(model: PackedModel, part: FusedPart) -> float:
    """
    Return the largest relative difference that the kernels of ``part`` make to logits.

    Leaves it in use.
    """
    def run(spans: Sequence[Span], piggyback: PiggybackSpans | None, *, used: bool) -> Tensor:
        if used:
            part.use()
        else:
            part.use_plain()
        return model.run_plainly(spans, piggyback)

    return largest_difference(model, lambda seed: checked_passes(model, seed),
                              partial(run, used=False), partial(run, used=True))[0]


def use_part(model: PackedModel, make: MakePart, error_of: ErrorOf = difference) -> str:
    """Use a part if the model has it and it is right; return why not, if it is wrong."""
    try:
        part = make(model)
    except Exception as failure:    # of a family's own code, which it tries on random values
        return f'{make.__name__}: {_first_line(failure)}'
    if not part.applies:
        return ''
    if isinstance(part, FusedLoRA):
        most = MAX_ERROR_FP32 if model.dtype == torch.float32 else MAX_ERROR
        return use_if_right(model, part, lambda _: update_error(model), most)
    return use_if_right(model, part, partial(error_of, model), kernel_limit(model))


def use_if_right(model: PackedModel, part: FusedPart, error_of: Callable[[FusedPart], float],
                 most: float) -> str:
    """Use ``part`` if its error is at most ``most``; return why not."""
    try:
        error = error_of(part)
    except Exception as failure:    # of Triton's compilers: no C compiler, no kernel for a GPU
        part.undo()
        model.clear()
        return f'{part.name}: {_first_line(failure)}'
    if error > most:
        part.undo()
        return f'{part.name}: off by {error:.2g} (relative)'
    part.use()
    model.fused_parts.append(part)
    return ''


def trained_difference(model: PackedModel, part: FusedPart) -> float:
    """
    Return the largest relative difference that ``part`` makes to logits and to a gradient.

    They are those of a sequence as in training, and the gradient that of the first layer's input.
    """
    def train(seed: int, use: Callable[[], None]) -> tuple[Tensor, Tensor]:
        use()
        return _train(model, seed)

    # Rounding may route a token to another expert, but not in every sample.
    return min(max(error for ours, theirs in zip(
        train(seed, part.use), train(seed, part.use_plain), strict=True)
        for error in row_errors(ours, theirs))
        for seed in range(SAMPLES if routes_tokens(model) else 1))


def _train(model: PackedModel, seed: int) -> tuple[Tensor, Tensor]:
    """Return logits, and the gradient of the first layer's input; both begin with ``[tokens]``."""
    tokens = min(TRAINED_TOKENS, model.context_length)
    with torch.no_grad(), model.training(whole_sequences((tokens,), model.device)):
        first, calls = model.shell.call_layers(
            model.tensor([random_ids(model, tokens, seed)]), model.tensor([[*range(tokens)]]))
        with torch.enable_grad():
            y = run_layer(model.layers[0], first.requires_grad_(), calls[0])
        given = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        gradient, = torch.autograd.grad(y, first, given)
        hidden = y.detach()
        for layer, call in zip(model.layers[1:], calls[1:], strict=True):
            hidden = run_layer(layer, hidden, call)
        return model.shell.logits(hidden[0]).float(), gradient[0].float()


def update_error(model: PackedModel) -> float:
    """Return the largest relative error of the update of random tokens in layers of each shape."""
    shapes = {(x.in_features, x.out_features, x.width) for x in model.linears if x.width}
    slots = model.lora_mapping.slots
    generator = torch.Generator(model.device).manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)

    errors = [0.0]
    for inputs, outputs, width in sorted(shapes):
        a, b = values(slots * width, inputs) * inputs ** -0.5, values(slots * width, outputs)
        for tokens in TOKENS:
            x = values(tokens, inputs)
            token_slots = (torch.arange(tokens, device=model.device) + 1) % slots
            found = add_update(values(tokens, outputs).zero_(), x, a, b, token_slots, width)
            errors.append(relative_error(
                found.float(), exact_update(x, a, b, token_slots, width)))
    return max(errors)


def exact_update(x: Tensor, slots_a: Tensor, slots_b: Tensor, token_slots: Tensor,
                 width: int) -> Tensor:
    """Return what :func:`add_update` adds, ``[tokens, out]`` in fp32, by plain products."""
    low = (x.float() @ slots_a.float().t()).view(len(x), -1, width)
    every = torch.arange(low.shape[1], device=x.device)
    own = (token_slots[:, None] == every) & (every > 0)
    return low.masked_fill(~own[:, :, None], 0.0).view(len(x), -1) @ slots_b.float()


def _first_line(failure: Exception) -> str:
    return f'{type(failure).__name__}: {failure}'.partition('\n')[0]
