# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The engine of mace_ros under load: one block after another, each under a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
import statistics
import threading
import time
from typing import Any

from bench.common.load import Arrival, block_row, request_row, Slo
from bench.systems.pending_learner import PendingLearner
from bench.systems.probe import COLUMNS, Probe, ProbeLog
from bench.systems.replanner import Replanner
from mace_ros.api.events import Event, FinishReason, Query, Response
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine, default_learner
from mace_ros.engine.learner_port import LearnerPort
from mace_ros.engine.parts import Parts

POLICIES = ('mace', 'inference_only', 'continuous', 'periodic', 'static_split')
DEADLINE_S = 600.0      # a block that takes longer has failed


@dataclass
class Block:
    """The samples of one system in one block; peers have no ``waits`` and ``iterations``."""

    requests: list[dict[str, Any]]
    block: dict[str, Any]
    waits: list[dict[str, Any]] = field(default_factory=list)
    iterations: list[dict[str, Any]] = field(default_factory=list)


class EngineUnderLoad:
    """An engine with an adapter attached and fine-tuning always pending, and its load."""

    def __init__(self, settings: Settings, storage: Path, samples: Sequence[Sequence[int]],
                 progress: Callable[[str], None]) -> None:
        """Load; ``storage`` holds the adapter version, ``samples`` are token ids to train on."""
        self._wake = threading.Event()
        # Pending fine-tuning must not be throttled for lack of drift. Peers have no prefix
        # cache, so the engine must not profit from one either.
        settings = settings.updated({'drift.min_budget': 1.0, 'memory.prefix_sharing': False})
        learners: list[PendingLearner] = []

        def make_pending(parts: Parts, settings: Settings, wake: Callable[[], None],
                         clock: Callable[[], float]) -> LearnerPort:
            learners.append(PendingLearner(
                default_learner(parts, settings, wake, clock), parts, settings, samples, clock))
            return learners[0]

        self.engine = build_engine(settings, storage=storage, wake=self._wake.set,
                                   progress=progress, make_learner=make_pending)
        self.engine.chat.end_tokens = frozenset()     # responses have the requested length
        self.learner = learners[0]
        self._version = self.engine.parts.live.newest('')      # 0: the base model
        self.probe = Probe()
        self.engine.observe(self.probe)
        self._slo = Slo(settings.slo.ttft_ms, settings.slo.tpot_ms)

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def run_block(self, system: str, block: int, arrivals: Sequence[Arrival], seconds: float,
                  max_tokens: int) -> Block:
        """Serve ``arrivals`` under a policy for at least ``seconds``, until all are answered."""
        self._set({'scheduler.policy': system})
        self.learner.start()
        begun = time.monotonic()
        ids = [f'{system}/{block}/{i}' for i in range(len(arrivals))]
        feeder = threading.Thread(target=self._feed, args=(begun, arrivals, ids, max_tokens))
        feeder.start()
        unanswered = {i: a.max_tokens or max_tokens for i, a in zip(ids, arrivals, strict=True)}

        def finished(events: Sequence[Event]) -> bool:
            for event in events:
                if isinstance(event, Response):
                    _check_length(event, unanswered.pop(event.query_id))
                    _check_version(event, self._version)
            return not unanswered and time.monotonic() >= begun + seconds

        self._drive(finished, until=begun + seconds)
        ended = time.monotonic()
        tokens = self.learner.stop()
        feeder.join()
        log = self.probe.log
        rows = [request_row(system, block, begun, log.request_times(i, begun + a.at), self._slo)
                for i, a in zip(ids, arrivals, strict=True)]
        return Block(
            rows,
            block_row(system, block, wall_s=ended - begun, busy_s=log.busy_s,
                      finetune_tokens=tokens, finetune_steps=self.learner.finished_steps),
            [{'system': system, 'block': block, 'wait_ms': log.finetune_wait_s(i) * 1e3}
             for i in ids],
            iteration_rows(system, block, log))

    def request_seconds(self, arrivals: Sequence[Arrival], max_tokens: int) -> float:
        """Return the median device time of requests that run alone, in seconds."""
        busy = []
        for i, arrival in enumerate(arrivals):
            alone = [Arrival(0.0, arrival.text, arrival.ids)]
            busy.append(self.run_block('inference_only', i, alone, 0.0, max_tokens)
                        .block['busy_s'])
        return statistics.median(busy)

    def undivided_steps(self, count: int) -> list[float]:
        """
        Return the seconds of whole fine-tune steps that run without interruption.

        Their forward runs alone and keeps its layer graphs: the engine's fastest kind of step.
        """
        seconds = []
        for _ in range(count):
            began = time.monotonic()
            step = self.learner.new_step()
            while not step.done:
                step.run_segment()
            self.engine.model.synchronize()
            seconds.append(time.monotonic() - began)
        return seconds

    def run_saturated(self, arrivals: Sequence[Arrival], seconds: float, in_flight: int,
                      max_tokens: int) -> tuple[list[dict[str, Any]], list[float]]:
        """
        Keep ``in_flight`` requests running under ``mace``.

        Returns the iterations, and the processor time of each plan when it is made again at once,
        in microseconds (:class:`Replanner`).
        """
        before = self.engine.settings
        self._set({'scheduler.policy': 'mace', 'scheduler.max_requests': in_flight})
        self.learner.start()
        ends, count = time.monotonic() + seconds, 0

        def submit() -> None:
            nonlocal count
            text = arrivals[count % len(arrivals)].text
            # Different lengths, so that the requests do not all begin and end together.
            self.engine.submit(Query(text, id=f'crowd/{count}', temperature=0.0,
                                     max_tokens=max_tokens // 2 + count % max_tokens))
            count += 1

        def finished(events: Sequence[Event]) -> bool:
            if time.monotonic() >= ends:
                return True
            for event in events:
                if isinstance(event, Response):
                    submit()
            return False

        for _ in range(in_flight):
            submit()
        replanner = Replanner(self.engine.scheduler, self.engine.parts.state, in_flight)
        self.engine.observe(replanner)
        self._drive(finished, until=ends)
        self.engine.unobserve(replanner)
        self.learner.stop()
        rows = iteration_rows('mace', 0, self.probe.log)
        for i in range(count):
            self.engine.cancel(f'crowd/{i}')
        self.engine.step()
        self.engine.update(before)
        return rows, replanner.microseconds

    def _drive(self, finished: Callable[[Sequence[Event]], bool], until: float) -> None:
        """Call ``Engine.step`` as the node does until ``finished`` returns True."""
        engine, wake = self.engine, self._wake
        self.probe.clear()
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            wake.clear()
            iteration = engine.step()
            if finished(iteration.events):
                return
            now = time.monotonic()
            next_at = iteration.wake_at
            if next_at is None or next_at > now:
                # Wake up at the end of the block and, at the latest, to check the deadline.
                wake.wait(max(min(until if until > now else now + 1.0,
                                  next_at or deadline) - now, 0.0))
        raise TimeoutError(f'a block did not end within {DEADLINE_S:g} s')

    def _feed(self, begun: float, arrivals: Sequence[Arrival], ids: Sequence[str],
              max_tokens: int) -> None:
        for arrival, query_id in zip(arrivals, ids, strict=True):
            time.sleep(max(begun + arrival.at - time.monotonic(), 0.0))
            self.engine.submit(Query(
                arrival.text, id=query_id, max_tokens=arrival.max_tokens or max_tokens,
                temperature=0.0))

    def _set(self, values: dict[str, Any]) -> None:
        self.engine.update(self.engine.settings.updated(values))
        self.engine.step()      # applies the settings


def iteration_rows(system: str, block: int, log: ProbeLog) -> list[dict[str, Any]]:
    """Return the iterations of a log as one sample: ``rows`` with the names in ``columns``."""
    return [{'system': system, 'block': block, 'columns': COLUMNS,
             'rows': [i.row() for i in log.iterations]}]


def _check_version(event: Response, version: int) -> None:
    if event.adapter_version != version:
        raise AssertionError(
            f'{event.query_id} was answered by version {event.adapter_version}, not {version}')


def _check_length(event: Response, max_tokens: int) -> None:
    if event.finish_reason is not FinishReason.LENGTH or event.output_tokens != max_tokens:
        raise AssertionError(
            f'{event.query_id} ended with {event.finish_reason.name} after '
            f'{event.output_tokens} tokens: {event.error}')
