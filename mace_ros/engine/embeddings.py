# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Embeddings of texts: the mean of the base model's last hidden states, scaled to length 1.

Each text is a silent request, which is scheduled beside queries and computed in chunks like a
prompt. It does not use the prefix cache, which holds no hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

from torch.nn.functional import normalize

from mace_ros.api.events import FinishReason
from mace_ros.api.validation import text_problem
from mace_ros.engine.active_request import ActiveRequest, build_prefill, COMPLETE, RequestKind
from mace_ros.model.chat import ChatTokenizer

MAX_TEXTS = 64      # of one call

Embedding: TypeAlias = tuple[list[float], int]
"""The numbers of an embedding, and the tokens of its text."""


class InvalidText(ValueError):
    """Texts can't be embedded; the message says which one, and why."""


@dataclass(eq=False)
class _Call:
    """One call: the number of missing embeddings, and those found, by position."""

    done: Future[list[Embedding]]
    missing: int
    found: dict[int, Embedding] = field(default_factory=dict)


class EmbedRequests:
    """Builds the requests of texts to embed, and collects what they have computed."""

    def __init__(self, chat: ChatTokenizer, clock: Callable[[], float]) -> None:
        """Begin without a text."""
        self._chat, self._clock = chat, clock
        self._calls: dict[str, tuple[_Call, int]] = {}      # call and position, by request
        self._number = 0

    def requests(self, texts: Sequence[str], done: Future[list[Embedding]],
                 longest: int) -> list[ActiveRequest]:
        """
        Return a request for each text; if any is invalid, ``done`` receives the error instead.

        ``longest`` is the maximum number of tokens of a request.
        """
        try:
            ids = self._checked(texts, longest)
        except InvalidText as error:
            done.set_exception(error)
            return []
        call, made = _Call(done, len(ids)), []
        for position, tokens in enumerate(ids):
            self._number += 1
            active = build_prefill(RequestKind.EMBED, tokens, self._clock(), self._chat,
                                   urgent=True, number=str(self._number))
            self._calls[active.request.id] = call, position
            made.append(active)
        return made

    def ended(self, active: ActiveRequest, reason: FinishReason, error: str) -> None:
        """Take the outcome of a request; the first failure of a call is the call's."""
        call, position = self._calls.pop(active.request.id)
        if reason not in COMPLETE or active.pooled is None:
            if not call.done.done():
                call.done.set_exception(InvalidText(
                    f'texts[{position}]: {error or "the node was deactivated"}'))
            return
        call.found[position] = (
            normalize(active.pooled, dim=0).tolist(), active.request.prompt_tokens)
        call.missing -= 1
        if not call.missing and not call.done.done():
            call.done.set_result([call.found[i] for i in sorted(call.found)])

    def _checked(self, texts: Sequence[str], longest: int) -> list[list[int]]:
        if not 1 <= len(texts) <= MAX_TEXTS:
            raise InvalidText(f'texts: {len(texts)} given, 1 to {MAX_TEXTS} allowed')
        found = []
        for position, text in enumerate(texts):
            problem = 'empty' if not text.strip() else text_problem(text)
            ids = [] if problem else self._chat.plain(text)
            if not problem and len(ids) >= longest:
                problem = f'{len(ids)} tokens, and at most {longest - 1} fit'
            if problem:
                raise InvalidText(f'texts[{position}]: {problem}')
            found.append(ids)
        return found
