# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What was corrected, what was learned from it, and where both are kept."""
