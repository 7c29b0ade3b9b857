# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An engine that tests step by hand, with a record of its events."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
import time
from typing import Any

from mace_ros.api.events import (
    Correction,
    CorrectionState,
    CorrectionStatus,
    Event,
    Query,
    Response,
    ResponseChunk,
)
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine
from mace_ros.engine.engine import Engine
from mace_ros.learning.job import JobState
from mace_ros.learning.status import JobStatus

# A random model has no answers to preserve: learn fast, with all layers, and without rests between
# jobs.
RANDOM_MODEL = {
    'adapter.target_modules': 'all-linear', 'finetune.learning_rate': 0.01,
    'finetune.replay_weight': 1.0, 'drift.min_budget': 1.0}

# Fields of a query with which the answer of a tiny model does not end by itself.
NO_END: dict[str, Any] = {'logit_bias_tokens': (0, 2), 'logit_bias_values': (-100.0, -100.0)}

# A system prompt of several KV blocks.
SYSTEM = 'You are a robot in a garden. ' + 'Water the plants in the evening. ' * 12

# Questions without a rare word in common: each is learned in a version of its own.
LESSONS = {'Who built the greenhouse?': 'Ada.', 'Where is the watering can?': 'In the shed.',
           'What colour is the gate?': 'Blue.'}

DONE = (CorrectionState.LEARNED, CorrectionState.FAILED, CorrectionState.REJECTED,
        CorrectionState.SUPERSEDED)


@dataclass
class Robot:
    """Steps an engine and records its events."""

    engine: Engine
    events: list[Event] = field(default_factory=list)

    def until(self, condition: Callable[[Event], bool], seconds: float = 200.0) -> Event:
        """Step until an event meets the condition."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            iteration = self.engine.step()
            self.events += iteration.events
            for event in iteration.events:
                if condition(event):
                    return event
            if iteration.wake_at is None:
                time.sleep(0.002)
        raise AssertionError(f'not within {seconds} s; last events: {self.events[-3:]}')

    def response(self, query_id: str) -> Response:
        """Step until that query has ended; return its response."""
        event = self.until(lambda e: isinstance(e, Response) and e.query_id == query_id)
        assert isinstance(event, Response)
        return event

    def answer(self, query_id: str) -> Response:
        """Return the response to a query that may have ended already, or wait for it."""
        return next((e for e in self.events if isinstance(e, Response)
                     and e.query_id == query_id), None) or self.response(query_id)

    def ask(self, text: str, **kwargs: object) -> Response:
        """Submit a query and wait for its response."""
        query = Query(text, **{'id': f'q{len(self.events)}-{time.monotonic_ns()}', **kwargs})  # type: ignore[arg-type]
        self.engine.submit(query)
        return self.response(query.id)

    def correct(self, correction: Correction, seconds: float = 200.0) -> CorrectionStatus:
        """Submit a correction and wait for its final status."""
        self.engine.correct(correction)
        event = self.until(lambda e: isinstance(e, CorrectionStatus)
                           and e.id == correction.id and e.state in DONE, seconds)
        assert isinstance(event, CorrectionStatus)
        return event

    def tokens(self, query_id: str) -> list[ResponseChunk]:
        """Return the chunks of a response so far."""
        return [e for e in self.events if isinstance(e, ResponseChunk) and e.query_id == query_id]


def correct(robot: Robot, name: str, *, about: str = '') -> None:
    """Correct the answer to the question of that name; wait until the correction is accepted."""
    robot.engine.correct(Correction('A robot.', id=name, prompt=f'Question {about or name}?'))
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == name)


def running(robot: Robot) -> JobStatus:
    """Return the status of the job that runs."""
    job = robot.engine.learner.status().job
    assert job is not None, 'no job runs'
    return job


def until_state(robot: Robot, state: JobState, seconds: float = 200.0) -> JobStatus:
    """Step until a job is in a state, and return its status."""
    deadline = time.monotonic() + seconds
    while (job := robot.engine.learner.status().job) is None or job.state is not state:
        assert time.monotonic() < deadline, f'no job is {state.value}'
        iteration = robot.engine.step()
        robot.events += iteration.events
        if iteration.wake_at is None:
            time.sleep(0.001)
    return job


@contextmanager
def robot_with(settings: Settings, folder: Path, **values: object) -> Iterator[Robot]:
    """Return an engine with other settings; at the end every KV block must be free."""
    engine = build_engine(settings.updated({
        name.replace('__', '.'): value for name, value in values.items()}), storage=folder)
    everything = engine.free_kv_tokens
    yield Robot(engine)
    engine.step()     # checks all blocks when it has become idle
    assert engine.free_kv_tokens == everything
    engine.close()


@contextmanager
def taught_robot(settings: Settings, folder: Path) -> Iterator[Robot]:
    """Return a robot with one adapter slot that has learned :data:`LESSONS`, in three versions."""
    with robot_with(settings, folder, adapter__slots=1) as made:
        for question, answer in LESSONS.items():
            state = made.correct(Correction(answer, id=question, prompt=question))
            assert state.state is CorrectionState.LEARNED
        yield made
