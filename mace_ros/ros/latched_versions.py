# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The history of ``~/adapter_version`` that a late subscriber receives."""

from __future__ import annotations

from mace_ros.api.events import AdapterVersion, VersionState


class LatchedVersions:
    """
    Keeps the live versions of the robot and of its profiles in the history of the topic.

    A transient-local topic keeps its last ``depth`` messages of any content. A live version is
    published again before events of busier profiles push it out. If there are more profiles, those
    whose version was published longest ago have no place in the history; the robot always has.
    """

    def __init__(self, depth: int) -> None:
        """``depth`` is that of the topic, at least 2."""
        self._depth = depth
        self._published = 0
        # Position in the history and event by profile, oldest first.
        self._live: dict[str, tuple[int, AdapterVersion]] = {}

    def to_publish(self, event: AdapterVersion) -> list[AdapterVersion]:
        """Return the events to publish, in this order, when ``event`` has occurred."""
        events = [self._add(event)]
        if len(self._live) > self._depth:
            del self._live[next(profile for profile in self._live if profile)]
        while True:
            position, oldest = next(iter(self._live.values()), (self._published, event))
            if position >= self._published - self._depth:
                return events
            events.append(self._add(oldest))

    def _add(self, event: AdapterVersion) -> AdapterVersion:
        # Rejected and rolled-back versions do not replace the live one.
        if event.state is VersionState.PUBLISHED:
            self._live.pop(event.profile, None)
            # A profile that is served by the robot's version needs no place in the history.
            if event.version or not event.profile:
                self._live[event.profile] = (self._published, event)
        self._published += 1
        return event
