# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for CUDA graphs on a CPU, where a replay computes again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mace_ros.model import cuda_graph_runner, graphed_layers

Results = Sequence[Tensor | None] | None


class Pool:
    """Memory that graphs share: the results of each graph, in the order of the captures."""

    def __init__(self) -> None:
        self.results: list[Results] = []


def fake_graph(compute: Callable[[], Results], stream: object,
               pool: Pool) -> tuple[Callable[[], None], Results]:
    """
    Take the place of ``captured``: each replay overwrites the tensors of the first result.

    It also overwrites the results of all graphs captured later in the same pool: these may lie
    where this graph has its intermediate values.
    """
    result = compute()
    pool.results.append(result)
    captures = len(pool.results)

    def replay() -> None:
        overwrite(pool.results[captures:])
        for old, new in zip(result or (), compute() or (), strict=True):
            if old is not None:
                old.copy_(new)

    return replay, result


def overwrite(results: Sequence[Results]) -> None:
    """Fill tensors with what no computation gives."""
    for result in results:
        for x in result or ():
            if x is not None:
                x.fill_(torch.nan)


def with_static_output(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a layer whose outputs share their memory, as those of a graph do."""
    static: list[Tensor] = []

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            if not static:
                static.append(torch.empty_like(y))
            return static[0].copy_(y).detach()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    return lambda *args: Replayed.apply(layer(*args))


def use_fake_graphs(patch: pytest.MonkeyPatch) -> None:
    """Let passes and layers of fine-tune steps be captured on a CPU."""
    def graphed(callables: Any, *_: object, **__: object) -> Any:
        return [with_static_output(layer) for layer in callables]

    patch.setattr(torch.cuda, 'mem_get_info', lambda: (1, 1))
    patch.setattr(torch.cuda, 'graph_pool_handle', Pool)
    patch.setattr(torch.cuda, 'Stream', lambda: None)
    patch.setattr(torch.cuda, 'make_graphed_callables', graphed)
    patch.setattr(graphed_layers, 'capturing', nullcontext)
    for module in (cuda_graph_runner, graphed_layers):
        patch.setattr(module, 'captured', fake_graph)
