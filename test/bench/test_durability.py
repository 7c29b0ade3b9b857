# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""kill -9 of a node: no acknowledged correction is lost, and no version is half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.graph import ENVIRONMENT
from support.records import correction
import torch

from bench.durability.checks import checks
from bench.durability.kills import kill_repeatedly
from bench.durability.storage import inspect_storage, lost_corrections, outdated_profiles
from mace_ros.api.events import CorrectionState
from mace_ros.store.adapter_store import AdapterStore, WEIGHTS
from mace_ros.store.journal import Journal
from mace_ros.store.layout import JOURNAL
from mace_ros.store.records import VersionRecord


@pytest.mark.timeout(900)
def test_a_killed_node_has_lost_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three kills; `python -m bench.durability` has fifty."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    samples = kill_repeatedly(
        tmp_path, str(model_folder), ('saving', 'recording', 'publishing'), seed=1)
    assert len(samples['kills']) == 3
    assert samples['kills'][-1]['acknowledged'] > 0 and samples['kills'][-1]['live']
    promised = [c for c in checks(samples) if c.target == '<= 0']
    assert len(promised) == 6
    assert not [(c.name, c.note) for c in promised if not c.holds]


def test_the_checks_find_damage_by_a_kill(tmp_path: Path) -> None:
    """A lost correction, an older version and a half-written version are each found."""
    store = AdapterStore(tmp_path)
    with Journal(tmp_path / JOURNAL) as journal:
        journal.accept(correction('k1'))
        for version in (1, 2):
            saved = store.save('', version, {'weight': torch.ones(4)}, {})
            journal.publish(VersionRecord(
                '', version, version - 1, path=saved.path, sha256=saved.sha256))
        store.save('ann', 1, {'weight': torch.ones(4)}, {})
        for name, version in (('held', 1), ('not held', 3)):
            journal.accept(correction(name))
            journal.set_correction(name, CorrectionState.LEARNED, adapter_version=version)
    sha256 = saved.sha256
    (tmp_path / 'adapters/_robot/.tmp-v000003').mkdir()
    snapshot = inspect_storage(tmp_path)
    assert snapshot.live == {'': (2, sha256)} and not snapshot.damaged
    assert snapshot.leftovers == ['adapters/_robot/.tmp-v000003']
    assert [path.split('/')[-1] for path in snapshot.unrecorded] == ['v000001']
    assert (tmp_path / 'adapters/_robot/.tmp-v000003').exists()      # nothing was repaired
    assert lost_corrections(snapshot, {'k1', 'k2', 'held', 'not held'}) == ['k2', 'not held']
    for announced in ((2, sha256), (1, 'another')):
        assert not outdated_profiles(snapshot, {'': announced})
    for announced in ((3, 'new'), (2, 'another')):
        assert outdated_profiles(snapshot, {'': announced})
    assert outdated_profiles(snapshot, {'ann': (1, sha256)})
    for path in tmp_path.glob(f'adapters/*/v000001/{WEIGHTS}'):
        path.write_bytes(path.read_bytes()[:-1])
    assert len(inspect_storage(tmp_path).damaged) == 2
