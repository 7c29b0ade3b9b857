# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What is kept on disk: journal and adapter versions. All SQL is here."""
