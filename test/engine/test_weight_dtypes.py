# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An engine answers, learns and starts again with base weights of every precision."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.precision import WITH_BFLOAT16, WITHOUT_BFLOAT16
from support.robot import robot_with

from mace_ros.api.events import Correction, CorrectionState
from mace_ros.api.settings import Settings

pytestmark = [pytest.mark.dtype, pytest.mark.usefixtures('one_thread')]


@pytest.mark.parametrize(('dtype', 'capabilities'), [
    ('float32', WITHOUT_BFLOAT16), ('bfloat16', WITH_BFLOAT16),
    # With int8 and int4, the rest of the model has the dtype that the CPU multiplies fastest.
    ('int8', WITHOUT_BFLOAT16), ('int8', WITH_BFLOAT16),
    ('int4', WITHOUT_BFLOAT16), ('int4', WITH_BFLOAT16),
    ('auto', WITHOUT_BFLOAT16), ('auto', WITH_BFLOAT16)])
def test_an_engine_answers_learns_and_restarts(
        settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        dtype: str, capabilities: dict[str, bool]) -> None:
    monkeypatch.setattr('torch.cpu.get_capabilities', lambda: capabilities)
    changed = {'model__weight_dtype': dtype}
    with robot_with(settings, tmp_path, **changed) as robot:
        before = robot.ask('What is your name?')
        status = robot.correct(Correction('Rover.', id='name', query_id=before.query_id))
        assert status.state == CorrectionState.LEARNED, status
        assert robot.ask('What is your name?').text == 'Rover.' != before.text
    with robot_with(settings, tmp_path, **changed) as robot:
        again = robot.ask('What is your name?')
        assert (again.text, again.adapter_version) == ('Rover.', status.adapter_version)
