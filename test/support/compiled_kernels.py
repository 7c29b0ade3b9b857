# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Compile the Triton kernels to the machine code of several GPUs, on a machine without any.

Run as a program, without ``TRITON_INTERPRET``. It launches what the package launches, behind a
driver that drops each launch, and prints the shared memory of each kernel in bytes.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from packaging.version import Version
import torch
import triton
from triton.backends.compiler import GPUTarget

from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model import paged_kernels
from mace_ros.model.paged_attention import MAX_SPLITS, SPLIT_TOKENS

# Of a GeForce (sm_86, sm_89), which has the least.
SHARED_BYTES = 99 * 1024
# An Orin, GPUs of data centres, and a GeForce.
CAPABILITIES = (87, 90, 89, 80)
# Precision, heads, KV heads, head size, splits, softcap and sinks.
LAYERS = {
    'llama': (torch.bfloat16, 32, 8, 128, 8, None, False),
    'fp32': (torch.float32, 4, 2, 64, 2, None, False),
    'gemma2': (torch.bfloat16, 8, 4, 256, 1, 50.0, False),
    'gpt-oss': (torch.bfloat16, 64, 8, 64, 32, None, True),
    'phi': (torch.float16, 32, 32, 80, 4, None, False)}


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


def launch(dtype: torch.dtype, heads: int, kv_heads: int, size: int, splits: int,
           softcap: float | None, sinks: bool) -> None:
    """Launch the kernels of a layer."""
    rows = 4

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device='meta')

    paged_kernels.launch(
        empty(rows, heads, size), empty(rows, heads, splits, size, dtype=torch.float32),
        empty(rows, heads, splits, dtype=torch.float32), empty(rows, heads, size),
        empty(640, kv_heads, size), empty(640, kv_heads, size),
        empty(rows, 8, dtype=torch.long), empty(rows, dtype=torch.long),
        empty(heads) if sinks else None, scale=size ** -0.5, window=2 ** 30, softcap=softcap,
        block_tokens=BLOCK_TOKENS, split_tokens=SPLIT_TOKENS, max_splits=MAX_SPLITS)


def main() -> None:
    """Compile all kernels."""
    found = {}
    for capability, (name, layer) in zip((*CAPABILITIES, CAPABILITIES[0]), LAYERS.items(),
                                         strict=True):
        driver = Driver(capability)
        triton.runtime.driver.set_active(driver)
        launch(*layer)
        found[f'{name} on {capability}'] = driver.shared
    print(json.dumps(found))


if __name__ == '__main__':
    main()
