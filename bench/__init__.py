# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Benchmarks: what the promises of mace_ros are measured with.

Each one writes ``bench/results/<name>.json`` with every sample and with checks computed
from them; ``python -m bench.report`` reads those files. How and what is measured is told
in ``docs/performance.md``.
"""

import os

# Before torch is loaded, for all systems alike, as the node does: OpenMP's threads spin only
# shortly while they wait for each other. Spinning for long they stretch every step many times
# over as soon as anything else runs on the machine; sleeping at once they are half as fast.
os.environ.setdefault('GOMP_SPINCOUNT', '20000')
