# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The kernel of experts computes what a product with copied weights does, or is not used."""

from __future__ import annotations

import random
from types import FunctionType

import pytest
from support.families import tiny_model
from support.kernels import DEVICE, needs_triton
import torch
from torch import nn, Tensor

from mace_ros.model.fused_experts import (
    are_experts,
    mixes_experts,
    multiply_pairs,
    plain_product,
)

pytestmark = pytest.mark.usefixtures('one_thread')

CASES = 25      # of each precision
ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def product_error(seed: int, dtype: torch.dtype) -> float:
    """Return the relative error of the product of random pairs."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, of_row, experts = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 5)
    inputs, outputs = rng.choice((8, 40, 300)), rng.choice((8, 20, 130))
    transposed, is_view = rng.choice((False, True)), rng.choice((False, True))

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    shape = (inputs, outputs) if transposed else (outputs, inputs)
    weight = values(experts, *shape[::-1]).transpose(1, 2) if is_view else values(experts, *shape)
    x, bias = values(rows, inputs), rng.choice((None, values(experts, outputs)))
    chosen = torch.randint(experts, (rows * of_row,), generator=generator).to(DEVICE)
    exact = plain_product(x.float(), weight.float(), None if bias is None else bias.float(),
                          chosen, transposed)
    found = multiply_pairs(x, weight, bias, chosen, transposed)
    assert found.shape == (rows * of_row, outputs) and found.dtype == dtype
    return float((found.float() - exact).norm() / exact.norm())


@needs_triton
@pytest.mark.parametrize('dtype', ERRORS, ids=str)
def test_the_kernel_multiplies_pairs(dtype: torch.dtype) -> None:
    for seed in range(CASES):
        assert product_error(seed, dtype) < ERRORS[dtype], seed


@pytest.mark.parametrize('family', ['qwen3-moe', 'gpt-oss'])
def test_experts_that_compute_something_else_are_left_alone(family: str) -> None:
    experts = next(m for m in tiny_model(family).modules() if are_experts(m))
    assert mixes_experts(experts)
    own = type(experts)

    def forward(self: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        scaled: Tensor = original(self, x, chosen, weights) * 1.01
        return scaled

    original: FunctionType = own.forward.__wrapped__
    experts.__class__ = type('Scaled', (own,), {'forward': forward})
    assert not mixes_experts(experts)
    experts.__class__ = type('Missing', (own,), {
        'forward': lambda self, *args: original(self, *args) + self.missing})
    assert not mixes_experts(experts)
