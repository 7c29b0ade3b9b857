# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Peers: widely used systems, each in its own process, under the same load."""
