# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Memory: what prefix sharing, one budget, recomputation and KV pruning save, and their cost.

Results: bench/results/memory.json.
"""
