# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a person types: ask, correct, monitor and journal."""
