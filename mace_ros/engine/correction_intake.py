# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Corrections on their way through the journal to the learner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
import threading

from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    Event,
    InvalidCorrection,
)
from mace_ros.api.settings import Settings
from mace_ros.api.validation import checked_correction
from mace_ros.api.wording import counted
from mace_ros.engine.answer_recorder import AnswerRecorder
from mace_ros.engine.correction_limiter import CorrectionLimiter
from mace_ros.engine.hint_answers import HintAnswers
from mace_ros.engine.inbox import CorrectionWritten, Inbox, Publish
from mace_ros.engine.learner_port import LearnerPort
from mace_ros.learning.acceptance import accept
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.journal_writer import JournalWriter

MAX_HELD = 1000     # corrections that wait for the end of their answers


@dataclass(frozen=True)
class _Arrived:
    """A valid correction, with the settings and limits in force when it arrived."""

    correction: Correction
    settings: Settings
    longest: int        # tokens of a prompt with its answer
    at: float           # on the engine's clock, in seconds


class CorrectionIntake:
    """
    Checks corrections and writes them to the journal, whose thread puts the outcome into the inbox.

    A correction of an unfinished answer is held until that ends. It is acknowledged once it is
    written. :meth:`take` may be called from any thread, the other methods from the device's.
    """

    def __init__(self, *, chat: ChatTokenizer, journal: JournalWriter, inbox: Inbox,
                 recorder: AnswerRecorder, hints: HintAnswers, learner: LearnerPort,
                 clock: Callable[[], float]) -> None:
        """Begin without a correction; ``hints`` and ``learner`` get those that were written."""
        self._chat, self._journal, self._inbox, self._clock = chat, journal, inbox, clock
        self._recorder, self._hints, self._learner = recorder, hints, learner
        self._limiter = CorrectionLimiter()
        self._lock = threading.Lock()
        # Conversations of active queries, by query id; empty until the answer has begun.
        self._conversations: dict[str, str] = {}
        self._held: dict[str, list[_Arrived]] = {}      # by the query that they correct

    def take(self, correction: Correction, settings: Settings, longest: int) -> None:
        """
        Write a correction, now or at the end of the answer that it corrects.

        ``longest`` is the maximum number of tokens of a prompt with its answer.
        """
        now = self._clock()
        try:
            arrived = _Arrived(checked_correction(correction), settings, longest, now)
            self._limiter.admit(now, settings.correction.max_per_minute, self._journal.backlog)
            if self._hold(arrived):
                return
        except InvalidCorrection as error:
            self._inbox.put(Publish(_rejected(correction, error)))
            return
        self._write(arrived)

    def written(self, message: CorrectionWritten) -> list[Event]:
        """Hand a correction that the journal has accepted to the learner, or report its refusal."""
        error = message.outcome.exception()
        if not isinstance(error, InvalidCorrection):
            self._recorder.note_write(error)
        if error is not None:
            return [_rejected(message.correction, error)]
        accepted = message.outcome.result()
        record = accepted.record
        if accepted.to_learn:
            self._recorder.conversations.correct(record.query_id, record.corrected)
        elif accepted.new and record.state is CorrectionState.PROPOSED:
            self._hints.add(record)
        return self._learner.accepted(accepted)

    def query_admitted(self, query_id: str) -> None:
        """Hold corrections of this query until it has ended."""
        with self._lock:
            self._conversations[query_id] = ''

    def answer_begun(self, query_id: str, conversation_id: str) -> None:
        """Note that this answer is now the latest of its conversation."""
        with self._lock:
            self._conversations[query_id] = conversation_id

    def query_ended(self, query_id: str) -> None:
        """Write the held corrections of an answer that was submitted to the journal before."""
        with self._lock:
            self._conversations.pop(query_id, None)
            held = self._held.pop(query_id, [])
        for arrived in held:
            self._write(arrived)

    def _hold(self, arrived: _Arrived) -> bool:
        """Hold a correction if its answer is unfinished; return whether it is held."""
        correction = arrived.correction
        with self._lock:
            query_id = correction.query_id or next(
                (q for q, conversation in reversed(self._conversations.items())
                 if conversation and conversation == correction.conversation_id), '')
            if query_id not in self._conversations:
                return False
            if sum(map(len, self._held.values())) >= MAX_HELD:
                raise InvalidCorrection(counted(
                    MAX_HELD, 'correction waits', 'corrections wait')
                    + ' for the end of an answer; try again later')
            self._held.setdefault(query_id, []).append(
                replace(arrived, correction=replace(correction, query_id=query_id)))
        return True

    def _write(self, arrived: _Arrived) -> None:
        written = self._journal.submit(lambda journal: accept(
            arrived.correction, journal, chat=self._chat, settings=arrived.settings,
            longest=arrived.longest, arrived=arrived.at))
        written.add_done_callback(
            lambda outcome: self._inbox.put(CorrectionWritten(arrived.correction, outcome)))


def _rejected(correction: Correction, error: BaseException) -> CorrectionStatus:
    """Return the event of a correction that was refused."""
    return CorrectionStatus(correction.id, CorrectionState.REJECTED, str(error))
