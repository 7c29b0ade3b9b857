# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Along which directions the inputs of adapted layers usually lie.

An update that does not look along them leaves answers alone that have nothing to do with
it: the idea of null-space editing (AlphaEdit, Fang et al. 2024; LoRA-Null, Tang et al.
2025). The directions come from a randomised range finder (Halko, Martinsson and Tropp
2011), for which each input is seen once and none is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mace_ros.execution.lora import LinearGroup

OVERSAMPLING = 8


class Sketch:
    """The main directions of the inputs that each group of layers was shown."""

    def __init__(self, directions: int) -> None:
        """Look for so many directions."""
        self._directions = directions
        self._probes: dict[int, Tensor] = {}
        self._sums: dict[LinearGroup, Tensor] = {}

    @torch.no_grad()
    def watch(self, group: LinearGroup, x: Tensor) -> None:
        """Take in inputs, ``[..., in]``."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        width = x.shape[1]
        if width not in self._probes:
            generator = torch.Generator().manual_seed(width)
            self._probes[width] = torch.randn(
                width, min(self._directions + OVERSAMPLING, width), generator=generator,
            ).to(x.device)
        seen = x.t() @ (x @ self._probes[width])
        known = self._sums.get(group)
        self._sums[group] = seen if known is None else known.add_(seen)

    def directions(self) -> Iterator[tuple[LinearGroup, Tensor]]:
        """Yield each group with an orthonormal ``[in, directions]``; some milliseconds each."""
        for group, seen in self._sums.items():
            # Not all of them, so that there is always something left to learn along.
            most = min(self._directions, seen.shape[0] // 2)
            basis, _, _ = torch.linalg.svd(seen, full_matrices=False)
            yield group, basis[:, :most].contiguous()
