# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Measurements of the node and its device: latency, counters, health, traces."""
