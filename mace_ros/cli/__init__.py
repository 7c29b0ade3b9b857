# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Command-line programs: ask, correct, monitor, voice, journal and the demo."""
