# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What code would ask of a CUDA device, recorded on the ``meta`` device, which computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations without a kernel.
FREE = {
    'alias', 'as_strided', 'detach', 'empty', 'empty_like', 'expand', 'lift_fresh', 'new_empty',
    'permute', 'select', 'slice', 'split', 'split_with_sizes', 'squeeze', 't', 'transpose',
    'unbind', 'unsqueeze', 'view', 'view_as_real', '_unsafe_view', '_reshape_alias'}
# Kernels of operations of this package, if more than one.
LAUNCHES = {'mace_ros::attend_paged': 2, 'mace_ros::add_lora': 2}
# Operations whose result, or its size, the host reads.
HOST_READS = {'_local_scalar_dense', 'nonzero', 'is_nonzero', 'equal', 'unique2', '_unique2',
              'masked_select', 'bincount'}


class DeviceLog(TorchDispatchMode):
    """
    Records kernels, copies from the host, and what a captured graph must not contain.

    ``faults`` lists reads by the host, tensors on a second device, and calls of
    ``scaled_dot_product_attention`` that CUDA computes by plain products in fp32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.uploads = 0
        self.faults: list[str] = []
        self._attention = _AttentionLog(self)

    def __enter__(self) -> DeviceLog:
        """Begin to record."""
        super().__enter__()
        self._attention.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        """End."""
        self._attention.__exit__(*args)
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """Record an operation, and run it."""
        name = func.name().removeprefix('aten::').split('.')[0]
        result = (_int4_product(*args) if name == '_weight_int4pack_mm'
                  else func(*args, **(kwargs or {})))
        given, made = (_places(x) for x in ((args, kwargs), result))
        if name in ('copy_', '_to_copy', '_foreach_copy_') and given | made == {'cpu', 'meta'}:
            self.uploads += 1
            if made == {'cpu'}:
                self.faults.append(f'{name} reads from the device')
        elif 'cpu' in given | made and 'meta' in given | made:
            self.faults.append(f'{name} takes tensors of two devices')
        elif name in HOST_READS or (name == 'repeat_interleave' and _reads_size(args, kwargs)) or (
                name == 'index' and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.faults.append(f'{name} waits for the device')
        if name not in FREE and 'meta' in given | made:
            self.kernels += [name] * LAUNCHES.get(name, 1)
        return result


class _AttentionLog(TorchFunctionMode):
    """Checks calls of SDPA and returns an empty result for each."""

    def __init__(self, log: DeviceLog) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """Check a call of SDPA."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        reason = runs_as_plain_products(*args, **(kwargs or {}))
        if reason:
            self._log.faults.append(f'attention {reason}')
        query, key, value = args[:3]
        recorded = list(self._log.kernels)
        # Gradients reach all inputs.
        result = query.new_empty(*query.shape[:3], value.shape[3]) + (
            query.sum() + key.sum() + value.sum())
        self._log.kernels[:] = [*recorded, 'scaled_dot_product_attention']
        return result


def runs_as_plain_products(query: Tensor, key: Tensor, value: Tensor,
                           attn_mask: Tensor | None = None, *, is_causal: bool = False,
                           scale: float | None = None, enable_gqa: bool = False) -> str:
    """
    Return why neither of CUDA's two fused kernels takes a call; empty if one does.

    The rules are those of ``sdp_utils.cpp`` in PyTorch 2.5 to 2.13, for 16-bit values.
    """
    grouped = query.shape[1] != key.shape[1]
    if grouped and attn_mask is not None:
        return 'with a mask and fewer KV heads'
    if grouped and query.shape[3] != value.shape[3]:
        return 'with fewer KV heads and values of another size'
    if attn_mask is None and is_causal and query.shape[2] > key.shape[2]:
        return 'with more queries than keys'
    return ''


def _int4_product(rows: Tensor, packed: Tensor, group: int, scales_and_zeros: Tensor) -> Tensor:
    """Return an empty product; torch 2.13 knows its shape only under FakeTensorMode."""
    eighths, columns, lanes, pairs = packed.shape
    inputs = columns * pairs * 32
    assert (lanes, packed.dtype) == (32, torch.int32) and rows.shape[1] == inputs
    assert rows.dtype == scales_and_zeros.dtype == torch.bfloat16 and rows.is_contiguous()
    assert scales_and_zeros.shape == (inputs // group, eighths * 8, 2)
    return rows.new_empty(len(rows), eighths * 8)


def _places(tree: Any) -> set[str]:
    """Return the devices of the tensors in a tree; numbers as tensors count for none."""
    return {t.device.type for t in tree_leaves(tree) if isinstance(t, Tensor) and t.dim()}


def _reads_size(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    """Return whether a call of repeat_interleave by a tensor has no size of the output."""
    counts = [a for a in args if isinstance(a, Tensor)]
    return not (kwargs or {}).get('output_size') and len(counts) > 0
