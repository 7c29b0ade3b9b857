# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
``mace_node`` with a sixth of the anchors, so that its first correction is learned sooner.

The anchors are replaced before any module imports them. Everything else is the node as shipped,
which test_colcon.py starts unchanged.
"""

import runpy

from mace_ros.learning import anchors

anchors.ANCHORS = anchors.ANCHORS[::6]
runpy.run_module('mace_ros.ros.node', run_name='__main__')
