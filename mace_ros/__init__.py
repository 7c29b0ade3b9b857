# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A language model for robots that answers and learns on one GPU.

``mace_ros.ros`` is the ROS 2 node; ``mace_ros.engine.builder.build_engine`` returns the same engine
without ROS.
"""

from pkgutil import extend_path

# In a source tree this package has no ``msg``, which is generated at build time:
# take it from where the package is installed.
__path__ = extend_path(__path__, __name__)

__version__ = '0.1.0'
