# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What is measured of the node and of its device; no torch and no rclpy in here."""
