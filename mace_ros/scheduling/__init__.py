# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What the device does next: plans, the scheduler, its policies and its cost model."""
