# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Runs the drift trace under a system.

The client corrects each answer that is not, word for word, the true one at that time. All
systems get the same questions at the same times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
import threading
import time
from typing import Any

from bench.learning.drift_systems import SYSTEMS
from bench.learning.drift_trace import make_trace, Question
from bench.systems.interactive import InteractiveEngine, MAX_TOKENS
from mace_ros.api.events import AdapterVersion, Correction, Query, Response, VersionState
from mace_ros.learning.drift import DriftState

OVERLOAD = 3.0          # factor of the rate at which corrections come faster than learning
OVERLOAD_LENGTH = 2     # factor of the questions: at the start of an overload little is learned
GRACE_S = 120.0         # for responses after the last question


def measure(settings: Any, folder: Path, earlier: Mapping[str, Any], *, system: str,
            questions: int, rate: float, seed: str, commit: str | None,
            conditions: Mapping[str, Any]) -> dict[str, Any]:
    """
    Run the trace under a system; return its samples with those of other systems.

    ``earlier`` samples of a system are kept if trace and ``conditions`` were the same, or if only
    one of the two systems is overloaded, so that they are not compared.
    """
    own = SYSTEMS[system]
    same = {'trace': {'questions': questions, 'rate': rate, 'seed': seed}, **conditions}
    runs = [r for r in earlier.get('drift_runs', ()) if r['system'] != system and (
        SYSTEMS[r['system']].overloaded != own.overloaded
        or all(r.get(name) == value for name, value in same.items()))]
    kept = {r['system'] for r in runs}
    rows = [r for r in earlier.get('drift', ()) if r['system'] in kept]
    robot = InteractiveEngine(settings.updated(own.values), folder / system.replace(' ', '_'))
    chat = robot.engine.chat
    length, speed = (OVERLOAD_LENGTH, OVERLOAD) if own.overloaded else (1, 1.0)
    load = make_trace(lambda text: len(chat.answer(text)), questions=questions * length,
                      rate=rate * speed, seed=seed)
    answers, run = play(robot, load)
    robot.close()
    right = sum(r['right'] for r in answers) / run['asked']
    print(f'{system}: alignment {right:.3f}, fine-tune {run["learning_s"]:.1f} s', flush=True)
    return {'drift': [*rows, *({'system': system, **row} for row in answers)],
            'drift_runs': [*runs, {'system': system, 'commit': commit, **same, **run}]}


def play(robot: InteractiveEngine,
         load: Sequence[Question]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ask the questions and correct wrong answers; return samples of answers and totals."""
    engine = robot.engine
    robot.ask('Hello.')     # warm-up
    before = engine.scheduler.statistics(time.monotonic())
    begun = time.monotonic()

    def submit_all() -> None:
        for i, question in enumerate(load):
            time.sleep(max(begun + question.at - time.monotonic(), 0.0))
            engine.submit(Query(question.text, id=f't{i}', max_tokens=MAX_TOKENS, temperature=0.0))

    client = threading.Thread(target=submit_all, daemon=True)
    client.start()
    rows: list[dict[str, Any]] = []
    versions = rejected = drifting = 0
    end = begun + load[-1].at + GRACE_S
    while len(rows) < len(load) and time.monotonic() < end:
        iteration = engine.step()
        for event in iteration.events:
            if isinstance(event, AdapterVersion):
                versions += event.state is VersionState.PUBLISHED
                rejected += event.state is VersionState.REJECTED
            if not isinstance(event, Response) or not event.query_id.startswith('t'):
                continue
            row = answer_row(load[int(event.query_id[1:])], event)
            rows.append(row)
            drifting += engine.status().drift_state == DriftState.DRIFTING
            if not row['right']:
                engine.correct(Correction(row['truth'], query_id=event.query_id))
        if iteration.wake_at is None or (not iteration.events
                                         and iteration.wake_at > time.monotonic()):
            time.sleep(0.001)
    client.join()
    after = engine.scheduler.statistics(time.monotonic())
    return rows, {
        'asked': len(load),
        'learning_s': after.learning_s - before.learning_s,
        'serving_s': after.serving_s - before.serving_s,
        'seconds': time.monotonic() - begun, 'versions': versions, 'rejected': rejected,
        'steps': after.finetune_steps - before.finetune_steps,
        'drifting': drifting / max(len(rows), 1),
        'unlearned': engine.status().corrections_waiting}


def answer_row(question: Question, response: Response) -> dict[str, Any]:
    """Return the sample of one answer."""
    return {
        'at': question.at, 'phase': question.phase, 'question': question.text,
        'truth': question.truth, 'answer': response.text,
        'right': response.text.strip() == question.truth, 'ttft_ms': response.ttft_ms,
        'tpot_ms': response.tpot_ms, 'version': response.adapter_version}
