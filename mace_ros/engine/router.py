# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which adapter version answers a query."""

from __future__ import annotations

from dataclasses import dataclass

from mace_ros.api.settings import AdapterSettings
from mace_ros.learning.live_versions import LiveVersions
from mace_ros.learning.question import questions
from mace_ros.memory.adapter_slots import BASE, ServedVersion
from mace_ros.store.records import Messages


@dataclass(frozen=True)
class Route:
    """
    The version that answers a query, and why.

    ``correction_id`` names the learned correction that the question resembles, '' if there is
    none; ``similarity`` is that to the nearest one, in scope or not. ``out_of_scope`` tells that
    live versions were passed over, since the question is outside their scope.
    """

    version: ServedVersion = BASE
    correction_id: str = ''
    similarity: float = 0.0
    out_of_scope: bool = False


class Router:
    """Decides between the versions of the query's profile, those of the robot and the base."""

    def __init__(self, live: LiveVersions) -> None:
        """Route between the live versions, by their scopes."""
        self._live = live

    def route(self, profile: str, messages: Messages, settings: AdapterSettings) -> Route:
        """Return the first version in whose scope the last question of a conversation lies."""
        asked, nearest, passed_over = questions(messages), 0.0, False
        for owner in dict.fromkeys((profile, '')):
            found, similarity = self._live.match(owner, asked, settings)
            nearest = max(nearest, similarity)
            if found is not None:
                correction_id = found.match.correction_id if found.match is not None and (
                    found.version != BASE) else ''
                return Route(found.version, correction_id, nearest, passed_over)
            passed_over = passed_over or self._live.newest(owner) > 0
        return Route(similarity=nearest, out_of_scope=passed_over)
