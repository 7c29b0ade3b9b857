# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Plans for the device: the scheduler, its policies and its cost model."""
