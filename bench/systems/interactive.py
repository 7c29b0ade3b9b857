# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An engine that is asked and corrected one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
from pathlib import Path
import time
from typing import Any

from bench.common.load import conversations
from bench.common.text import contains_phrase
from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    Query,
    Response,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine
from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer

MAX_TOKENS = 24
TIMEOUT_S = 300.0       # of a response, and of a correction
PERPLEXITY_TOKENS = 512     # of each conversation
ENDS = (CorrectionState.LEARNED, CorrectionState.FAILED, CorrectionState.REJECTED)


class InteractiveEngine:
    """An engine and a client that waits for each response before it continues."""

    def __init__(self, settings: Settings, storage: Path,
                 progress: Callable[[str], None] = lambda text: None, *,
                 max_tokens: int = MAX_TOKENS, prefix: str = '') -> None:
        """
        Load the model and the live adapter versions in ``storage``.

        Responses have up to ``max_tokens`` tokens. The ids of queries begin with ``prefix``, which
        must be another one each time that the same storage is opened.
        """
        self.engine = build_engine(settings, storage=storage, progress=progress)
        self._max_tokens, self._prefix, self._count = max_tokens, prefix, 0

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def wait_for(self, happened: Callable[[Any], bool], timeout_s: float = TIMEOUT_S) -> Any:
        """Run iterations until an event satisfies the condition; return the event."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            iteration = self.engine.step()
            for event in iteration.events:
                if happened(event):
                    return event
            if iteration.wake_at is None:
                time.sleep(0.001)
        raise TimeoutError(f'the expected event did not come within {timeout_s:g} s')

    def ask(self, text: str, *, no_learn: bool = True) -> Response:
        """Return the response, decoded greedily."""
        self._count += 1
        name = f'{self._prefix}q{self._count}'
        self.engine.submit(Query(
            text, id=name, max_tokens=self._max_tokens, temperature=0.0, no_learn=no_learn))
        response: Response = self.wait_for(
            lambda e: isinstance(e, Response) and e.query_id == name)
        return response

    def teach(self, query_id: str, answer: str) -> tuple[float, CorrectionStatus]:
        """Correct a response; return the seconds until the correction's end, and its status."""
        began = time.monotonic()
        name = f'c-{query_id}'
        self.engine.correct(Correction(answer, id=name, query_id=query_id))
        last: CorrectionStatus = self.wait_for(
            lambda e: isinstance(e, CorrectionStatus) and e.id == name and e.state in ENDS)
        return time.monotonic() - began, last

    def known_facts(self, candidates: Sequence[tuple[str, str]],
                    count: int) -> list[dict[str, Any]]:
        """Return the first ``count`` facts, of question and key phrase, answered correctly."""
        found: list[dict[str, Any]] = []
        for question, key in candidates:
            answer = self.ask(question).text
            if contains_phrase(answer, key):
                found.append({'question': question, 'key': key, 'before': answer})
            if len(found) == count:
                break
        print(f'{len(found)} facts that the base model gets right', flush=True)
        return found

    def perplexity(self, *, live: bool) -> float:
        """Return the perplexity on bench/chat.txt of the live adapter or of the base model."""
        model, lora = self.engine.model, self.engine.lora
        if not live:
            lora.reset()     # the next job loads the live version again
        trainer = Trainer(lora, 1e-3)
        loss = tokens = 0.0
        for messages in conversations():
            ids = self.engine.chat.prompt(messages)[:PERPLEXITY_TOKENS]
            step = FinetuneStep(model, trainer, [
                Sample(tuple(ids), (0.0,) + (1.0,) * (len(ids) - 1))], learns=False)
            while not step.done:
                step.run_segment()
            score, = step.scores()
            loss -= score.log_probability * score.tokens
            tokens += score.tokens
        return math.exp(loss / tokens)
