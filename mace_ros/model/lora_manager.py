# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The adapters of a model: slots that serve, master weights that train, protected directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import math

import torch
from torch import nn, Tensor

from mace_ros.model.lora_mapping import FIRST_SERVED_SLOT
from mace_ros.model.merged_linear import LoRAShard, MergedLinear

# At most one of this many input directions is protected, so that the others can still learn.
DIRECTIONS_PER_PROTECTED = 16


class LoRAManager:
    """
    Writes, loads and exports the adapters of a model.

    Tensors enter and leave under PEFT's names (``base_model.model.<layer>.lora_A.weight``),
    in fp32.
    """

    def __init__(self, linears: list[MergedLinear], *, targets: str, rank: int, alpha: float,
                 slots: int, protected_directions: int = 0,
                 invocation: tuple[int, ...] = ()) -> None:
        """
        Add LoRA to the target layers; the master weights are a fresh adapter.

        ``targets`` is ``all-linear`` (as in PEFT), ``output-linear``, or a comma-separated list
        of layer names. ``slots`` is the number of served slots. ``protected_directions`` bounds
        the number of directions per layer for :meth:`protect`. ``invocation`` are the tokens
        from whose last occurrence in a prompt on the adapters are to act.

        Raises ``ValueError`` if no layer matches ``targets``.
        """
        names = _targeted(linears, targets)
        self.rank, self.alpha, self.slots = rank, alpha, FIRST_SERVED_SLOT + slots
        self.invocation = invocation
        self.linears = linears
        linears[0].mapping.slots = self.slots
        for layer in linears:
            layer.adapt(names, rank, alpha / rank, self.slots)
        self._shards = [s for layer in linears for s in layer.adapted]
        # Slots are overwritten in place; making a view takes as long as copying to it.
        self._slot_views: dict[int, list[tuple[LoRAShard, Tensor, Tensor]]] = {}
        self._protected_directions = protected_directions
        # Whether updates leave the protected directions alone.
        self.protecting = False
        # Per layer, the protected basis, and the components along it that each A keeps.
        self._protected: dict[MergedLinear, tuple[Tensor, list[Tensor]]] = {}
        self.reset()

    @property
    def nbytes(self) -> int:
        """Memory of the slots and the master weights, in bytes."""
        return (sum(layer.slots_nbytes for layer in self.linears)
                + sum(p.nbytes for p in self.parameters()))

    def parameters(self) -> list[nn.Parameter]:
        """Return the master weights: A and B of each adapted layer, alternating."""
        return [p for s in self._shards for p in (s.a, s.b) if p is not None]

    @property
    def target_modules(self) -> list[str]:
        """Last parts of the adapted layers' names, as in ``adapter_config.json``."""
        return sorted({s.name.rsplit('.', 1)[-1] for s in self._shards})

    # -- master weights --------------------------------------------------------------

    @torch.no_grad()
    def reset(self, seed: int = 0) -> None:
        """Make the master weights a fresh adapter (PEFT's default), which changes no output."""
        generator = torch.Generator().manual_seed(seed)
        for shard in self._shards:
            assert shard.a is not None and shard.b is not None
            fresh = torch.empty(shard.a.shape)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            shard.a.copy_(fresh)
            shard.b.zero_()
        for _, components in self._protected.values():
            torch._foreach_zero_(components)
        self.project_update()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """
        Copy ``tensors`` to the master weights.

        Raises ``ValueError`` unless names and shapes match exactly.
        """
        for parameter, tensor in zip(self.parameters(), self.checked(tensors), strict=True):
            parameter.copy_(tensor)
        for layer, (basis, components) in self._protected.items():
            for shard, component in zip(layer.adapted, components, strict=True):
                assert shard.a is not None
                torch.mm(shard.a, basis, out=component)

    def checked(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """
        Return ``tensors`` in the order of the master weights.

        Raises ``ValueError`` unless names and shapes match exactly.
        """
        named = dict(self._named())
        odd = sorted(named.keys() ^ tensors.keys())
        if odd:
            raise ValueError(f'adapter does not fit this model: {len(odd)} tensors missing or '
                             f'unknown, such as {odd[0]}')
        for name, parameter in named.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(f'adapter does not fit this model: {name} is '
                                 f'{tuple(tensors[name].shape)}, not {tuple(parameter.shape)}')
        return [tensors[name] for name in named]

    def export(self) -> dict[str, Tensor]:
        """Return copies of the master weights on the CPU."""
        return {name: p.detach().to('cpu', copy=True) for name, p in self._named()}

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the master weights on their own device."""
        return {name: p.detach().clone() for name, p in self._named()}

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        names = [name for s in self._shards for name in _peft_names(s)]
        return zip(names, self.parameters(), strict=True)

    @torch.no_grad()
    def write_slot(self, slot: int, tensors: Mapping[str, Tensor] | None = None) -> None:
        """
        Copy the master weights, or ``tensors``, into a slot in place.

        With ``tensors`` the master weights stay unchanged. Raises ``ValueError`` as
        :meth:`load` does.
        """
        weights: list[Tensor] = [*self.parameters()]
        if tensors is not None:
            weights = [t.to(w.device, w.dtype)
                       for t, w in zip(self.checked(tensors), weights, strict=True)]
        scaled = torch._foreach_mul(weights[1::2], self.alpha / self.rank)
        by_shard = dict(zip(self._shards, zip(weights[::2], scaled, strict=True), strict=True))
        if slot not in self._slot_views:
            self._slot_views[slot] = [
                view for layer in self.linears for view in layer.slot_views(slot)]
        targets, sources = [], []
        for shard, *views in self._slot_views[slot]:
            a, b = by_shard[shard]
            targets += views
            sources += [a, b.t()]
        torch._foreach_copy_(targets, sources)

    # -- null-space projection -------------------------------------------------------

    def direction_count(self, layer: MergedLinear) -> int:
        """Return how many input directions of ``layer`` are to be protected."""
        return min(self._protected_directions,
                   layer.in_features // DIRECTIONS_PER_PROTECTED)

    @property
    def null_space_nbytes(self) -> int:
        """Memory of the protected directions once all are known, in bytes."""
        return sum(4 * layer.in_features * self.direction_count(layer)
                   for layer in self.linears if layer.adapted)

    def protect(self, layer: MergedLinear, basis: Tensor) -> None:
        """
        Confine later updates of ``layer`` to the null space of ``basis`` while ``protecting``.

        ``basis`` is orthonormal, ``[in, directions]``. Call :meth:`reset` or :meth:`load` before
        the next update. A fresh adapter then gets no component along the basis. A loaded one keeps
        the components that it has: removing them would remove some of what it has learned.
        """
        self._protected[layer] = basis, [
            basis.new_zeros(layer.rank, basis.shape[1]) for _ in layer.adapted]

    @torch.no_grad()
    def project_update(self) -> None:
        """Remove the component along protected directions from the last update."""
        if not self.protecting:
            return
        for layer, (basis, components) in self._protected.items():
            for shard, component in zip(layer.adapted, components, strict=True):
                assert shard.a is not None
                shard.a.addmm_(shard.a @ basis - component, basis.t(), alpha=-1.0)


def _targeted(linears: list[MergedLinear], targets: str) -> set[str]:
    """Return the names of the layers that ``targets`` selects; ``ValueError`` if there is none."""
    names = {s.name for layer in linears for s in layer.shards}
    if targets == 'output-linear':
        # The last layers of attention and MLP write the residual stream, which the first layer
        # reads, and share their input with no other layer.
        width = linears[0].in_features
        names = {s.name for layer in linears for s in layer.shards
                 if len(layer.shards) == 1 and s.size == width}
    elif targets != 'all-linear':
        wanted = {t.strip() for t in targets.split(',')}
        names = {n for n in names if n.rsplit('.', 1)[-1] in wanted}
    if not names:
        raise ValueError(f'adapter.target_modules: no linear layer matches {targets!r}')
    return names


def _peft_names(shard: LoRAShard) -> tuple[str, str]:
    stem = f'base_model.model.{shard.name}'
    return f'{stem}.lora_A.weight', f'{stem}.lora_B.weight'
