# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Shapes of models, from which the simulator derives bytes and operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """
    A decoder with gated MLPs and grouped-query attention, as in its ``config.json``.

    ``source`` is the hub id of that configuration.
    """

    name: str
    source: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True   # whether head and embedding share their weights

    @property
    def query_width(self) -> int:
        """Width of the queries of one token in one layer."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys (and of the values) of one token in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def linear_parameters(self) -> int:
        """Weights of one layer's linear projections, without biases and norms."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_parameters(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Weights of all linear projections, the embedding and the head."""
        return (self.layers * self.linear_parameters
                + self.head_parameters * (1 if self.tied else 2))

    def lora_parameters(self, rank: int) -> int:
        """Return the LoRA weights of one layer whose linear projections are all adapted."""
        ends = (2 * self.hidden + self.query_width    # inputs and outputs of q and o, k and v, MLP
                + 2 * (self.hidden + self.kv_width)
                + self.query_width + 3 * (self.hidden + self.intermediate))
        return rank * ends


# layers, hidden, intermediate, heads, KV heads, head dimension, vocabulary
MODELS: Mapping[str, ModelShape] = {m.name: m for m in (
    ModelShape('smollm2-135m', 'HuggingFaceTB/SmolLM2-135M', 30, 576, 1536, 9, 3, 64, 49152),
    ModelShape('smollm2-360m', 'HuggingFaceTB/SmolLM2-360M', 32, 960, 2560, 15, 5, 64, 49152),
    ModelShape('smollm2-1.7b', 'HuggingFaceTB/SmolLM2-1.7B', 24, 2048, 8192, 32, 32, 64, 49152),
    ModelShape('llama-3.2-1b', 'meta-llama/Llama-3.2-1B', 16, 2048, 8192, 32, 8, 64, 128256),
    ModelShape('llama-3.2-3b', 'meta-llama/Llama-3.2-3B', 28, 3072, 8192, 24, 8, 128, 128256),
    ModelShape('llama-3-8b', 'meta-llama/Meta-Llama-3-8B', 32, 4096, 14336, 32, 8, 128, 128256,
               tied=False),
    ModelShape('qwen2.5-0.5b', 'Qwen/Qwen2.5-0.5B', 24, 896, 4864, 14, 2, 64, 151936),
    ModelShape('qwen2.5-1.5b', 'Qwen/Qwen2.5-1.5B', 28, 1536, 8960, 12, 2, 128, 151936),
    ModelShape('qwen2.5-3b', 'Qwen/Qwen2.5-3B', 36, 2048, 11008, 16, 2, 128, 151936),
    ModelShape('qwen2.5-7b', 'Qwen/Qwen2.5-7B', 28, 3584, 18944, 28, 4, 128, 152064,
               tied=False),
    ModelShape('qwen3-0.6b', 'Qwen/Qwen3-0.6B', 28, 1024, 3072, 16, 8, 128, 151936),
    ModelShape('qwen3-1.7b', 'Qwen/Qwen3-1.7B', 28, 2048, 6144, 16, 8, 128, 151936),
    ModelShape('qwen3-4b', 'Qwen/Qwen3-4B', 36, 2560, 9728, 32, 8, 128, 151936),
)}
