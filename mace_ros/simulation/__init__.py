# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The same scheduler under a virtual clock: a trace is replayed on a device that takes time."""
