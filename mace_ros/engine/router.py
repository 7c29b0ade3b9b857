# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which adapter version answers a query."""

from __future__ import annotations

from dataclasses import dataclass

from mace_ros.api.settings import AdapterSettings
from mace_ros.learning.question import questions
from mace_ros.learning.scope import Scopes
from mace_ros.memory.adapter_slots import AdapterSlots, LiveVersion
from mace_ros.store.records import Messages


@dataclass(frozen=True)
class Route:
    """
    The version that answers a query, and why.

    ``version`` is pinned. ``correction_id`` names the learned correction that the question
    resembles, '' if there is none; ``similarity`` is that to the nearest one, in scope or not.
    ``out_of_scope`` tells that a live version was passed over, since the question is outside its
    scope.
    """

    version: LiveVersion
    correction_id: str = ''
    similarity: float = 0.0
    out_of_scope: bool = False


class Router:
    """Decides once per query: its profile's version, the robot's, or the base model."""

    def __init__(self, slots: AdapterSlots, scopes: Scopes) -> None:
        """Route between the versions in these slots, by their scopes."""
        self._slots, self._scopes = slots, scopes

    def base(self) -> Route:
        """Pin the base model."""
        return Route(self._slots.pin(None))

    def release(self, version: LiveVersion) -> None:
        """Undo the pin of a route."""
        self._slots.unpin(version)

    def route(self, profile: str, messages: Messages, settings: AdapterSettings) -> Route:
        """Pin the first version in whose scope the last question of a conversation lies."""
        readings, nearest, passed = questions(messages), 0.0, False
        for owner in dict.fromkeys((profile, '')):
            in_scope, match = self._scopes.match(owner, readings, settings)
            if match is not None:
                nearest = max(nearest, match.similarity)
            if in_scope:
                version, drew_on = self._slots.pin(owner), ''
                if version.version and match is not None and (
                        match.similarity >= settings.scope_threshold):
                    drew_on = match.correction_id
                return Route(version, drew_on, nearest, passed)
            live = self._slots.live(owner)
            passed = passed or (live.profile == owner and live.version > 0)
        return Route(self._slots.pin(None), similarity=nearest, out_of_scope=passed)
