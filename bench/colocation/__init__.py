# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Serving and learning on one CPU: the policies of mace_ros and widely used systems.

All systems get the same Poisson arrivals, in interleaved blocks of one run, with an adapter
attached and fine-tuning always pending. Results: bench/results/colocation.json.
"""
