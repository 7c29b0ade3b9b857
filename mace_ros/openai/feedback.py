# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Feedback on completions, which becomes corrections."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
import uuid

from mace_ros.cli.common import STATES
from mace_ros.msg import CorrectionStatus
from mace_ros.openai.arrivals import Arrivals
from mace_ros.openai.errors import ApiError
from mace_ros.openai.protocol import FeedbackRequest
from mace_ros.ros.client import MaceClient
from mace_ros.ros.client_handles import CorrectionHandle

REMEMBERED = 1000       # corrections whose status can be read
FIRST_STATUS_S = 1.0    # how long a reply waits for the first status
WAITING = 'waiting'     # for the end of the answer, or for the node


@dataclass
class _Given:
    """Feedback that was sent."""

    completion_id: str
    handle: CorrectionHandle
    arrivals: Arrivals


class Feedback:
    """Sends corrections, and keeps the status of the latest ones."""

    def __init__(self, client: MaceClient) -> None:
        self._client = client
        self._given: OrderedDict[str, _Given] = OrderedDict()

    async def give(self, request: FeedbackRequest) -> dict[str, Any]:
        """
        Correct a completion; return the status of the correction; raises :class:`ApiError`.

        The node holds a correction until the answer has ended, so it is WAITING meanwhile.
        """
        wanted = [name for name in ('corrected', 'hint', 'rating')
                  if getattr(request, name) is not None]
        if len(wanted) != 1:
            raise ApiError(400, 'exactly one of corrected, hint and rating is required',
                           param='corrected')
        if request.id in self._given:
            return await self._confirm(request)
        feedback_id = request.feedback_id or f'feedback-{uuid.uuid4().hex}'
        if feedback_id in self._given:
            raise ApiError(409, f'feedback {feedback_id!r} was given already',
                           code='duplicate_id', param='feedback_id')
        fields = {name: value for name in ('weight', 'scope', 'hint')
                  if (value := getattr(request, name)) is not None}
        arrivals = Arrivals()
        given = self._given[feedback_id] = _Given(request.id, self._client.correct(
            request.corrected or '', correction_id=feedback_id, watch=arrivals.announce,
            query_id=request.id, source=request.source or 'openai', **fields), arrivals)
        while len(self._given) > REMEMBERED:
            self._given.popitem(last=False)
        return await self._outcome(given, 0)

    async def _confirm(self, request: FeedbackRequest) -> dict[str, Any]:
        """Confirm the proposal of a hint, or replace it by another text."""
        given = self._given[request.id]
        if not request.corrected:
            raise ApiError(400, 'to confirm a proposal, send its text as corrected',
                           param='corrected')
        before, known = given.handle, len(given.handle.statuses)
        given.handle = self._client.correct(
            request.corrected, correction_id=request.id, watch=given.arrivals.announce,
            query_id=given.completion_id)
        return await self._outcome(given, known if given.handle is before else 0)

    async def _outcome(self, given: _Given, known: int) -> dict[str, Any]:
        """Return the status after the first ``known`` ones, or the latest if none comes soon."""
        handle = given.handle
        if not self._client.is_answering(given.completion_id):
            await given.arrivals.wait_for(
                lambda: len(handle.statuses) > known or handle.lost, FIRST_STATUS_S)
        if len(handle.statuses) > known:
            status = handle.statuses[known]
            if status.state == CorrectionStatus.REJECTED:
                raise _rejection(status.reason)
        elif handle.lost:
            raise ApiError(503, handle.lost, kind='server_error', code='node_ended')
        return self.status(handle.id)

    def status(self, feedback_id: str) -> dict[str, Any]:
        """Return the latest status of a correction; raises :class:`ApiError`."""
        if feedback_id not in self._given:
            raise ApiError(404, f'no feedback {feedback_id!r} is known', code='not_found')
        given = self._given[feedback_id]
        status, lost = given.handle.status, given.handle.lost
        name = WAITING if status is None else STATES[status.state].lower()
        return {'id': feedback_id, 'object': 'feedback', 'completion_id': given.completion_id,
                'status': 'lost' if status is None and lost else name,
                'reason': lost if status is None else status.reason,
                'corrected': getattr(status, 'corrected', ''),      # the proposal of a hint
                'adapter_version': getattr(status, 'adapter_version', 0)}


def _rejection(reason: str) -> ApiError:
    """Return the error of a correction that the node refused for this reason."""
    if reason.endswith('try again later'):
        return ApiError(429, reason, kind='rate_limit_error', code='rejected')
    if reason.startswith('id: used'):
        return ApiError(409, reason, code='duplicate_id', param='feedback_id')
    unknown = reason.startswith('query_id: no answer')
    reason = reason.removeprefix('query_')      # called id here
    param = reason.partition(':')[0]
    return ApiError(404 if unknown else 400, reason, code='rejected',
                    param=param if param.isidentifier() else None)
