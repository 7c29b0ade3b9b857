# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Answers to hints: a silent request repeats the question with the hint before it.

The version in whose scope the question lies answers, greedily. The answer becomes the text of the
hint's correction. Hints that were not answered are in the journal, and resumed after a restart.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from mace_ros.api.events import Correction, FinishReason, Query
from mace_ros.api.settings import Settings
from mace_ros.engine.active_request import ActiveRequest, PREFILL_ID, RequestKind
from mace_ros.engine.inbox import AnswerWritten, CorrectionWritten, Inbox
from mace_ros.learning.acceptance import Accepted, take_hint_answer
from mace_ros.model.chat import ChatTokenizer
from mace_ros.model.sampling import Sampling
from mace_ros.model.tool_call_stream import text_stream
from mace_ros.scheduling.request import Request
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.records import CorrectionRecord, Messages

MAX_TRIES = 3       # of a hint whose request is rejected, or fails


@dataclass(frozen=True)
class _Hint:
    """A hint, and the maximum number of tokens of its prompt with the answer."""

    record: CorrectionRecord
    longest: int


class HintAnswers:
    """The hints that wait for an answer, and the one that is being answered."""

    def __init__(self, settings: Settings, *, chat: ChatTokenizer, journal: JournalWriter,
                 inbox: Inbox, clock: Callable[[], float]) -> None:
        """Continue with the hints in the journal; blocks."""
        self._settings, self._chat, self._journal = settings, chat, journal
        self._inbox, self._clock = inbox, clock
        self._waiting = deque(journal.submit(lambda j: j.unanswered_hints()).result())
        self._asked: _Hint | None = None
        self._tries: Counter[str] = Counter()       # that failed, by correction

    def update(self, settings: Settings) -> None:
        """Use other settings from now on."""
        self._settings = settings

    def add(self, record: CorrectionRecord) -> None:
        """Queue a hint that is in the journal."""
        self._waiting.append(record)

    def next(self, longest: int) -> ActiveRequest | None:
        """
        Return the request to start now, one at a time.

        ``longest`` is the maximum number of tokens of a prompt with its answer.
        """
        while self._waiting and self._asked is None:
            hint = _Hint(self._waiting.popleft(), longest)
            record = hint.record
            try:
                ids = self._chat.prompt(
                    with_hint(record.messages, record.hint), record.tools)
            except Exception as error:    # a chat template that refuses the messages
                self._answered(hint, '', f'{type(error).__name__}: {error}')
                continue
            if len(ids) < longest:
                self._asked = hint
                return self._request(hint, ids)
            self._answered(hint, '', f'{len(ids)} tokens with its prompt; {longest - 1} at most')
        return None

    def ended(self, active: ActiveRequest, reason: FinishReason, error: str) -> None:
        """Take the outcome of the request."""
        hint, self._asked = self._asked, None
        assert hint is not None
        if reason is FinishReason.CANCELLED or self._is_retried(hint, reason):
            self._waiting.appendleft(hint.record)       # cancelled: the node is deactivated
        elif reason is FinishReason.LENGTH:
            self._answered(hint, '', 'the answer does not end within generation.max_tokens')
        else:
            self._answered(hint, active.stream.text, error)

    def _is_retried(self, hint: _Hint, reason: FinishReason) -> bool:
        """Return whether the request is to be sent again, after an overload or a device error."""
        if reason not in (FinishReason.REJECTED, FinishReason.ERROR):
            return False
        self._tries[hint.record.id] += 1
        return self._tries[hint.record.id] < MAX_TRIES

    def _request(self, hint: _Hint, ids: list[int]) -> ActiveRequest:
        record, settings = hint.record, self._settings
        request = Request(
            id=f'{PREFILL_ID}{RequestKind.HINT.name}', arrival=self._clock(),
            prompt_tokens=len(ids),
            max_tokens=min(settings.generation.max_tokens, hint.longest - len(ids)),
            ttft_slo=settings.slo.freshness_s, tpot_slo=settings.slo.tpot_ms / 1e3, priority=0)
        return ActiveRequest(
            query=Query('', id=request.id, profile=record.profile),
            # Without the hint, because these decide which version's scope the question is in.
            messages=tuple(dict(m) for m in record.messages), ids=ids, request=request,
            sampling=Sampling(0.0, 1.0, 0), stream=text_stream(self._chat, (), record.tools),
            kind=RequestKind.HINT, tools=record.tools,
            adapted_from=self._chat.adapted_from(ids))

    def _answered(self, hint: _Hint, text: str, problem: str) -> None:
        """Write the answer to the journal, or the reason why there is none."""
        record, settings, now = hint.record, self._settings, self._clock()
        self._tries.pop(record.id, None)
        if not text.strip() and not problem:
            problem = 'the answer is empty'
        written: Future[Accepted] = self._journal.submit(lambda journal: take_hint_answer(
            record, text, problem, journal, chat=self._chat, settings=settings,
            longest=hint.longest, arrived=now))
        written.add_done_callback(lambda outcome: self._report(record, outcome))

    def _report(self, record: CorrectionRecord, outcome: Future[Accepted]) -> None:
        """Report the outcome; after a disk error, the hint is answered again at the next start."""
        error = outcome.exception()
        self._inbox.put(
            CorrectionWritten(Correction('', id=record.id), outcome) if error is None
            else AnswerWritten(str(error), lost=0))


def with_hint(messages: Messages, hint: str) -> list[dict[str, str]]:
    """Return the messages with the hint before the last question, or before a raw prompt."""
    made = [dict(message) for message in messages]
    for message in reversed(made):
        if message['role'] == 'user':
            message['content'] = f'{hint}\n\n{message["content"]}'
            return made
    return [*made, {'role': 'user', 'content': hint}]
