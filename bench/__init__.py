# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Benchmarks: what the promises of mace_ros are measured with.

Each one writes ``bench/results/<name>.json`` with every sample and with checks computed
from them; ``python -m bench.report`` reads those files. How and what is measured is told
in ``docs/performance.md``.
"""

import os

# Before torch is loaded, for all systems alike: threads that spin while they wait for each
# other stretch every step many times over as soon as anything else runs on the machine
# (measured: p99 of a decode step 350 ms instead of 37); alone it makes no difference.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
