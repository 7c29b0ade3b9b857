# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Feedback on completions, which becomes corrections."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any
import uuid

from mace_ros.cli.common import STATES
from mace_ros.msg import CorrectionStatus
from mace_ros.openai.errors import ApiError
from mace_ros.openai.protocol import FeedbackRequest
from mace_ros.ros.client import MaceClient
from mace_ros.ros.client_handles import CorrectionHandle

REMEMBERED = 1000       # corrections whose status can be read


class Feedback:
    """Sends corrections, and keeps the status of the latest ones."""

    def __init__(self, client: MaceClient, timeout_s: float) -> None:
        """``timeout_s`` is how long to wait for the first status."""
        self._client, self._timeout_s = client, timeout_s
        self._handles: OrderedDict[str, tuple[str, CorrectionHandle]] = OrderedDict()

    async def give(self, request: FeedbackRequest) -> dict[str, Any]:
        """Correct a completion; return the first status; raises :class:`ApiError`."""
        given = [name for name in ('corrected', 'hint', 'rating')
                 if getattr(request, name) is not None]
        if len(given) != 1:
            raise ApiError(400, 'one of corrected, hint and rating is needed', param='corrected')
        if request.id in self._handles:
            return await self._confirm(request)
        fields = {name: value for name in ('weight', 'scope', 'hint')
                  if (value := getattr(request, name)) is not None}
        handle = self._client.correct(
            request.corrected or '', correction_id=f'feedback-{uuid.uuid4().hex}',
            query_id=request.id, source=request.source or 'openai', **fields)
        self._handles[handle.id] = request.id, handle
        while len(self._handles) > REMEMBERED:
            self._handles.popitem(last=False)
        return await self._outcome(handle, 0)

    async def _confirm(self, request: FeedbackRequest) -> dict[str, Any]:
        """Confirm the proposal of a hint, or replace it by another text."""
        completion_id, known = self._handles[request.id]
        if not request.corrected:
            raise ApiError(400, 'a proposal is confirmed by its text as corrected',
                           param='corrected')
        statuses = len(known.statuses)
        handle = self._client.correct(
            request.corrected, correction_id=request.id, query_id=completion_id)
        self._handles[request.id] = completion_id, handle
        return await self._outcome(handle, statuses if handle is known else 0)

    async def _outcome(self, handle: CorrectionHandle, known: int) -> dict[str, Any]:
        """Return the status after the first ``known`` ones; wait for it."""
        try:
            await asyncio.to_thread(handle.wait_for_more, known, self._timeout_s)
        except TimeoutError as error:
            raise ApiError(408, str(error), kind='server_error', code='timeout') from error
        except ConnectionError as error:
            raise ApiError(503, str(error), kind='server_error', code='node_ended') from error
        status = handle.statuses[known]
        if status.state == CorrectionStatus.REJECTED:
            unknown = status.reason.startswith('query_id: no answer')
            raise ApiError(404 if unknown else 400, status.reason, code='rejected',
                           param=status.reason.partition(':')[0])
        return self.status(handle.id)

    def status(self, feedback_id: str) -> dict[str, Any]:
        """Return the latest status of a correction; raises :class:`ApiError`."""
        if feedback_id not in self._handles:
            raise ApiError(404, f'no feedback {feedback_id!r} is known', code='not_found')
        completion_id, handle = self._handles[feedback_id]
        status = handle.status
        return {'id': feedback_id, 'object': 'feedback', 'completion_id': completion_id,
                'status': 'sent' if status is None else STATES[status.state].lower(),
                'reason': getattr(status, 'reason', ''),
                'corrected': getattr(status, 'corrected', ''),      # the proposal of a hint
                'adapter_version': getattr(status, 'adapter_version', 0)}
