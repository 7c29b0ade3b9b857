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
        """
        Return the version that answers the last question of a conversation.

        It is the first one in whose scope the question lies: of the profile, then of the robot. If
        there is none, a version that was trained for every question answers, in the same order.
        """
        asked, nearest = questions(messages), 0.0
        owners = tuple(dict.fromkeys((profile, '')))
        for owner in owners:
            found, similarity = self._live.match(owner, asked, settings)
            nearest = max(nearest, similarity)
            if found is not None:
                return Route(found.version,
                             '' if found.version == BASE else found.match.correction_id,
                             nearest, self._passes_over(profile, owner))
        for owner in owners:
            version = self._live.everywhere(owner, settings.scope)
            if version and not self._live.excludes(owner, asked):
                return Route(ServedVersion(owner, version), similarity=nearest,
                             out_of_scope=self._passes_over(profile, owner))
        return Route(similarity=nearest, out_of_scope=any(map(self._live.newest, owners)))

    def _passes_over(self, profile: str, owner: str) -> bool:
        """Return whether the profile has versions, but another owner's version answers."""
        return owner != profile and self._live.newest(profile) > 0
