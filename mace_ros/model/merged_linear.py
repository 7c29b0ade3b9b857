# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Linear layers that apply to each token of a packed pass the LoRA adapter of its slot.

Adapters live in a fixed number of slots that are overwritten in place, because device graphs
replay on their addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn, Tensor

from mace_ros.model.cpu_matmul import Int8Weight, is_small_batch, linear
from mace_ros.model.lora_mapping import LoRAMapping, TRAINING_SLOT
from mace_ros.model.mixed_lora import add_update
from mace_ros.model.stored_weight import StoredWeight


@dataclass(eq=False)
class LoRAShard:
    """One of the original layers in a :class:`MergedLinear`, with its LoRA master weights."""

    name: str
    start: int      # of its outputs among those of the merged layer
    size: int       # number of outputs
    a: nn.Parameter | None = None   # [rank, in], fp32; None: the layer is not adapted
    b: nn.Parameter | None = None   # [out, rank], fp32


@dataclass(slots=True)
class _PendingOutputs:
    """
    Outputs of the shards that the model has yet to call in this pass.

    They are not attributes of the module, since setting an attribute of an ``nn.Module`` is slow.
    """

    input: Tensor | None = None     # of all shards
    outputs: dict[int, Tensor] = field(default_factory=dict)    # by the shard's index

    def clear(self) -> None:
        """Drop the tensors."""
        self.input, self.outputs = None, {}


class MergedLinear(nn.Module):
    """
    Linear layers with a common input, computed as one product, with LoRA slots.

    ``weight`` is ``[sum of out, in]``. For each slot, ``slots_a`` holds the stacked A of
    all adapted shards (``[slots * width, in]`` with width = adapted shards * rank), and
    ``slots_b`` the block-diagonal, scaled B (``[slots * width, sum of out]``). ``weight`` and
    ``slots_a`` are the two parts of ``extended``, so that a pass that mixes adapters takes one
    product over its input, unless the device has kernels for the update. ``exact_a`` and
    ``exact_b`` hold the same in fp32.

    A stored weight is not in ``extended``: :attr:`weight` then makes a dense one each time.
    """

    extended: Tensor
    extended_bias: Tensor | None
    slots_b: Tensor
    exact_a: Tensor
    exact_b: Tensor

    def __init__(self, names: list[str], linears: list[nn.Linear], mapping: LoRAMapping) -> None:
        super().__init__()
        self.mapping = mapping
        # A single layer keeps its tensor, which a head may share with the embedding.
        weight = (linears[0].weight.detach() if len(linears) == 1
                  else torch.cat([x.weight.detach() for x in linears]))
        bias = None
        if any(x.bias is not None for x in linears):
            bias = torch.cat([
                weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach()
                for x in linears])
        self.register_buffer('extended', weight, persistent=False)
        self.register_buffer('extended_bias', bias, persistent=False)
        for name in ('slots_b', 'exact_a', 'exact_b'):
            self.register_buffer(name, weight.new_empty(0), persistent=False)
        start = 0
        self.shards = []
        for name, layer in zip(names, linears, strict=True):
            self.shards.append(LoRAShard(name, start, layer.out_features))
            start += layer.out_features
        self.in_features, self.out_features = weight.shape[1], start
        self.scaling = 1.0
        self.rank = 0
        self.width = 0
        self.int8: Int8Weight | None = None
        self.stored: StoredWeight | None = None
        self._exact_slots: dict[int, tuple[Tensor, Tensor]] = {}    # views of exact_a.T, exact_b
        self._pending = _PendingOutputs()

    def round_to_int8(self) -> None:
        """Round the weight in place to 8 bits; use the 8-bit kernel for small batches if any."""
        rounded = Int8Weight(self.weight)
        self.int8 = rounded if rounded.has_kernel else None

    def store(self, weight: StoredWeight) -> None:
        """Replace the weight by a stored one of the same shape; call it before :meth:`adapt`."""
        self.stored = weight
        self.extended = self.extended.new_empty(0, self.in_features)

    def adapt(self, targets: set[str], rank: int, scaling: float, slots: int) -> None:
        """Add LoRA of the given rank to the shards named in ``targets``."""
        adapted = [s for s in self.shards if s.name in targets]
        if not adapted:
            return
        device = self.extended.device
        for shard in adapted:
            shard.a = nn.Parameter(torch.empty(rank, self.in_features, device=device))
            shard.b = nn.Parameter(torch.empty(shard.size, rank, device=device))
        self.rank, self.scaling, self.width = rank, scaling, rank * len(adapted)
        self.slots_b = self.extended.new_zeros(slots * self.width, self.out_features)
        self.extended = torch.cat([
            self.extended, self.extended.new_zeros(slots * self.width, self.in_features)])
        if self.extended_bias is not None:
            self.extended_bias = torch.cat([
                self.extended_bias, self.extended.new_zeros(slots * self.width)])
        # Only small batches on a CPU use them. With fp32 weights, float() makes no copy.
        if device.type == 'cpu':
            self.exact_a, self.exact_b = self.slots_a.float(), self.slots_b.float()
            self._exact_slots.clear()

    @property
    def name(self) -> str:
        """The names of the original layers."""
        return '+'.join(s.name for s in self.shards)

    @property
    def weight(self) -> Tensor:
        """The original layers' weights, stacked."""
        if self.stored is not None:
            return self.stored.dense(self.extended.dtype)
        return self.extended[:self.out_features]

    @property
    def bias(self) -> Tensor | None:
        """The original layers' biases."""
        return None if self.extended_bias is None else self.extended_bias[:self.out_features]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the original layers' weights and biases, which no state dict has."""
        weights = (self.weight,) if self.stored is None else self.stored.tensors
        return [*weights, *(() if self.bias is None else (self.bias,))]

    @property
    def slots_a(self) -> Tensor:
        """A of all slots."""
        return self.extended[0 if self.stored is not None else self.out_features:]

    @property
    def weight_nbytes(self) -> int:
        """Memory of the original layers' weights with all copies, in bytes."""
        plain = self.weight if self.stored is None else self.stored
        return plain.nbytes + (0 if self.int8 is None else self.int8.nbytes)

    @property
    def slots_nbytes(self) -> int:
        """Memory of the slots, in bytes."""
        storages = {t.data_ptr(): t.nbytes for t in (
            self.slots_a, self.slots_b, self.exact_a, self.exact_b) if t.numel()}
        return sum(storages.values())

    @property
    def adapted(self) -> list[LoRAShard]:
        """Shards that carry LoRA."""
        return [s for s in self.shards if s.a is not None]

    def slot(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return A ``[width, in]`` and scaled B ``[width, sum of out]`` of a slot."""
        rows = slice(slot * self.width, (slot + 1) * self.width)
        return self.slots_a[rows], self.slots_b[rows]

    def shard_rows(self) -> Iterator[tuple[LoRAShard, slice]]:
        """Yield each adapted shard with its rows in a slot."""
        for i, shard in enumerate(self.adapted):
            yield shard, slice(i * self.rank, (i + 1) * self.rank)

    def slot_views(self, slot: int) -> Iterator[tuple[LoRAShard, Tensor, Tensor]]:
        """Yield each adapted shard with every copy of its A and scaled B.T in a slot."""
        first = slot * self.width
        copies = [(self.slots_a, self.slots_b)]
        if self.exact_a.numel() and self.exact_a.dtype != self.slots_a.dtype:
            copies.append((self.exact_a, self.exact_b))
        for shard, rows in self.shard_rows():
            rows = slice(first + rows.start, first + rows.stop)
            columns = slice(shard.start, shard.start + shard.size)
            for a, b in copies:
                yield shard, a[rows], b[rows, columns]

    def output(self, index: int, x: Tensor) -> Tensor:
        """
        Return the output of shard ``index`` for ``x`` (``[..., in]`` to ``[..., out]``).

        A model calls the shards one after the other with the same tensor. The first call
        computes the outputs of all shards.
        """
        if len(self.shards) == 1:
            return self.compute(x)
        pending = self._pending
        if pending.input is not x or index not in pending.outputs:
            y = self.compute(x)
            sizes = [s.size for s in self.shards]
            parts = _Split.apply(y, sizes) if y.requires_grad else y.split(sizes, -1)
            pending.input, pending.outputs = x, dict(enumerate(parts))
        result = pending.outputs.pop(index)
        if not pending.outputs:
            pending.input = None
        return result

    def clear(self) -> None:
        """Drop the outputs left by a pass that did not call every shard."""
        self._pending.clear()

    def compute(self, x: Tensor) -> Tensor:
        """Return the outputs of all shards side by side, each token under its adapter."""
        mapping = self.mapping
        if mapping.training and self.width:
            if mapping.observer is not None:
                mapping.observer.observe(self, x)
            parameters = [p for s in self.adapted for p in (s.a, s.b)]
            y: Tensor = _TrainingProduct.apply(x, self, *parameters)
            return y
        small = is_small_batch(x) and not torch.is_grad_enabled()
        if not self.width or mapping.is_base:
            return self.base_output(x)
        if mapping.token_slots is not None:
            return add_update(self.base_output(x), x, self.slots_a, self.slots_b,
                              mapping.token_slots, self.width)
        if small:
            return self._add_exact(self.base_output(x), x)
        if mapping.one_hot is not None:
            y, low = self._with_all_slots(x)
            low = low.reshape(*mapping.one_hot.shape, self.width) * mapping.one_hot.unsqueeze(-1)
            b = self.slots_b
        else:
            y = self.base_output(x)
            a, b = self.slot(mapping.slot)
            low = linear(x, a)
        y.view(-1, self.out_features).addmm_(low.reshape(-1, b.shape[0]), b)
        return y

    def base_output(self, x: Tensor) -> Tensor:
        """Return the outputs of the original layers for ``x``, ``[..., in]``, side by side."""
        if self.int8 is not None and self.int8.is_faster(x) and not torch.is_grad_enabled():
            return self.int8.linear(x, self.bias)
        if self.stored is not None:
            return self.stored.linear(x, self.bias)
        return linear(x, self.weight, self.bias)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Return ``[tokens, in]`` for the gradient of the base output, ``[tokens, out]``."""
        if self.stored is not None:
            return self.stored.input_gradient(gradient)
        return gradient @ self.weight

    def _with_all_slots(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the base output, and the product of ``x`` with A of all slots."""
        if self.stored is not None:
            return self.base_output(x), linear(x, self.slots_a)
        both = linear(x, self.extended, self.extended_bias)
        y, low = both.split([self.out_features, both.shape[-1] - self.out_features], dim=-1)
        return y, low

    def _add_exact(self, y: Tensor, x: Tensor) -> Tensor:
        """
        Add the adapters' updates to ``y`` in place, computed in fp32.

        For small batches, a CPU spends more time on starting a bfloat16 kernel than on running
        it.
        """
        one_hot, slot = self.mapping.one_hot, self.mapping.slot
        x = x.view(-1, x.shape[-1]).float()
        if one_hot is None:
            if slot not in self._exact_slots:
                rows = slice(slot * self.width, (slot + 1) * self.width)
                self._exact_slots[slot] = self.exact_a[rows].t(), self.exact_b[rows]
            a, b = self._exact_slots[slot]
            update = torch.mm(torch.mm(x, a), b)
        else:
            low = torch.mm(x, self.exact_a.t()).view(*one_hot.shape, self.width)
            low = low * one_hot.unsqueeze(-1)
            update = torch.mm(low.view(x.shape[0], -1), self.exact_b)
        y.view(-1, self.out_features).add_(update)
        return y


class _TrainingProduct(torch.autograd.Function):
    """
    The product under the training slot, with gradients of ``x`` and the master weights.

    Autograd over the separate shards would run twice as many small products. Here the A of all
    shards are one matrix, and so are their B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: MergedLinear, *_: Tensor) -> Tensor:
        """Return all outputs side by side; the parameters' values are read from the slot."""
        a, b = layer.slot(TRAINING_SLOT)
        y = layer.base_output(x)
        low = linear(x, a)
        y.view(-1, layer.out_features).addmm_(low.view(-1, layer.width), b)
        ctx.save_for_backward(x, low)
        ctx.layer, ctx.slot = layer, (a, b)     # the optimizer overwrites it after the backward
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x`` and of each adapted shard's A and B."""
        layer: MergedLinear = ctx.layer
        x, low = (t.view(-1, t.shape[-1]) for t in ctx.saved_tensors)
        gradient = gradients[0].reshape(-1, layer.out_features)
        a, b = ctx.slot
        grad_low = gradient @ b.t()
        grad_a = (grad_low.t() @ x).float()
        grad_b = (low.t() @ gradient).float().mul_(layer.scaling)
        grad_x = layer.input_gradient(gradient).addmm_(grad_low, a)
        parts: list[Tensor] = []
        for shard, rows in layer.shard_rows():
            columns = slice(shard.start, shard.start + shard.size)
            parts += [grad_a[rows], grad_b[rows, columns].t()]
        return grad_x.view(ctx.saved_tensors[0].shape), None, *parts


class _Split(torch.autograd.Function):
    """
    The outputs of the shards as separate tensors.

    The gradient of each view would be padded with zeros and added to the others. Copies also
    may be changed in place, as OLMo does.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return tuple(part.contiguous() for part in y.split(sizes, -1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return torch.cat(gradients, -1), None
