# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The ROS node and its client. Modules here import rclpy, and do not import torch."""
