# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The engine's events as log lines, which never contain texts of queries and answers."""

from __future__ import annotations

from rclpy.impl.rcutils_logger import RcutilsLogger

from mace_ros.api.events import (
    AdapterVersion,
    CorrectionState,
    CorrectionStatus,
    ErrorCode,
    Event,
    FinishReason,
    Response,
    VersionState,
)
from mace_ros.api.validation import MAX_ID
from mace_ros.api.wording import counted


def log_event(log: RcutilsLogger, event: Event) -> None:
    """Log an event in one line; chunks are not logged."""
    if isinstance(event, AdapterVersion):
        text = f'adapter version {event.version} of profile {event.profile!r}'
        if event.state is not VersionState.PUBLISHED:
            log.warning(f'{text}: {event.state.name} {event.reason}'.rstrip())
        elif event.version:
            log.info(f'{text} is live: {counted(len(event.correction_ids), "correction")} in '
                     f'{event.train_seconds:.1f} s, {event.path}')
        else:
            log.info(f'profile {event.profile!r} has no live version: '
                     + ('the versions of the robot answer' if event.profile else
                        'the base model answers'))
    elif isinstance(event, CorrectionStatus):
        text = f'correction {printable(event.id)}: {event.state.name} {event.reason}'.rstrip()
        if event.state in (CorrectionState.REJECTED, CorrectionState.FAILED):
            log.warning(text, throttle_duration_sec=1.0)
        else:
            log.info(text)
    elif isinstance(event, Response):
        text = (f'query {printable(event.query_id)}: {event.finish_reason.name} '
                f'{event.error}').rstrip()
        if event.error_code is ErrorCode.INTERNAL:
            log.error(text, throttle_duration_sec=1.0)
        elif event.finish_reason in (FinishReason.REJECTED, FinishReason.ERROR):
            # ERROR without INTERNAL: the client's format failed during decoding.
            log.warning(text, throttle_duration_sec=1.0)
        else:
            log.debug(text)


def printable(text: str) -> str:
    """Return an id that is safe in a log line: a sender must not be able to forge lines."""
    return text if text.isprintable() and len(text) <= MAX_ID else repr(text[:MAX_ID])
