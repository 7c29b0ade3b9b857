# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The systems under test: engines in this process, a node in its own process, and peers."""
