# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Fine-tune steps that can be suspended between any two segments."""
