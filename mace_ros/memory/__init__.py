# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Bookkeeping of device memory in integers: KV blocks, prefix hashes, the budget, adapter slots."""
