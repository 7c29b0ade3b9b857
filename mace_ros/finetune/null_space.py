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

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mace_ros.model.lora import MergedLinear


class InputSubspace:
    """Finds along which directions the inputs lie mostly that each group was shown."""

    def __init__(self, count: Callable[[MergedLinear], int]) -> None:
        """Look for so many directions of a group's inputs."""
        self._count = count
        self._probes: dict[int, Tensor] = {}
        self._sums: dict[MergedLinear, Tensor] = {}

    @torch.no_grad()
    def watch(self, group: MergedLinear, x: Tensor) -> None:
        """Take in inputs, ``[..., in]``."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        width = x.shape[1]
        if width not in self._probes:
            generator = torch.Generator().manual_seed(width)
            self._probes[width] = torch.randn(
                width, self._count(group), generator=generator).to(x.device)
        seen = x.t() @ (x @ self._probes[width])
        known = self._sums.get(group)
        self._sums[group] = seen if known is None else known.add_(seen)

    def found(self) -> Iterator[tuple[MergedLinear, Tensor]]:
        """Yield each group with orthonormal directions, ``[in, some]``; milliseconds each."""
        while self._sums:
            group, seen = self._sums.popitem()
            if seen.isfinite().all():   # as with weights, what is no number must reach nothing
                yield group, torch.linalg.qr(seen).Q
