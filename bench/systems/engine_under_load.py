# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Our engine under load: one block after another, each under a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
import statistics
import threading
import time
from typing import Any

from bench.load import Arrival, block_row, request_row, Slo
from bench.pending import PendingLearner
from bench.probe import COLUMNS, Log, MeasuredEngine
from mace_ros.api.events import Event, FinishReason, Query, Response
from mace_ros.api.settings import Settings

POLICIES = ('mace', 'inference_only', 'continuous', 'periodic', 'static_split')
DEADLINE_S = 600.0      # no block takes so long


@dataclass
class Block:
    """The samples of one system in one block; the last two are of our engine only."""

    requests: list[dict[str, Any]]
    block: dict[str, Any]
    waits: list[dict[str, Any]] = field(default_factory=list)
    iterations: list[dict[str, Any]] = field(default_factory=list)


def precision_of(engine: Any) -> str:
    """Return how an engine holds its weights: a value of ``model.weight_dtype``."""
    if engine.model.groups[0].int8 is not None:
        return 'int8'
    return str(engine.model.dtype).removeprefix('torch.')


class Served:
    """An engine with an adapter attached and fine-tuning always pending, and its load."""

    def __init__(self, settings: Settings, storage: Path, samples: Sequence[Sequence[int]],
                 say: Callable[[str], None]) -> None:
        """Load; ``storage`` holds the adapter version, ``samples`` are token ids to learn."""
        self._wake = threading.Event()
        # Fine-tuning is always pending, so nothing is to say that there is little to learn; and
        # what one system found in the cache, its peers would have to compute.
        settings = settings.updated({'drift.min_budget': 1.0, 'memory.prefix_sharing': False})
        self.engine = MeasuredEngine(
            settings, storage=storage, wake=self._wake.set, progress=say)
        self.learner = PendingLearner(self.engine, samples)
        self.learner.on_spent = self.engine.learned
        # Through an untyped name: it does what the engine asks of a learner, no more.
        engine: Any = self.engine
        engine.learner = self.learner
        self._slo = Slo(settings.slo.ttft_ms, settings.slo.tpot_ms)

    def close(self) -> None:
        """End the engine."""
        self.engine.close()

    def run_block(self, system: str, block: int, arrivals: Sequence[Arrival], seconds: float,
                  max_tokens: int) -> Block:
        """Serve ``arrivals`` under a policy, for at least so long and until all are answered."""
        self._set({'scheduler.policy': system})
        self.learner.begin()
        begun = time.monotonic()
        ids = [f'{system}/{block}/{i}' for i in range(len(arrivals))]
        feeder = threading.Thread(target=self._feed, args=(begun, arrivals, ids, max_tokens))
        feeder.start()
        left = {i: a.max_tokens or max_tokens for i, a in zip(ids, arrivals, strict=True)}

        def finished(events: list[Event]) -> bool:
            for event in events:
                if isinstance(event, Response):
                    _expect(event, left.pop(event.query_id))
            return not left and time.monotonic() >= begun + seconds

        self.drive(finished, until=begun + seconds)
        ended = time.monotonic()
        tokens = self.learner.end()
        feeder.join()
        log = self.engine.log
        rows = [request_row(system, block, begun, log.answered(i, begun + a.at), self._slo)
                for i, a in zip(ids, arrivals, strict=True)]
        return Block(
            rows,
            block_row(system, block, wall_s=ended - begun, busy_s=log.busy_s,
                      finetune_tokens=tokens,
                      finetune_steps=self.learner.finished_steps),
            [{'system': system, 'block': block, 'wait_ms': log.finetune_wait_s(i) * 1e3}
             for i in ids],
            iteration_rows(system, block, log))

    def request_seconds(self, arrivals: Sequence[Arrival], max_tokens: int) -> float:
        """Return the device time of one request that is alone; the median of several."""
        busy = []
        for i, arrival in enumerate(arrivals):
            alone = [Arrival(0.0, arrival.text, arrival.ids)]
            busy.append(self.run_block('inference_only', i, alone, 0.0, max_tokens)
                        .block['busy_s'])
        return statistics.median(busy)

    def undivided_steps(self, count: int) -> list[float]:
        """
        Return the seconds of whole fine-tune steps with nothing in between.

        The step is the engine's own, forward alone with its layer graphs kept: the fastest
        way that the engine has to take one.
        """
        spent = []
        for _ in range(count):
            began = time.monotonic()
            step = self.learner.new_step()
            while not step.done:
                step.run_segment()
            spent.append(time.monotonic() - began)
        return spent

    def crowd(self, arrivals: Sequence[Arrival], seconds: float, in_flight: int,
              max_tokens: int) -> list[dict[str, Any]]:
        """Keep so many requests in flight under ``mace``, and return the iterations."""
        before = self.engine.settings
        self._set({'scheduler.policy': 'mace', 'scheduler.max_requests': in_flight})
        self.learner.begin()
        ends, count = time.monotonic() + seconds, 0

        def ask() -> None:
            nonlocal count
            text = arrivals[count % len(arrivals)].text
            # Of different lengths, so that they don't all begin and end at once.
            self.engine.submit(Query(text, id=f'crowd/{count}', temperature=0.0,
                                     max_tokens=max_tokens // 2 + count % max_tokens))
            count += 1

        def finished(events: list[Event]) -> bool:
            if time.monotonic() >= ends:
                return True
            for event in events:
                if isinstance(event, Response):
                    ask()
            return False

        for _ in range(in_flight):
            ask()
        self.drive(finished, until=ends)
        self.learner.end()
        rows = iteration_rows('mace', 0, self.engine.log)
        for i in range(count):
            self.engine.cancel(f'crowd/{i}')
        self.engine.step()
        self.engine.update(before)
        return rows

    def drive(self, finished: Callable[[list[Event]], bool], until: float) -> None:
        """Call :meth:`Engine.step` as the node does, until ``finished`` says so."""
        engine, wake = self.engine, self._wake
        engine.forget()
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            wake.clear()
            iteration = engine.step()
            if finished(iteration.events):
                return
            now = time.monotonic()
            next_at = iteration.wake_at
            if next_at is None or next_at > now:
                # No longer than until the block ends, or the deadline has to be seen.
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
        self.engine.step()      # settings are in force from the next iteration on


def iteration_rows(system: str, block: int, log: Log) -> list[dict[str, Any]]:
    """Return the iterations of a log in one row: ``rows`` under the names in ``columns``."""
    return [{'system': system, 'block': block, 'columns': COLUMNS,
             'rows': [i.row() for i in log.iterations]}]


def _expect(event: Response, max_tokens: int) -> None:
    if event.finish_reason is not FinishReason.LENGTH or event.output_tokens != max_tokens:
        raise AssertionError(
            f'{event.query_id} ended with {event.finish_reason.name} after '
            f'{event.output_tokens} tokens: {event.error}')
