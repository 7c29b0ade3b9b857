# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
LoRA linears that give each token of a packed row the adapter it belongs to.

Adapters live in a fixed number of slots that are overwritten in place. Slot
``BASE_SLOT`` is the base model (no update) and ``TRAINING_SLOT`` is the adapter that is
being trained; the others hold served versions. The projections that read the same input
(query/key/value, gate/up) share one matrix product behind their own module interfaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
import math
from typing import Any

import torch
from torch import nn, Tensor

from mace_ros.model.cpu_matmul import Int8Weight, is_few, linear

BASE_SLOT = 0
TRAINING_SLOT = 1
FIRST_SERVED_SLOT = 2

# Of the directions of an input one of so many is spared at most: the rest is to learn along.
SPARED_OF = 16

# Children of one module that always receive the same input tensor.
SHARED_INPUT = (('q_proj', 'k_proj', 'v_proj'), ('gate_proj', 'up_proj'))


@dataclass
class LoRAMapping:
    """
    Which adapter each token of the current row uses; shared by all linears of a model.

    Without ``choice``, a ``[tokens, slots]`` matrix of zeros and ones, all tokens use
    ``slot``. ``training`` makes all use the training slot, with gradients for the master
    weights; ``watch`` is shown their inputs.
    """

    slots: int = FIRST_SERVED_SLOT
    slot: int = BASE_SLOT
    choice: Tensor | None = None
    training: bool = False
    watch: Callable[[MergedLinear, Tensor], None] | None = None


class _Shard:
    """One original linear layer inside a group: its place in the output, and its LoRA."""

    def __init__(self, name: str, linear: nn.Linear, start: int) -> None:
        self.name = name
        self.start = start
        self.size = linear.out_features
        self.a: nn.Parameter | None = None   # [rank, in], fp32
        self.b: nn.Parameter | None = None   # [out, rank], fp32


class MergedLinear(nn.Module):
    """
    Linear layers with a common input, computed by one product, with slots of LoRA.

    ``weight`` is ``[sum of out, in]``. For each slot, ``slots_a`` holds the stacked A of
    all adapted members (``[slots * width, in]``, width = members * rank) and ``slots_b``
    the block-diagonal, scaled B (``[slots * width, sum of out]``). ``weight`` and
    ``slots_a`` are the two parts of ``extended``, so that a row that mixes adapters still
    takes one product over its input. ``exact_a`` and ``exact_b`` are the same in fp32.
    """

    extended: Tensor
    extended_bias: Tensor | None
    slots_b: Tensor
    exact_a: Tensor
    exact_b: Tensor

    def __init__(self, names: list[str], linears: list[nn.Linear],
                 adapters: LoRAMapping) -> None:
        super().__init__()
        self.adapters = adapters
        # One layer keeps its tensor: a head may share it with the embedding.
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
        self.members = []
        for name, layer in zip(names, linears, strict=True):
            self.members.append(_Shard(name, layer, start))
            start += layer.out_features
        self.out_features = start
        self.scaling = 1.0
        self.rank = 0
        self.width = 0
        self.int8: Int8Weight | None = None
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def round_to_int8(self) -> None:
        """Let the weight be what 8 bits can say, so that few tokens need read no more."""
        rounded = Int8Weight(self.weight)
        self.int8 = rounded if rounded.has_kernel else None

    def adapt(self, targets: set[str], rank: int, scaling: float, slots: int) -> None:
        """Add LoRA of that rank to the members named in ``targets``."""
        adapted = [m for m in self.members if m.name in targets]
        if not adapted:
            return
        device, in_features = self.weight.device, self.weight.shape[1]
        for member in adapted:
            member.a = nn.Parameter(torch.empty(rank, in_features, device=device))
            member.b = nn.Parameter(torch.empty(member.size, rank, device=device))
        self.rank, self.scaling, self.width = rank, scaling, rank * len(adapted)
        self.slots_b = self.weight.new_zeros(slots * self.width, self.out_features)
        self.extended = torch.cat([
            self.weight, self.weight.new_zeros(slots * self.width, in_features)])
        if self.extended_bias is not None:
            self.extended_bias = torch.cat([
                self.extended_bias, self.weight.new_zeros(slots * self.width)])
        # Those of few tokens on a CPU; where weights are fp32, no second copy.
        few = device.type == 'cpu'
        self.exact_a = self.slots_a.float() if few else self.exact_a
        self.exact_b = self.slots_b.float() if few else self.exact_b

    @property
    def weight(self) -> Tensor:
        """The layers' own weights, one below the other."""
        return self.extended[:self.out_features]

    @property
    def bias(self) -> Tensor | None:
        """The layers' own biases."""
        return None if self.extended_bias is None else self.extended_bias[:self.out_features]

    @property
    def slots_a(self) -> Tensor:
        """A of all slots."""
        return self.extended[self.out_features:]

    @property
    def slots_nbytes(self) -> int:
        """Memory that the slots take."""
        kept = {t.data_ptr(): t.nbytes for t in (
            self.slots_a, self.slots_b, self.exact_a, self.exact_b) if t.numel()}
        return sum(kept.values())

    @property
    def adapted(self) -> list[_Shard]:
        """Members that carry LoRA."""
        return [m for m in self.members if m.a is not None]

    def slot(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return A ``[width, in]`` and scaled B ``[width, sum of out]`` of a slot."""
        rows = slice(slot * self.width, (slot + 1) * self.width)
        return self.slots_a[rows], self.slots_b[rows]

    def member_rows(self) -> Iterator[tuple[_Shard, slice]]:
        """Yield each adapted member and the rows that it has of a slot."""
        for i, member in enumerate(self.adapted):
            yield member, slice(i * self.rank, (i + 1) * self.rank)

    def slot_parts(self, slot: int) -> Iterator[tuple[_Shard, Tensor, Tensor]]:
        """Yield each adapted member, and where its A and its scaled B.T are kept for a slot."""
        first = slot * self.width
        kept = [(self.slots_a, self.slots_b)]
        if self.exact_a.numel() and self.exact_a.dtype != self.slots_a.dtype:
            kept.append((self.exact_a, self.exact_b))
        for member, rows in self.member_rows():
            rows = slice(first + rows.start, first + rows.stop)
            columns = slice(member.start, member.start + member.size)
            for a, b in kept:
                yield member, a[rows], b[rows, columns]

    def output(self, index: int, x: Tensor) -> Tensor:
        """
        Return member ``index``'s output for ``x`` (``[..., in]`` to ``[..., out]``).

        The members of a group are called one after the other with the same tensor; the
        first call computes for all.
        """
        if len(self.members) == 1:
            return self.compute(x)
        if self._input is not x or index not in self._outputs:
            y = self.compute(x)
            self._input = x
            sizes = [m.size for m in self.members]
            parts = _Parts.apply(y, sizes) if y.requires_grad else y.split(sizes, -1)
            self._outputs = dict(enumerate(parts))
        result = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return result

    def forget(self) -> None:
        """Drop what a pass left behind that did not call every member."""
        if self._input is not None:     # seldom; and torch.nn.Module sets attributes slowly
            self._input, self._outputs = None, {}

    def compute(self, x: Tensor) -> Tensor:
        """Return all members' outputs side by side, each token with its adapter."""
        adapters = self.adapters
        if adapters.training and self.width:
            if adapters.watch is not None:
                adapters.watch(self, x)
            parameters = [p for m in self.adapted for p in (m.a, m.b)]
            y: Tensor = _TrainedProduct.apply(x, self, *parameters)
            return y
        few = is_few(x) and not torch.is_grad_enabled()
        unadapted = not self.width or (adapters.choice is None and adapters.slot == BASE_SLOT)
        if few or unadapted:
            y = (self.int8.linear(x, self.bias) if few and self.int8 is not None
                 else linear(x, self.weight, self.bias))
            return y if unadapted else self._add_exact(y, x)
        if adapters.choice is not None:
            both = linear(x, self.extended, self.extended_bias)
            y, low = both.split([self.out_features, both.shape[-1] - self.out_features], dim=-1)
            low = low.reshape(*adapters.choice.shape, self.width) * adapters.choice.unsqueeze(-1)
            b = self.slots_b
        else:
            y = linear(x, self.weight, self.bias)
            a, b = self.slot(adapters.slot)
            low = linear(x, a)
        y.view(-1, self.out_features).addmm_(low.reshape(-1, b.shape[0]), b)
        return y

    def _add_exact(self, y: Tensor, x: Tensor) -> Tensor:
        """
        Add the adapters' updates to ``y`` in place, computed in fp32.

        For so few tokens a CPU's kernels for bfloat16 take longer to begin than to compute.
        """
        choice, slot = self.adapters.choice, self.adapters.slot
        x = x.view(-1, x.shape[-1]).float()
        if choice is None:
            rows = slice(slot * self.width, (slot + 1) * self.width)
            update = torch.mm(torch.mm(x, self.exact_a[rows].t()), self.exact_b[rows])
        else:
            low = torch.mm(x, self.exact_a.t()).view(*choice.shape, self.width)
            low = low * choice.unsqueeze(-1)
            update = torch.mm(low.view(x.shape[0], -1), self.exact_b)
        y.view(-1, self.out_features).add_(update)
        return y


class _TrainedProduct(torch.autograd.Function):
    """
    A group's product under the training slot, with gradients of ``x`` and the master weights.

    What autograd makes of it layer by layer takes twice as many small products: here the
    members' A are one matrix, and so are their B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: MergedLinear, *_: Tensor) -> Tensor:
        """Return all members' outputs side by side; the parameters are in the slot."""
        a, b = group.slot(TRAINING_SLOT)
        y = linear(x, group.weight, group.bias)
        low = linear(x, a)
        y.view(-1, group.out_features).addmm_(low.view(-1, group.width), b)
        ctx.save_for_backward(x, low)
        ctx.group = group
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x`` and of each adapted member's A and B."""
        group: MergedLinear = ctx.group
        x, low = (t.view(-1, t.shape[-1]) for t in ctx.saved_tensors)
        gradient = gradients[0].reshape(-1, group.out_features)
        a, b = group.slot(TRAINING_SLOT)
        of_low = gradient @ b.t()
        of_a = of_low.t() @ x
        of_b = low.t() @ gradient
        of_x = (gradient @ group.weight).addmm_(of_low, a)
        parts: list[Tensor] = []
        for member, rows in group.member_rows():
            columns = slice(member.start, member.start + member.size)
            parts.append(of_a[rows].float())
            parts.append(of_b[rows, columns].t().float() * group.scaling)
        return of_x.view(ctx.saved_tensors[0].shape), None, *parts


class _Parts(torch.autograd.Function):
    """
    The outputs of a group's members, from all of them side by side.

    Gradients of views would each be filled up with zeros, and added. Copies may be changed in
    place, as OLMo does.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return tuple(part.contiguous() for part in y.split(sizes, -1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return torch.cat(gradients, -1), None


class LoRALinear(nn.Module):
    """Stands where an ``nn.Linear`` stood; its group computes."""

    def __init__(self, group: MergedLinear, index: int) -> None:
        super().__init__()
        self.group = group
        self.index = index

    @property
    def weight(self) -> Tensor:
        """Some models ask a layer for the type or the device of its weight."""
        member = self.group.members[self.index]
        return self.group.weight[member.start:member.start + member.size]

    def forward(self, x: Tensor) -> Tensor:
        """Return this layer's part of the group's output."""
        return self.group.output(self.index, x)


def replace_linears(model: nn.Module, skip: Iterable[nn.Module],
                    adapters: LoRAMapping) -> list[MergedLinear]:
    """Put a :class:`LoRALinear` in the place of every ``nn.Linear`` but those in ``skip``."""
    skipped = set(map(id, skip))
    groups = []
    for prefix, parent in list(model.named_modules()):
        linears = {name: child for name, child in parent.named_children()
                   if type(child) is nn.Linear and id(child) not in skipped}
        for names in _shared_inputs(linears):
            groups.append(_group(parent, prefix, {n: linears[n] for n in names}, adapters))
    return groups


def replace_head(model: nn.Module, head: nn.Module | None,
                 adapters: LoRAMapping) -> list[MergedLinear]:
    """Put a :class:`LoRALinear` in the place of the head, if it is an ``nn.Linear``."""
    for prefix, parent in list(model.named_modules()):
        for name, child in parent.named_children():
            if child is head and type(child) is nn.Linear:
                return [_group(parent, prefix, {name: child}, adapters)]
    return []


def _group(parent: nn.Module, prefix: str, linears: Mapping[str, nn.Linear],
           adapters: LoRAMapping) -> MergedLinear:
    """Put grouped layers in the place of children of ``parent``, which is called ``prefix``."""
    group = MergedLinear([f'{prefix}.{n}' if prefix else n for n in linears],
                        list(linears.values()), adapters)
    for index, name in enumerate(linears):
        setattr(parent, name, LoRALinear(group, index))
    return group


def _shared_inputs(linears: Mapping[str, nn.Linear]) -> list[list[str]]:
    """Return the names grouped by common input."""
    left = dict(linears)
    groups = []
    for names in SHARED_INPUT:
        if all(n in left for n in names) and len({left[n].in_features for n in names}) == 1:
            groups.append(list(names))
            for n in names:
                del left[n]
    return groups + [[n] for n in left]


def _targeted(groups: list[MergedLinear], targets: str) -> set[str]:
    """Return the names of the layers that ``targets`` means; raises ``ValueError`` if none."""
    names = {m.name for g in groups for m in g.members}
    if targets == 'output-linear':
        # They write what the first layer of all reads, and share their input with no other.
        width = groups[0].weight.shape[1]
        names = {m.name for g in groups for m in g.members
                 if len(g.members) == 1 and m.size == width}
    elif targets != 'all-linear':
        wanted = {t.strip() for t in targets.split(',')}
        names = {n for n in names if n.rsplit('.', 1)[-1] in wanted}
    if not names:
        raise ValueError(f'adapter.target_modules: no linear layer matches {targets!r}')
    return names


class LoRAManager:
    """
    The adapters of a model: slots that serve, and the master weights that train.

    Tensors go in and out under PEFT's names
    (``base_model.model.<layer>.lora_A.weight``), fp32.
    """

    def __init__(self, groups: list[MergedLinear], *, targets: str, rank: int, alpha: float,
                 slots: int, spared: int = 0) -> None:
        """
        Begin with a fresh adapter.

        ``targets`` is ``all-linear`` (see PEFT), ``output-linear``, or layer names separated by
        commas. ``spared`` is how many directions of an input :meth:`spare` may be given, unless
        that were too many.
        """
        names = _targeted(groups, targets)
        self.rank, self.alpha, self.slots = rank, alpha, FIRST_SERVED_SLOT + slots
        self.groups = groups
        groups[0].adapters.slots = self.slots
        for group in groups:
            group.adapt(names, rank, alpha / rank, self.slots)
        self._members = [m for g in groups for m in g.adapted]
        self._most_spared = spared
        # Directions of a group's input, and how far each of its A looks along them.
        self._spared: dict[MergedLinear, tuple[Tensor, list[Tensor]]] = {}
        self.reset()

    @property
    def nbytes(self) -> int:
        """Memory of the slots and the master weights."""
        return (sum(g.slots_nbytes for g in self.groups)
                + sum(p.nbytes for p in self.parameters()))

    @property
    def spared_nbytes(self) -> int:
        """Memory of the directions that are to be spared, once they are known."""
        return sum(4 * g.weight.shape[1] * self.spared(g) for g in self.groups if g.adapted)

    def parameters(self) -> list[nn.Parameter]:
        """Return the master weights, A and B of each adapted layer."""
        return [p for m in self._members for p in (m.a, m.b) if p is not None]

    @property
    def target_modules(self) -> list[str]:
        """Last parts of the adapted layers' names, as ``adapter_config.json`` lists them."""
        return sorted({m.name.rsplit('.', 1)[-1] for m in self._members})

    @torch.no_grad()
    def reset(self, seed: int = 0) -> None:
        """Make the master weights a fresh adapter that changes nothing (PEFT's default)."""
        generator = torch.Generator().manual_seed(seed)
        for member in self._members:
            assert member.a is not None and member.b is not None
            fresh = torch.empty(member.a.shape)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            member.a.copy_(fresh)
            member.b.zero_()
        for _, looks in self._spared.values():
            torch._foreach_zero_(looks)
        self.project_update()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Make ``tensors`` the master weights; names and shapes must match exactly."""
        for parameter, tensor in zip(self.parameters(), self.checked(tensors), strict=True):
            parameter.copy_(tensor)
        for group, (directions, looks) in self._spared.items():
            for member, look in zip(group.adapted, looks, strict=True):
                assert member.a is not None
                torch.mm(member.a, directions, out=look)

    def spared(self, group: MergedLinear) -> int:
        """Return how many directions of a group's input are to be spared."""
        return min(self._most_spared, group.weight.shape[1] // SPARED_OF)

    def spare(self, group: MergedLinear, directions: Tensor) -> None:
        """
        Let no update look along these directions of a group's input from now on.

        They are orthonormal, ``[in, some]``. A fresh adapter does not look along them. One that
        is loaded goes on looking as it did: else it would lose some of what it knows.
        """
        some = directions.shape[1]
        self._spared[group] = directions, [
            directions.new_zeros(group.rank, some) for _ in group.adapted]

    @torch.no_grad()
    def project_update(self) -> None:
        """Undo what an update made the master weights look along what is spared."""
        for group, (directions, looks) in self._spared.items():
            for member, look in zip(group.adapted, looks, strict=True):
                assert member.a is not None
                member.a.addmm_(member.a @ directions - look, directions.t(), alpha=-1.0)

    def checked(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return tensors in the order of the master weights, or raise ``ValueError``."""
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
        """Return copies of the master weights where they are."""
        return {name: p.detach().clone() for name, p in self._named()}

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        names = [name for m in self._members for name in _peft_names(m)]
        return zip(names, self.parameters(), strict=True)

    @torch.no_grad()
    def write_slot(self, slot: int, tensors: Mapping[str, Tensor] | None = None) -> None:
        """
        Copy the master weights into a slot, in place; or ``tensors``, as :meth:`load` does.

        With ``tensors`` the master weights stay as they are.
        """
        weights: list[Tensor] = [*self.parameters()]
        if tensors is not None:
            weights = [t.to(w.device, w.dtype)
                       for t, w in zip(self.checked(tensors), weights, strict=True)]
        scaled = torch._foreach_mul(weights[1::2], self.alpha / self.rank)
        of_member = {id(m): ab for m, *ab in zip(self._members, weights[::2], scaled, strict=True)}
        targets, sources = [], []
        for group in self.groups:
            for member, *parts in group.slot_parts(slot):
                a, b = of_member[id(member)]
                targets += parts
                sources += [a, b.t()]
        torch._foreach_copy_(targets, sources)


def _peft_names(member: _Shard) -> tuple[str, str]:
    stem = f'base_model.model.{member.name}'
    return f'{stem}.lora_A.weight', f'{stem}.lora_B.weight'
