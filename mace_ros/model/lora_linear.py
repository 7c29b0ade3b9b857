# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Replace a model's ``nn.Linear`` modules by shards of merged linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn, Tensor

from mace_ros.model.lora_mapping import LoRAMapping
from mace_ros.model.merged_linear import MergedLinear

# Children of one module that always receive the same input tensor.
SHARED_INPUT = (('q_proj', 'k_proj', 'v_proj'), ('q_a_proj', 'kv_a_proj_with_mqa'),
                ('gate_proj', 'up_proj'))


class LoRALinear(nn.Module):
    """A shard of a :class:`MergedLinear` behind the interface of the ``nn.Linear`` it replaces."""

    def __init__(self, merged: MergedLinear, index: int) -> None:
        super().__init__()
        self.merged = merged
        self.index = index

    @property
    def weight(self) -> Tensor:
        """The layer's weight; some models read its dtype or device."""
        shard = self.merged.shards[self.index]
        return self.merged.weight[shard.start:shard.start + shard.size]

    def forward(self, x: Tensor) -> Tensor:
        """Return this layer's part of the merged output."""
        return self.merged.output(self.index, x)


def replace_linears(model: nn.Module, skip: Iterable[nn.Module],
                    mapping: LoRAMapping) -> list[MergedLinear]:
    """Replace every ``nn.Linear`` by a :class:`LoRALinear`, except the modules in ``skip``."""
    skipped = set(map(id, skip))
    merged = []
    for prefix, parent in list(model.named_modules()):
        linears = {name: child for name, child in parent.named_children()
                   if type(child) is nn.Linear and id(child) not in skipped}
        for names in _by_input(linears):
            merged.append(_merge(parent, prefix, {n: linears[n] for n in names}, mapping))
    return merged


def replace_head(model: nn.Module, head: nn.Module | None,
                 mapping: LoRAMapping) -> list[MergedLinear]:
    """Replace the output head by a :class:`LoRALinear`, if it is an ``nn.Linear``."""
    for prefix, parent in list(model.named_modules()):
        for name, child in parent.named_children():
            if child is head and type(child) is nn.Linear:
                return [_merge(parent, prefix, {name: child}, mapping)]
    return []


def _merge(parent: nn.Module, prefix: str, linears: Mapping[str, nn.Linear],
           mapping: LoRAMapping) -> MergedLinear:
    """Merge children of ``parent``, whose own name is ``prefix``, and put shards in their place."""
    merged = MergedLinear([f'{prefix}.{n}' if prefix else n for n in linears],
                          list(linears.values()), mapping)
    for index, name in enumerate(linears):
        setattr(parent, name, LoRALinear(merged, index))
    return merged


def _by_input(linears: Mapping[str, nn.Linear]) -> list[list[str]]:
    """Return the names grouped by common input."""
    left = dict(linears)
    groups = []
    for names in SHARED_INPUT:
        if all(n in left for n in names) and len({left[n].in_features for n in names}) == 1:
            groups.append(list(names))
            for n in names:
                del left[n]
    return groups + [[n] for n in left]
