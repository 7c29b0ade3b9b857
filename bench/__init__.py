# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Benchmarks that measure what mace_ros promises.

Each benchmark writes ``bench/results/<name>.json`` with all samples and the checks computed
from them; ``python -m bench.report`` reads these files. ``docs/evidence/`` describes what is
measured and how.

- ``common/``: options, the skeleton of a run, results and their rendering, arrivals
- ``systems/``: the systems under test: engines, a node process, and the peers
- one module or folder per benchmark
"""

import os

# This must be set before torch is loaded, as the node does; it applies to all compared systems.
# OpenMP's threads spin for a moment before they sleep; by default they would spin for longer, and
# take the cores from other processes of the bench.
os.environ.setdefault('GOMP_SPINCOUNT', '20000')
