# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The systems that run the drift trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class System:
    """Parameters that differ from the node's defaults, and whether the trace is overloaded."""

    values: Mapping[str, Any] = field(default_factory=dict)
    overloaded: bool = False


# The order of corrections matters only if more of them wait than fit into one job. The
# overloaded systems get questions faster than corrections can be learned.
SYSTEMS: Mapping[str, System] = {
    'mace': System(),
    'continuous': System({'scheduler.policy': 'continuous'}),
    'periodic': System({'scheduler.policy': 'periodic'}),
    'mace, no drift': System({'drift.min_budget': 1.0}),
    'mace, overloaded': System(overloaded=True),
    'continuous, overloaded': System({'scheduler.policy': 'continuous'}, overloaded=True),
    'mace, overloaded, no priority': System({'finetune.order': 'arrival'}, overloaded=True),
}
