# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: options, the skeleton of a run, results and arrivals."""
