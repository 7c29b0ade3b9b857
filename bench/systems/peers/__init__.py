# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What people use today, under the same load: each peer in a process of its own."""
