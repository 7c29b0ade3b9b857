# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The models of the API: the robot, and the profiles that it answers for."""

from __future__ import annotations

from typing import Any

from mace_ros.openai.errors import ApiError
from mace_ros.ros.client import MaceClient

SEPARATOR = ':'     # between the robot's name and a profile


class Models:
    """The names of models; every profile has one, also before it has learned anything."""

    def __init__(self, client: MaceClient, name: str, *, created: int) -> None:
        """``name`` is the robot's; ``created`` is in seconds since the epoch."""
        self._client, self._name, self._created = client, name, created

    def profile(self, model: str) -> str:
        """Return the profile of a model, '' for the robot; raises :class:`ApiError`."""
        robot, separator, profile = model.partition(SEPARATOR) if (
            SEPARATOR not in self._name) else self._split(model)
        if robot != self._name or (separator and not profile):
            raise ApiError(
                404, f'model {model[:64]!r} is not served; {self._name!r} is, and '
                f'{self._name + SEPARATOR}PROFILE for each profile',
                code='model_not_found', param='model')
        return profile

    def _split(self, model: str) -> tuple[str, str, str]:
        """Return robot, separator and profile if the robot's name contains the separator."""
        rest = model.removeprefix(self._name)
        if len(rest) == len(model) or rest[:1] not in ('', SEPARATOR):
            return model, '', ''
        return self._name, rest[:1], rest[1:]

    def all(self) -> list[dict[str, Any]]:
        """Return the robot and the profiles with a version of their own."""
        return [self._described(profile, version.version)
                for profile, version in sorted(self._client.versions().items())]

    def one(self, model: str) -> dict[str, Any]:
        """Return one model; raises :class:`ApiError`."""
        profile = self.profile(model)
        version = self._client.version(profile)
        return self._described(profile, 0 if version is None else version.version)

    def _described(self, profile: str, version: int) -> dict[str, Any]:
        name = f'{self._name}{SEPARATOR}{profile}' if profile else self._name
        return {'id': name, 'object': 'model', 'created': self._created, 'owned_by': 'mace_ros',
                'adapter_version': version}
