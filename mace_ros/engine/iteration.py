# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The outcome of an iteration."""

from __future__ import annotations

from dataclasses import dataclass

from mace_ros.api.events import Event


@dataclass(frozen=True)
class Iteration:
    """
    The outcome of ``Engine.step``: events to publish, and when to call it again.

    ``wake_at`` is a time on the engine's clock; None waits for the ``wake`` function.
    """

    events: list[Event]
    wake_at: float | None
