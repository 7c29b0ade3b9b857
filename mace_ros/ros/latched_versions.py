# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What a late subscriber to ``~/adapter_version`` finds."""

from __future__ import annotations

from mace_ros.api.events import AdapterVersion, VersionState


class LatchedVersions:
    """
    Keeps the live version of every profile among the last events that were published.

    A transient-local topic keeps its last ``depth`` messages, whatever they are about. So
    that no profile's drops out behind those of busier profiles, it is published again.
    """

    def __init__(self, depth: int) -> None:
        """``depth`` is that of the topic; it must be above the number of profiles."""
        self._depth = depth
        self._published = 0
        self._newest: dict[str, tuple[int, AdapterVersion]] = {}    # by profile; oldest first

    def to_publish(self, event: AdapterVersion) -> list[AdapterVersion]:
        """Return what to publish, in this order, for an event that has just happened."""
        due = [self._add(event)]
        while True:
            position, oldest = next(iter(self._newest.values()), (self._published, event))
            if position >= self._published - self._depth or len(self._newest) > self._depth:
                return due
            due.append(self._add(oldest))

    def _add(self, event: AdapterVersion) -> AdapterVersion:
        # One that was trained in vain, or taken back, does not replace the one that serves.
        if event.state is VersionState.PUBLISHED:
            self._newest.pop(event.profile, None)
            # Nor has a profile that is served the robot's version a place on the topic.
            if event.version or not event.profile:
                self._newest[event.profile] = (self._published, event)
        self._published += 1
        return event
