# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Experts of a few tokens, one kernel for each of their two products.

transformers sorts the tokens by expert for a grouped product, and back: some fifteen kernels beside
the products, which pays off for many tokens. In a decode pass nearly every pair of a token and an
expert reads weights of its own. The gate between the products is transformers' own code.
"""

from __future__ import annotations

from collections.abc import Callable
import copy
import inspect
from typing import Any, TypeAlias

import torch
from torch import nn, Tensor

from mace_ros.model.attention import ForwardContext
from mace_ros.model.fused_layers import OtherCode, TOLERANCE
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.triton_operator import triton_operator

MAX_PAIRS = 128     # of a token and an expert; with more, experts are shared by many tokens

# Of the weights of all experts, the expert of each pair, and whether the weights are transposed.
Product: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, Tensor, bool], Tensor]


def multiply_pairs(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor,
                   transposed: bool) -> Tensor:
    """
    Return for each pair the product of its row of ``x`` with its expert, ``[pairs, out]``.

    ``x`` is ``[rows, in]``: each row belongs to as many consecutive pairs as all others. ``weight``
    is ``[experts, out, in]``, or ``[experts, in, out]`` if ``transposed``; ``bias`` is
    ``[experts, out]``; ``experts`` are ``[pairs]``.
    """
    out = x.new_empty(len(experts), weight.shape[2 if transposed else 1])
    torch.ops.mace_ros.multiply_pairs(
        out, x.contiguous(), weight, bias, experts.contiguous(), transposed)
    return out


def plain_product(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor,
                  transposed: bool) -> Tensor:
    """Return what :func:`multiply_pairs` does, without its kernel."""
    rows = x.repeat_interleave(len(experts) // len(x), 0)
    used = weight[experts] if transposed else weight[experts].transpose(1, 2)
    out = torch.bmm(rows[:, None], used)[:, 0]
    return out if bias is None else out + bias[experts]


def mix_experts(module: Any, x: Tensor, chosen: Tensor, weights: Tensor,
                product: Product = multiply_pairs) -> Tensor:
    """
    Return what transformers' experts ``module`` computes for ``x``, ``[tokens, width]``.

    ``chosen`` and ``weights`` are the experts of each token, ``[tokens, experts of each]``.
    """
    experts = chosen.reshape(-1)
    biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
    y = product(x, module.gate_up_proj, biases[0], experts, module.is_transposed)
    y = product(module._apply_gate(y), module.down_proj, biases[1], experts, module.is_transposed)
    return (y.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1).type_as(x)


def fused_experts(model: PackedModel) -> OtherCode:
    """Return the experts of a model."""
    found = [m for m in model.model.modules() if are_experts(m)]
    kinds = {type(m): m for m in found}
    classes = {kind: experts_class(kind, model.context)
               for kind, module in kinds.items() if mixes_experts(module)}
    return OtherCode('experts', {m: classes[type(m)] for m in found if type(m) in classes})


def are_experts(module: nn.Module) -> bool:
    """Return whether a module is transformers' experts, by its weights."""
    return all(isinstance(w := getattr(module, name, None), nn.Parameter) and w.dim() == 3
               for name in ('gate_up_proj', 'down_proj')) and hasattr(module, '_apply_gate')


def mixes_experts(module: Any) -> bool:
    """Return whether :func:`mix_experts` computes what a module's own code does, on a CPU."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    twin = copy.copy(module)    # with weights that are small, and on a CPU
    up, down = values(4, 24, 8), values(4, 8, 12)
    try:
        if module.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        twin.num_experts = len(up)
        twin._parameters = {'gate_up_proj': up, 'down_proj': down}
        if module.has_bias:
            twin._parameters |= {'gate_up_proj_bias': values(4, 24),
                                 'down_proj_bias': values(4, 8)}
        # The class's own loop over experts, whatever the config has put in its place.
        own = inspect.unwrap(type(module).forward)
        x, chosen = values(3, 8), values(3, 4).topk(2).indices
        weights = values(3, 2)
        return torch.allclose(mix_experts(twin, x, chosen, weights, plain_product),
                              own(twin, x, chosen, weights), rtol=TOLERANCE, atol=TOLERANCE)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):   # it needs more
        return False


def experts_class(kind: type[nn.Module], context: ForwardContext) -> type[nn.Module]:
    """Return a class like ``kind`` with another forward in small passes that write the cache."""
    def forward(self: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Any:
        if context.metadata.write_slots is None or chosen.numel() > MAX_PAIRS:
            return kind.forward(self, x, chosen, weights)
        return mix_experts(self, x, chosen, weights)

    return type(kind.__name__, (kind,), {'forward': forward})


@triton_operator(
    'multiply_pairs(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor experts, '
    'bool transposed) -> ()')
def _multiply(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor,
              transposed: bool) -> None:
    """Run the kernel; on a CPU, only Triton's interpreter can."""
    from mace_ros.model.expert_kernels import launch  # needs Triton

    launch(out, x, weight, bias, experts, transposed=transposed)
