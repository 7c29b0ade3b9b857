# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The data of the engine's interface: events, settings, and validation of input."""
