# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Attention on a CPU and its gradients are those of PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from mace_ros.model import cpu_attention
from mace_ros.model.attention import attend, SHAPE_MULTIPLE, TILED_QUERIES
from mace_ros.model.cpu_attention import attend_causally, causal_mask, is_faster


@pytest.mark.parametrize('scaling', [None, 0.3])
@pytest.mark.parametrize('heads, kv_heads', [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize('before', [0, 5])
@pytest.mark.parametrize('tokens', [1, 2, 17])
def test_output_and_gradients_are_those_of_pytorch(
        tokens: int, before: int, heads: int, kv_heads: int, scaling: float | None) -> None:
    torch.manual_seed(0)
    shapes = [(heads, 8), (kv_heads, 8), (kv_heads, 12)]     # values have another size
    given = [torch.randn(1, n, count, size).transpose(1, 2).contiguous().transpose(1, 2)
             for (n, size), count in zip(shapes, [tokens] + 2 * [before + tokens], strict=True)]
    ours = [x.clone().requires_grad_() for x in given]
    theirs = [x.clone().requires_grad_() for x in given]
    weight = torch.randn(1, heads, tokens, 12)

    y = attend_causally(*ours, scaling)
    y.backward(weight)

    seen = torch.tensor([[k <= before + q for k in range(before + tokens)]
                         for q in range(tokens)])
    expected = F.scaled_dot_product_attention(
        *theirs, attn_mask=seen, enable_gqa=True, scale=scaling)
    expected.backward(weight)
    torch.testing.assert_close(y, expected)
    for x, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, other.grad)


def test_sequences_behind_one_mask_attend_as_in_pytorch() -> None:
    torch.manual_seed(0)
    given = [torch.randn(1, heads, 11, 8) for heads in (6, 2, 2)]
    ours, theirs = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    mask = causal_mask(11, 11, given[0].device)
    mask[7:, 2:7] = False       # two sequences with the same prefix of two tokens
    weight = torch.randn(1, 6, 11, 8)

    y = attend_causally(*ours, None, mask)
    y.backward(weight)

    expected = F.scaled_dot_product_attention(*theirs, attn_mask=mask, enable_gqa=True)
    expected.backward(weight)
    torch.testing.assert_close(y, expected)
    for x, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, other.grad)


def test_only_training_in_bfloat16_uses_the_plain_products() -> None:
    query = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16)
    assert not is_faster(query)
    assert is_faster(query.requires_grad_())
    assert not is_faster(torch.randn(1, 2, 5, 8, requires_grad=True))
    with torch.no_grad():
        assert not is_faster(query)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('before', [0, 5, 64])
@pytest.mark.parametrize('tokens', [TILED_QUERIES - 1, TILED_QUERIES, TILED_QUERIES + 6])
def test_bfloat16_shapes_are_padded_without_changing_the_result(
        tokens: int, before: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch may keep a kernel for each shape for ever."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, count, 16) for heads, count in (
        (4, tokens), (2, before + tokens), (2, before + tokens)))
    mask = causal_mask(tokens, before + tokens, query.device)
    if masked:      # as for packed sequences
        mask[:, 1:4] = False
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True)
    shapes = []
    original = F.scaled_dot_product_attention

    def recording(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                  **others: object) -> torch.Tensor:
        shapes.append((q.shape[2], k.shape[2]))
        return original(q, k, v, **others)      # type: ignore[arg-type]

    monkeypatch.setattr(F, 'scaled_dot_product_attention', recording)
    given = [x.bfloat16().requires_grad_() for x in (query, key, value)]
    with torch.no_grad():
        y = attend(*given, mask if masked else None, None, None, None)
    torch.testing.assert_close(y.float(), expected, atol=0.03, rtol=0.03)
    [lengths] = shapes
    assert all(n % SHAPE_MULTIPLE == 0 for n in lengths) == (tokens >= TILED_QUERIES)
    if masked:
        monkeypatch.setattr(cpu_attention, 'MAX_TOKENS', 0)   # or the plain products are used
        attend(*given, mask, None, None, None).sum().backward()
        assert all(bool(x.grad.isfinite().all()) for x in given)
