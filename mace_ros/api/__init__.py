# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What crosses the border: events, settings and their validation."""
