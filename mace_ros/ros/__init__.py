# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The node, and what speaks to it: all that knows rclpy, and nothing that knows torch."""
