# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Limits on a GPU: passes, segments, contexts, and serving beside fine-tuning.

The models have random weights in the shapes of Qwen2.5 0.5B, Llama 3.2 1B and 3B and Llama 3 8B,
in bfloat16 and in 4 bits, and an adapter attached. First, each fast path must compute what the
plain one computes. Decoding is compared with the time to read the weights and with HF generate
with PEFT, and paged attention with gathered keys; then an engine serves at three loads, with and
without fine-tuning. At the end stands which claims of the documentation this confirms. The shape
"tiny" tests the benchmark itself on any device. Each part is recorded as it ends.
Results: bench/results/gpu.json.
"""
