# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The main directions of the inputs of adapted layers.

An update without a component along them does not change responses to unrelated questions: the
idea of null-space editing (AlphaEdit, Fang et al. 2024; LoRA-Null, Tang et al. 2025). The
directions come from a randomised range finder (Halko, Martinsson and Tropp 2011), which sees
each input once and stores none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn, Tensor

from mace_ros.model.merged_linear import MergedLinear


class InputSubspace:
    """Estimates the subspace that the inputs of each observed layer mainly span."""

    def __init__(self, direction_count: Callable[[MergedLinear], int]) -> None:
        """``direction_count`` returns the number of directions to find for a layer."""
        self._direction_count = direction_count
        self._probes: dict[int, Tensor] = {}            # [in, directions], by input width
        self._sketches: dict[MergedLinear, Tensor] = {}     # [in, directions]

    @torch.no_grad()
    def observe(self, layer: nn.Module, x: Tensor) -> None:
        """Add inputs of a merged linear layer, ``[..., in]``."""
        assert isinstance(layer, MergedLinear)
        x = x.detach().reshape(-1, x.shape[-1]).float()
        width = x.shape[1]
        if width not in self._probes:
            generator = torch.Generator().manual_seed(width)
            self._probes[width] = torch.randn(
                width, self._direction_count(layer), generator=generator).to(x.device)
        sketch = x.t() @ (x @ self._probes[width])
        known = self._sketches.get(layer)
        self._sketches[layer] = sketch if known is None else known.add_(sketch)

    def bases(self) -> Iterator[tuple[MergedLinear, Tensor]]:
        """
        Yield each layer with an orthonormal basis, ``[in, directions]``; milliseconds each.

        Removes the layer from this object. A layer with inputs that are not finite is left out.
        """
        while self._sketches:
            layer, sketch = self._sketches.popitem()
            if sketch.isfinite().all():   # a NaN in the basis would reach the master weights
                yield layer, torch.linalg.qr(sketch).Q
