# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The model: packed passes, attention, KV cache, LoRA, quantisation, loading."""
