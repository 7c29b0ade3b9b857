# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An engine with somebody who asks, waits for the answer, and corrects it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
from pathlib import Path
import re
import time
from typing import Any

from bench.load import conversations

MAX_TOKENS = 24
ENDS_AFTER_S = 300.0    # no answer and no correction takes so long


def settings_from(pairs: Sequence[str]) -> Any:
    """Return the node's settings with ``name=value`` put in."""
    from mace_ros.api.settings import PARAMETERS, Settings

    values = {}
    for name, _, value in (each.partition('=') for each in pairs):
        kind = type(PARAMETERS[name].default)
        values[name] = value == 'true' if kind is bool else kind(value)
    return Settings().updated(values)


class Robot:
    """An engine, asked and corrected as by somebody who waits for each answer."""

    def __init__(self, settings: Any, storage: Path) -> None:
        """Load the model."""
        from mace_ros.engine.builder import build_engine

        self.engine = build_engine(settings, storage=storage)
        self._count = 0

    def until(self, happened: Callable[[Any], bool]) -> Any:
        """Run iterations until an event fulfils the condition; return it."""
        end = time.monotonic() + ENDS_AFTER_S
        while time.monotonic() < end:
            iteration = self.engine.step()
            for event in iteration.events:
                if happened(event):
                    return event
            if iteration.wake_at is None:
                time.sleep(0.001)
        raise TimeoutError(f'nothing came within {ENDS_AFTER_S:g} s')

    def ask(self, text: str, *, no_learn: bool = True) -> Any:
        """Return the answer, greedily decoded."""
        from mace_ros.api.events import Query, Response

        self._count += 1
        name = f'q{self._count}'
        self.engine.submit(Query(
            text, id=name, max_tokens=MAX_TOKENS, temperature=0.0, no_learn=no_learn))
        return self.until(lambda e: isinstance(e, Response) and e.query_id == name)

    def teach(self, query_id: str, answer: str) -> tuple[float, Any]:
        """Correct an answer; return the seconds that it took, and its last status."""
        from mace_ros.api.events import Correction, CorrectionState, CorrectionStatus

        ends = (CorrectionState.LEARNED, CorrectionState.FAILED, CorrectionState.REJECTED)
        began = time.monotonic()
        self.engine.correct(Correction(answer, id=f'c-{query_id}', query_id=query_id))
        last = self.until(lambda e: isinstance(e, CorrectionStatus)
                          and e.id == f'c-{query_id}' and e.state in ends)
        return time.monotonic() - began, last

    def facts(self, candidates: Sequence[tuple[str, str]], count: int) -> list[dict[str, Any]]:
        """Return ``count`` facts, each a question and a key phrase, that it gets right now."""
        found: list[dict[str, Any]] = []
        for question, key in candidates:
            answer = self.ask(question).text
            if says(answer, key):
                found.append({'question': question, 'key': key, 'before': answer})
            if len(found) == count:
                break
        print(f'{len(found)} facts that the base model gets right', flush=True)
        return found

    def perplexity(self, *, live: bool) -> float:
        """Return that of bench/chat.txt, under the live adapter or the base model."""
        from mace_ros.finetune.sample import Sample
        from mace_ros.finetune.step import FinetuneStep, Trainer

        engine = self.engine
        if not live:
            engine.bank.reset()     # the live version is trained from anew with the next job
        trainer = Trainer(engine.bank, 1e-3)
        loss = tokens = 0.0
        for messages in conversations():
            ids = engine.chat.prompt(messages)[:512]
            step = FinetuneStep(engine.model, trainer, [
                Sample(tuple(ids), (0.0,) + (1.0,) * (len(ids) - 1))], learns=False)
            while not step.done:
                step.run_segment()
            score, = step.scores()
            loss -= score.log_probability * score.tokens
            tokens += score.tokens
        return math.exp(loss / tokens)


def says(answer: str, key: str) -> bool:
    """Return whether an answer has its key phrase, as words: 3600 does not say 60."""
    return re.search(rf'(?<!\w){re.escape(key)}(?!\w)', answer, re.IGNORECASE) is not None
