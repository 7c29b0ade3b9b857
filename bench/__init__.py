# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Benchmarks: what the promises of mace_ros are measured with.

Each one writes ``bench/results/<name>.json`` with every sample and with checks computed
from them; ``python -m bench.report`` reads those files. How and what is measured is told
in ``docs/performance.md``.
"""
