# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What was measured of the device is known at the next start."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.robot import robot_with
from support.virtual_device import VirtualDevice

from mace_ros.api.settings import Settings
from mace_ros.engine import builder
from mace_ros.engine.measured_device import MeasuredDevice


def test_a_saved_cost_model_is_loaded_for_the_same_device_only(tmp_path: Path) -> None:
    cost = VirtualDevice(seed=3).calibrated()
    MeasuredDevice(tmp_path, 'this').save(cost)
    loaded = MeasuredDevice(tmp_path, 'this').load()
    assert loaded is not None and loaded.pass_curve.levels == cost.pass_curve.levels
    assert not loaded.recent       # the pace of the moment
    assert MeasuredDevice(tmp_path, 'another').load() is None


@pytest.mark.parametrize('content', ['', '{', '[]', '1', '{}', '{"pass": 1}'])
def test_a_damaged_file_counts_as_none(content: str, tmp_path: Path) -> None:
    device = MeasuredDevice(tmp_path, 'this')
    device.save(VirtualDevice(seed=3).calibrated())
    [path] = tmp_path.iterdir()
    path.write_text(content)
    assert device.load() is None


def test_a_file_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    device = MeasuredDevice(tmp_path / 'file' / 'folder', 'this')
    device.save(VirtualDevice(seed=3).calibrated())
    assert device.load() is None


def test_the_next_start_of_any_robot_knows_what_was_measured(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings.updated({'storage.model_cache': str(tmp_path / 'cache')})
    with robot_with(settings, tmp_path / 'first') as robot:
        robot.ask('What is your name?')
        levels = robot.engine.parts.cost.pass_curve.levels
    monkeypatch.setattr(builder, 'REFRESH_S', 0.0)
    with robot_with(settings, tmp_path / 'second') as robot:
        assert robot.engine.parts.cost.pass_curve.levels == levels
    # On more threads the device is another one, which is measured.
    with robot_with(settings, tmp_path / 'second', model__threads=2) as robot:
        other = robot.engine.parts.cost.pass_curve
        assert not other.is_empty and other.levels != levels
