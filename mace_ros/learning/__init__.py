# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Learning: corrections in, adapter versions out."""
