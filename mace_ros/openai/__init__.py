# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An HTTP server that speaks OpenAI's API to the node; see docs/guides/openai.md."""
