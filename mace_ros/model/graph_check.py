# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The check, on the device itself, that passes on fixed addresses compute what eager ones compute.

A wrong kernel or driver may cost speed, but never an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mace_ros.model.checked_passes import (
    checked_passes,
    CheckedPass,
    Compute,
    passes_of_shapes,
    random_adapter,
)
from mace_ros.model.cuda_graph_runner import CudaGraphRunner
from mace_ros.model.lora_mapping import FIRST_SERVED_SLOT, TRAINING_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.self_check import row_errors
from mace_ros.model.spans import PiggybackSpans, Span

SAMPLES = 3
# Relative, of a row of logits and of gradients. In 16 bits, sums differ with the shape of a
# product, and other kernels also round in other places.
MAX_ERROR, MAX_KERNEL_ERROR, MAX_ERROR_FP32 = 0.05, 0.1, 1e-3


def largest_error(model: PackedModel, graphs: CudaGraphRunner) -> tuple[float, str]:
    """
    Return the largest relative error of a row that ``graphs`` compute, and in which pass.

    Passes that they do not cover, or for which eager passes lack memory, are left out; the error
    is infinite if no pass is left. Overwrites the first KV blocks. Raises ``RuntimeError`` if
    ``graphs`` do not find the best tokens.
    """
    def plain(spans: Sequence[Span], piggyback: PiggybackSpans | None) -> Tensor | None:
        try:
            return model.run_plainly(spans, piggyback)
        except torch.OutOfMemoryError:
            return None

    def captured(spans: Sequence[Span], piggyback: PiggybackSpans | None) -> Tensor | None:
        logits = graphs.run(spans, piggyback)
        if logits is None:
            plain(spans, piggyback)     # later passes read its keys and values
            return None
        if graphs.best_tokens is None or not torch.equal(logits.argmax(-1), graphs.best_tokens):
            raise RuntimeError('the best tokens are not those of the largest logits')
        return logits

    def passes(seed: int) -> Iterator[CheckedPass]:
        yield from checked_passes(model, seed)
        yield from passes_of_shapes(model, graphs, graphs.limits, seed)

    with random_adapter(model, FIRST_SERVED_SLOT), random_adapter(model, TRAINING_SLOT):
        return largest_difference(model, passes, plain, captured)


def largest_difference(model: PackedModel, passes: Callable[[int], Iterable[CheckedPass]],
                       plain: Compute, fast: Compute) -> tuple[float, str]:
    """
    Return the largest relative difference of a row of the results, and the name of its pass.

    ``passes`` maps a seed to passes. It is called for each of the two ways to compute, so that
    each reads the keys and values that it has written itself. Returns infinity and an empty name
    if no pass was computed in both ways.
    """
    errors: dict[str, list[float]] = {}
    for seed in range(SAMPLES):
        expected = {each.name: each.results(plain) for each in passes(seed)}
        found = {each.name: each.results(fast) for each in passes(seed)}
        for name, ours in found.items():
            theirs = expected[name]
            if ours is not None and theirs is not None:
                errors.setdefault(name, []).append(max(
                    (e for pair in zip(ours, theirs, strict=True) for e in row_errors(*pair)),
                    default=0.0))
    # Rounding may route a token to another expert, but not in every sample.
    routes = routes_tokens(model)
    return max(((min(each) if routes else max(each), name) for name, each in errors.items()),
               default=(torch.inf, ''))


def routes_tokens(model: PackedModel) -> bool:
    """Return whether layers choose experts for each token, by the names of their modules."""
    return any('expert' in name or 'moe' in name for name, _ in model.model.named_modules())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ‖found - expected‖ / ‖expected‖; infinite if it is not a number."""
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    return error if error == error else torch.inf


def limit(model: PackedModel) -> float:
    """Return the largest error that rounding explains if the same kernels run."""
    return MAX_ERROR_FP32 if model.dtype == torch.float32 else MAX_ERROR


def kernel_limit(model: PackedModel) -> float:
    """Return the largest error that rounding explains if other kernels run."""
    return MAX_ERROR_FP32 if model.dtype == torch.float32 else MAX_KERNEL_ERROR
