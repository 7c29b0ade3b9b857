# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The measured cost model of this device, kept between starts."""

from __future__ import annotations

from contextlib import suppress
import json
import os
from pathlib import Path

from mace_ros.scheduling.cost_file import from_dict, to_dict
from mace_ros.scheduling.cost_model import CostModel


class MeasuredDevice:
    """
    The file of a cost model in the storage folder.

    It only saves time: without it, or with one that cannot be read, a start measures again.
    """

    def __init__(self, path: Path, identity: str) -> None:
        """``identity`` names all that the times depend on; another one's file is not used."""
        self._path, self._identity = path, identity

    def load(self) -> CostModel | None:
        """Return what was known at the last :meth:`save`, if anything."""
        try:
            data = json.loads(self._path.read_text())
            # The pace is that of the moment, which is over.
            return (from_dict(CostModel, data['cost'] | {'recent': []})
                    if data['identity'] == self._identity else None)
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def save(self, cost: CostModel) -> None:
        """Write the file, or leave the old one if that fails."""
        temporary = self._path.with_suffix('.part')
        with suppress(OSError):
            temporary.write_text(json.dumps({'identity': self._identity, 'cost': to_dict(cost)}))
            os.replace(temporary, self._path)
