# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Answers on record: as turns of a conversation, for corrections, and for replay."""

from __future__ import annotations

from concurrent.futures import Future
import time

from mace_ros.api.settings import Settings
from mace_ros.api.validation import MAX_UNWRITTEN
from mace_ros.engine.active_request import ActiveRequest
from mace_ros.engine.conversations import Conversations, Turn
from mace_ros.engine.inbox import AnswerWritten, Inbox
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.records import AnswerRecord


class AnswerRecorder:
    """Keeps conversations in memory and writes answers to the journal."""

    def __init__(self, *, journal: JournalWriter, inbox: Inbox) -> None:
        """Begin without a conversation; ``inbox`` receives the outcome of each write."""
        self.conversations = Conversations()
        self.journal_error = ''    # why the last write failed, empty if it succeeded
        self.unrecorded = 0        # answers lost since the disk last worked
        self._journal, self._inbox = journal, inbox

    def record(self, active: ActiveRequest, settings: Settings, *, complete: bool) -> bool:
        """Record an answer; return whether learning may use it."""
        query, text = active.query, active.stream.text
        self.conversations.add(
            query.conversation_id, system_prompt(active), Turn(query.id, query.text, text),
            max_turns=settings.conversation.max_turns,
            max_conversations=settings.conversation.max_conversations)
        if self._journal.backlog >= MAX_UNWRITTEN:
            self.unrecorded += 1
            return False
        route = active.route
        answer = AnswerRecord(
            query_id=query.id, prompt_ids=tuple(active.prompt), messages=active.messages,
            text=text, output_ids=tuple(active.output), conversation_id=query.conversation_id,
            profile=query.profile, lineage=route.version.profile,
            adapter_version=route.version.version,
            matched_correction_id=route.correction_id, out_of_scope=route.out_of_scope,
            similarity=route.similarity, no_learn=query.no_learn or not complete,
            time=time.time(), tools=tuple(active.tools),
            calls_tool=complete and bool(active.stream.calls))
        self._journal.submit(
            lambda journal: journal.record_answer(answer)).add_done_callback(self._on_written)
        return not answer.no_learn

    def _on_written(self, done: Future[None]) -> None:
        """Report a failure, or the first success after one; on the journal's thread."""
        error = done.exception()
        if error is not None or self.journal_error or self.unrecorded:
            self._inbox.put(AnswerWritten(str(error or '')))

    def note_write(self, error: BaseException | None) -> None:
        """Note the outcome of another write to the journal."""
        self.journal_error = str(error or '')

    def written(self, message: AnswerWritten) -> None:
        """Take the outcome of writing an answer."""
        self.journal_error = message.error
        self.unrecorded = self.unrecorded + message.lost if message.error else 0


def system_prompt(active: ActiveRequest) -> str:
    """Return the system prompt of a request; empty if it has none."""
    return next((m['content'] for m in active.messages if m['role'] == 'system'), '')
