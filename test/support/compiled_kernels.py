# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Compile the Triton kernels to the machine code of several GPUs, on a machine without any.

Run as a program, without ``TRITON_INTERPRET``. It launches what the package launches, behind a
driver that drops each launch, and prints the shared memory of each kernel in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import cycle
import json
from types import SimpleNamespace
from typing import Any

from packaging.version import Version
import torch
import triton
from triton.backends.compiler import GPUTarget

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model import (
    block_kernels,
    expert_kernels,
    layer_kernels,
    mixed_lora_kernels,
    paged_kernels,
)
from mace_ros.model.mixed_lora import ROW_TILE, splits
from mace_ros.model.paged_attention import MAX_SPLITS, SPLIT_TOKENS

# Of a GeForce (sm_86, sm_89), which has the least.
SHARED_BYTES = 99 * 1024
# Of an Orin, for which all kernels are compiled; and of GPUs of data centres and a GeForce, for one
# kernel of each kind.
ORIN, OTHERS = 87, (90, 89, 80)
# Precision, heads, KV heads, head size, splits, softcap and sinks.
ATTENTION = {
    'llama': (torch.bfloat16, 32, 8, 128, 8, None, False),
    'fp32': (torch.float32, 4, 2, 64, 2, None, False),
    'gemma2': (torch.bfloat16, 8, 4, 256, 1, 50.0, False),
    'gpt-oss': (torch.bfloat16, 64, 8, 64, 32, None, True),
    'phi': (torch.float16, 32, 32, 80, 4, None, False)}

# Precision, inputs, outputs, rows of A in a slot, tokens.
ADAPTERS = {
    'adapters': (torch.bfloat16, 4096, 6144, 24, 4),
    'fp32-adapters': (torch.float32, 64, 96, 4, 40),
    'wide-adapters': (torch.bfloat16, 14336, 4096, 192, 512)}
# Precision, heads, KV heads, head size, rotated values of a head, the first of them, whether the
# values of a pair are neighbours, and whether they share a cosine.
ROTARY = {
    'rotary': (torch.bfloat16, 32, 8, 128, 128, 0, False, False),
    'partial-rotary': (torch.float16, 32, 32, 80, 32, 0, False, False),
    'late-rotary': (torch.bfloat16, 16, 16, 192, 64, 128, True, True)}
# Precision, shape, whether the weight is relative to 1, and whether the mean is subtracted.
NORMS = {
    'norm': (torch.bfloat16, (1, 4, 3072), False, False),
    'head-norm': (torch.float16, (1, 4, 8, 256), True, True)}
# Precision, heads, KV heads, head size, softcap and sinks, tokens of a chunk.
BLOCKS = {
    'chunk': (torch.bfloat16, 64, 8, 64, None, True, 128),
    'fp32-chunk': (torch.float32, 8, 4, 256, 50.0, False, 5)}
# Precision, inputs, outputs, whether the weights are transposed and have biases.
EXPERTS = {
    'experts': (torch.bfloat16, 2048, 1536, False, False),
    'transposed-experts': (torch.float16, 2880, 5760, True, True)}


class Driver:
    """A GPU that runs nothing."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget('cuda', capability, 32)
        self.shared: list[int] = []      # bytes of each kernel
        self.utils = SimpleNamespace(
            load_binary=self._load, unload_module=lambda module: None,
            get_device_properties=lambda device: {'max_shared_mem': SHARED_BYTES})

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch     # Triton keeps what it compiled for each device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None

    def _load(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        assert kernel[:4] == b'\x7fELF'
        self.shared.append(shared)
        loaded = object(), object(), 0, 0       # module, function, registers, spills
        return loaded if Version(triton.__version__) < Version('3.4') else (*loaded, 1024)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without values."""
    return torch.empty(shape, dtype=dtype, device='meta')


def attend(dtype: torch.dtype, heads: int, kv_heads: int, size: int, splits: int,
           softcap: float | None, sinks: bool) -> None:
    """Launch the kernels of paged attention."""
    rows, values = 4, partial(empty, dtype=dtype)
    floats, integers = partial(empty, dtype=torch.float32), partial(empty, dtype=torch.long)
    paged_kernels.launch(
        values(rows, heads, size), floats(rows, heads, splits, size), floats(rows, heads, splits),
        values(rows, heads, size), values(640, kv_heads, size), values(640, kv_heads, size),
        integers(rows, 8), integers(rows), values(heads) if sinks else None, scale=size ** -0.5,
        window=2 ** 30, softcap=softcap, block_tokens=BLOCK_TOKENS, split_tokens=SPLIT_TOKENS,
        max_splits=MAX_SPLITS)


def adapt(dtype: torch.dtype, inputs: int, outputs: int, width: int, tokens: int) -> None:
    """Launch the kernels of adapters."""
    slots, values = 10, partial(empty, dtype=dtype)
    mixed_lora_kernels.launch(
        values(tokens, outputs), empty(splits(tokens, inputs), tokens, width, dtype=torch.float32),
        values(tokens, inputs), values(slots * width, inputs), values(slots * width, outputs),
        empty(tokens, dtype=torch.long), row_tile=ROW_TILE)


def rotate(dtype: torch.dtype, heads: int, kv_heads: int, size: int, rotated: int, first: int,
           interleaved: bool, shared: bool) -> None:
    """Launch the kernel of rotary embeddings."""
    tokens, values, angles = 4, partial(empty, dtype=dtype), rotated // (2 if shared else 1)
    layer_kernels.launch_rotation(
        values(1, heads, tokens, size), values(1, kv_heads, tokens, size),
        values(1, kv_heads, tokens, size), values(1, tokens, angles), values(1, tokens, angles),
        values(640, kv_heads, size), values(640, kv_heads, size), empty(tokens, dtype=torch.long),
        first=first, interleaved=interleaved, shared=shared)


def normalize(dtype: torch.dtype, shape: tuple[int, ...], relative: bool, centered: bool) -> None:
    """Launch the kernel of norms."""
    values = partial(empty, dtype=dtype)
    layer_kernels.launch_norm(values(*shape), values(*shape), values(shape[-1]), 1e-6,
                              relative=relative, centered=centered)


def attend_chunk(dtype: torch.dtype, heads: int, kv_heads: int, size: int, softcap: float | None,
                 sinks: bool, tokens: int) -> None:
    """Launch the kernel of chunks."""
    values, integers = partial(empty, dtype=dtype), partial(empty, dtype=torch.long)
    block_kernels.launch(
        values(tokens, heads, size), values(heads, tokens, size), values(640, kv_heads, size),
        values(640, kv_heads, size), integers(300), integers(tokens), integers(tokens),
        integers(300), integers(300), values(heads) if sinks else None, scale=size ** -0.5,
        window=2 ** 30, softcap=softcap)


def mix(dtype: torch.dtype, inputs: int, outputs: int, transposed: bool, biased: bool) -> None:
    """Launch the kernel of experts."""
    values, experts = partial(empty, dtype=dtype), 8
    expert_kernels.launch(
        values(16, outputs), values(4, inputs),
        values(experts, *((inputs, outputs) if transposed else (outputs, inputs))),
        values(experts, outputs) if biased else None, empty(16, dtype=torch.long),
        transposed=transposed)


def main() -> None:
    """Compile all kernels."""
    kinds: list[tuple[Callable[..., None], Mapping[str, tuple[Any, ...]]]] = [
        (attend, ATTENTION), (adapt, ADAPTERS), (rotate, ROTARY), (normalize, NORMS),
        (attend_chunk, BLOCKS), (mix, EXPERTS)]
    found, others = {}, cycle(OTHERS)
    for launch, each in kinds:
        for i, (name, arguments) in enumerate(each.items()):
            for capability in (ORIN, *([] if i else [next(others)])):
                driver = Driver(capability)
                triton.runtime.driver.set_active(driver)
                launch(*arguments)
                found[f'{name} on {capability}'] = driver.shared
    print(json.dumps(found))


if __name__ == '__main__':
    main()
