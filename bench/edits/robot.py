# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The engine of mace_ros as a system under test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
import subprocess
import sys
import time
from typing import Any
import uuid

from bench.edits.edit_set import Edit
from bench.edits.edited_model import Learned, Reply
from bench.edits.scoring import MAX_TOKENS
from bench.systems.interactive import ENDS, InteractiveEngine
from mace_ros.api.events import AdapterVersion, Correction, CorrectionStatus, Event, Response
from mace_ros.api.settings import Settings
from mace_ros.engine.learner_port import LearnerPort
from mace_ros.scheduling.scheduler import Statistics
from mace_ros.telemetry.observer import IterationObserver

TIMEOUT_S = 1800.0      # of all corrections that come at the same time
IDLE_S = 120.0          # longest wait for the learner to have nothing left to do
IDLE_ITERATIONS = 3     # a job may begin in the iteration after the one that ends another


class TrainedTokens(IterationObserver):
    """Sums the tokens that were trained for versions, rejected ones included."""

    def __init__(self) -> None:
        self.total = 0

    def finished(self, events: Sequence[Event]) -> None:
        """Add the versions of an iteration; those restored at a start are not among them."""
        self.total += sum(e.train_tokens for e in events if isinstance(e, AdapterVersion))


class StageTimes(IterationObserver):
    """Sums the seconds that pass in each state of the learning job."""

    def __init__(self, learner: LearnerPort) -> None:
        self._learner = learner
        self.restart()

    def restart(self) -> None:
        """Begin with a correction that is sent now."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._stage, self._at = 'waiting', time.monotonic()

    def finished(self, events: Sequence[Event]) -> None:
        """Add the iteration to the state in which it began."""
        now = time.monotonic()
        self.seconds[self._stage] += now - self._at
        job = self._learner.status().job
        self._stage, self._at = 'waiting' if job is None else job.state.value, now


class Robot:
    """An engine that learns corrections of its own answers; it is idle before each of them."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        """Load the model, and what ``folder`` has of an earlier run."""
        self._settings, self._folder = settings, folder
        self._start()

    def _start(self) -> None:
        self._engine = InteractiveEngine(
            self._settings, self._folder, max_tokens=MAX_TOKENS, prefix=f'{uuid.uuid4().hex[:8]}-')
        self._trained = TrainedTokens()
        self._stages = StageTimes(self._engine.engine.learner)
        for observer in (self._trained, self._stages):
            self._engine.engine.observe(observer)
        self._accounted_s, self._accounted_tokens = 0.0, 0

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def restart(self) -> None:
        """Stop the engine and build another one in the same folder."""
        self.close()
        self._start()

    def ask(self, questions: Sequence[str]) -> list[Reply]:
        """Ask one question after the other, without learning from them."""
        return [_reply(self._engine.ask(question)) for question in questions]

    def learn(self, edits: Sequence[Edit]) -> list[Learned]:
        """Ask each prompt, correct all answers at once, and wait until each correction ends."""
        answers = [self._engine.ask(edit.prompt, no_learn=False) for edit in edits]
        self._wait_until_idle()
        wrong = {f'c-{answer.query_id}': (answer.query_id, edit.target)
                 for answer, edit in zip(answers, edits, strict=True)
                 if answer.text.strip() != edit.target.strip()}
        serving_s = self._statistics().serving_s
        ended = self._correct(wrong)
        stages = dict(self._stages.seconds) if len(wrong) == 1 else {}
        self._wait_until_idle()
        device_s, tokens = self._spent(self._statistics().serving_s - serving_s)
        share = 1.0 / max(len(wrong), 1)
        return [Learned(name, *ended[name], device_s * share, tokens * share, stages)
                if name in ended else Learned('', 'KNOWN', None)
                for name in (f'c-{answer.query_id}' for answer in answers)]

    def forget(self, correction_ids: Sequence[str]) -> None:
        """Delete corrections as a user does: the node stops, and starts again afterwards."""
        self.close()
        subprocess.run(
            [sys.executable, '-m', 'mace_ros.cli.journal_admin', 'delete', 'corrections',
             *correction_ids, '--folder', str(self._folder)], check=True, stdout=subprocess.DEVNULL)
        self._start()

    def _correct(self, wrong: dict[str, tuple[str, str]]) -> dict[str, tuple[str, float]]:
        """Return the last state of each correction, and the seconds until then."""
        ended: dict[str, tuple[str, float]] = {}
        if not wrong:
            return ended
        began = time.monotonic()
        self._stages.restart()
        for name, (query_id, target) in wrong.items():
            self._engine.engine.correct(Correction(target, id=name, query_id=query_id))

        def all_ended(event: Any) -> bool:
            if (isinstance(event, CorrectionStatus) and event.state in ENDS
                    and event.id in wrong and event.id not in ended):
                ended[event.id] = event.state.name, time.monotonic() - began
            return len(ended) == len(wrong)

        self._engine.wait_for(all_ended, TIMEOUT_S)
        return ended

    def _spent(self, background_s: float) -> tuple[float, int]:
        """
        Return the device seconds and the trained tokens since the last call.

        Background answers while corrections were learned (``background_s``) count as well.
        """
        learning_s, tokens = self._statistics().learning_s, self._trained.total
        spent = learning_s - self._accounted_s + background_s, tokens - self._accounted_tokens
        self._accounted_s, self._accounted_tokens = learning_s, tokens
        return spent

    def _statistics(self) -> Statistics:
        return self._engine.engine.scheduler.statistics(time.monotonic())

    def _wait_until_idle(self) -> None:
        """Run iterations until no correction waits and no job runs or begins."""
        engine, end, idle = self._engine.engine, time.monotonic() + IDLE_S, 0
        while idle < IDLE_ITERATIONS and time.monotonic() < end:
            iteration = engine.step()
            idle = 0 if engine.learner.busy or iteration.events else idle + 1
            if iteration.wake_at is None:
                time.sleep(0.001)


def _reply(response: Response) -> Reply:
    # A version of mace_ros from before corrections had a scope does not explain its answers.
    drew_on = asdict(response).get('matched_correction_id', '')
    return Reply(response.text, drew_on if response.adapter_version else '')
