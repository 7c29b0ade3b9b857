# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The storage folder: journal and adapter versions. No SQL is written outside this package."""
