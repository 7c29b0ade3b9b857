# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The kernels of mixed adapters compute what plain products with each token's slot compute.

Without a GPU, Triton's interpreter runs the kernels; a GPU compiles them.
"""

from __future__ import annotations

from dataclasses import dataclass
import random

import pytest
from support.kernels import DEVICE, needs_triton
import torch
from torch import Tensor

from mace_ros.model.fused_check import exact_update
from mace_ros.model.mixed_lora import add_update, MAX_PROGRAMS, ROW_TILE, SPLIT_INPUTS, splits

pytestmark = pytest.mark.usefixtures('one_thread')

CASES = 70      # of each precision
# Relative errors: half a unit in the last place of a result, and of what both kernels pass on.
ERRORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """The update of a pass in one layer."""

    seed: int
    dtype: torch.dtype
    slots: tuple[int, ...]      # of the tokens
    count: int                  # of slots
    inputs: int
    outputs: int
    width: int

    @staticmethod
    def random(seed: int, dtype: torch.dtype) -> Case:
        """Return a case that the interpreter computes in some tens of milliseconds."""
        rng = random.Random(seed)
        count = rng.choice((2, 3, 5))
        tokens = rng.choice((1, 1, 2, 3, 8, 17, 33))
        one = rng.randrange(count)
        slots = [rng.choice((0, one, rng.randrange(count))) for _ in range(tokens)]
        return Case(seed, dtype, tuple(slots), count, rng.choice((16, 40, 64, 200, 1100)),
                    rng.choice((16, 40, 64, 130)), rng.choice((2, 4, 8, 12, 24, 70)))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return y, x, A and B of all slots, and the tokens' slots."""
        generator = torch.Generator().manual_seed(self.seed)

        def values(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, self.dtype)

        tokens = len(self.slots)
        return (values(1, tokens, self.outputs), values(1, tokens, self.inputs),
                values(self.count * self.width, self.inputs) * self.inputs ** -0.5,
                values(self.count * self.width, self.outputs),
                torch.tensor(self.slots, device=DEVICE))

    def error(self) -> float:
        """Return the relative error of the sum; slots of no token hold NaN."""
        y, x, a, b, token_slots = self.tensors()
        exact = y[0].float() + exact_update(x[0], a, b, token_slots, self.width)
        for slot in {0, *range(self.count)} - {s for s in self.slots if s}:
            a[slot * self.width:(slot + 1) * self.width] = float('nan')
            b[slot * self.width:(slot + 1) * self.width] = float('nan')
        base = y[0, token_slots == 0].clone()
        found = add_update(y, x, a, b, token_slots, self.width)
        assert found is y
        assert torch.equal(y[0, token_slots == 0], base)
        return float((y[0].float() - exact).norm() / exact.norm())


@needs_triton
@pytest.mark.parametrize('dtype', ERRORS, ids=str)
def test_the_kernels_add_the_update_of_each_tokens_own_slot(dtype: torch.dtype) -> None:
    for seed in range(CASES):
        case = Case.random(seed, dtype)
        assert case.error() < ERRORS[dtype], case


@needs_triton
def test_an_adapter_that_holds_nan_changes_only_its_own_tokens() -> None:
    case = Case(0, torch.float32, (1, 2, 1, 0, 2), 3, 40, 24, 4)
    y, x, a, b, token_slots = case.tensors()
    expected = y[0].clone() + exact_update(x[0], a, b, token_slots, case.width)
    a[case.width:2 * case.width], b[case.width:2 * case.width] = float('nan'), float('inf')
    add_update(y, x, a, b, token_slots, case.width)
    others = token_slots != 1
    torch.testing.assert_close(y[0, others], expected[others], rtol=1e-4, atol=1e-4)
    assert y[0, ~others].isnan().all()


@needs_triton
def test_the_inputs_may_be_a_part_of_wider_rows() -> None:
    case = Case(1, torch.float32, (1, 0, 2), 3, 40, 24, 4)
    y, x, a, b, token_slots = case.tensors()
    expected = add_update(y.clone(), x, a, b, token_slots, case.width)
    wider = torch.zeros(1, 3, 100, device=DEVICE)
    wider[:, :, 30:70] = x
    found = add_update(y.clone(), wider[:, :, 30:70], a, b, token_slots, case.width)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('inputs', [16, 2048, 14336])
@pytest.mark.parametrize('tokens', [1, 16, 17, 512])
def test_the_memory_of_all_splits_is_bounded(tokens: int, inputs: int) -> None:
    found = splits(tokens, inputs)
    assert 1 <= found <= MAX_PROGRAMS
    assert found == 1 or inputs / found >= SPLIT_INPUTS
    assert found * tokens <= max(MAX_PROGRAMS * ROW_TILE, tokens)
