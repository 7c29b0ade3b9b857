# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Other ways to edit the same model, in plain transformers and PEFT."""
