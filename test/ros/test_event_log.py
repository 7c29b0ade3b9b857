# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The levels at which the engine's events are logged."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from mace_ros.api.events import ErrorCode, FinishReason, Response
from mace_ros.ros.event_log import log_event


@pytest.mark.parametrize(('reason', 'code', 'level'), [
    (FinishReason.STOP, ErrorCode.NONE, 'debug'),
    (FinishReason.REJECTED, ErrorCode.OVERLOADED, 'warning'),
    (FinishReason.ERROR, ErrorCode.INVALID_PARAMETER, 'warning'),
    (FinishReason.ERROR, ErrorCode.INTERNAL, 'error')])
def test_only_faults_of_the_node_are_logged_as_errors(
        reason: FinishReason, code: ErrorCode, level: str) -> None:
    """A format that turns out to be unusable while it is used is the client's."""
    lines = []

    def log(at: str, text: str, **_: Any) -> None:
        lines.append((at, text))

    logger: Any = SimpleNamespace(
        **{at: partial(log, at) for at in ('debug', 'info', 'warning', 'error')})
    log_event(logger, Response('q', '', '', reason, error='response_schema: a', error_code=code))
    assert lines == [(level, f'query q: {reason.name} response_schema: a')]
