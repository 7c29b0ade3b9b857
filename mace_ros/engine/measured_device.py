# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The measured cost model of this device, kept between starts."""

from __future__ import annotations

from contextlib import suppress
import hashlib
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from mace_ros.scheduling.cost_file import from_dict, to_dict
from mace_ros.scheduling.cost_model import CostModel


class MeasuredDevice:
    """
    The file of a cost model, which all nodes of this device share that run it in the same way.

    It only saves time: without it, or with one that cannot be read, a start measures again.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """``identity`` names all that the times depend on; each has a file of its own."""
        name = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self._path = folder / f'device-{name}.json'

    def load(self) -> CostModel | None:
        """Return what was known at the last :meth:`save`, if anything."""
        try:
            data = json.loads(self._path.read_text())
            # The pace is that of the moment, which is over.
            return from_dict(CostModel, data | {'recent': []})
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def save(self, cost: CostModel) -> None:
        """Write the file, or leave the old one if that fails."""
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # A name of its own: another node may save at the same moment.
            with TemporaryDirectory(dir=self._path.parent) as folder:
                written = Path(folder, self._path.name)
                written.write_text(json.dumps(to_dict(cost)))
                os.replace(written, self._path)
