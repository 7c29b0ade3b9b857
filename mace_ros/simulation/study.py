# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A study: replays of several policies, at one load and at multiples of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import as_completed, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from mace_ros.api.settings import Settings
from mace_ros.simulation import arrival_trace
from mace_ros.simulation.arrival_trace import Arrival
from mace_ros.simulation.replay import Load, Outcome, replay, Target
from mace_ros.simulation.virtual_learning import Mistakes

PROGRESS_EVERY_S = 0.2


@dataclass(frozen=True)
class Source:
    """
    The source of arrivals: a ``recorded`` trace, or a generator.

    ``scale`` multiplies the trace's rate, or ``rate`` (requests per second).
    """

    kind: str                                   # trace, poisson or bursty
    name: str                                   # for reports
    recorded: tuple[Arrival, ...] = ()
    rate: float = 0.1
    scale: float = 1.0

    def arrivals(self, count: int, seed: int, factor: float = 1.0) -> list[Arrival]:
        """Return ``count`` arrivals at ``factor`` times the rate."""
        scale = self.scale * factor
        if self.kind == 'trace':
            return arrival_trace.thinned(self.recorded, scale, count, seed)
        make = arrival_trace.poisson if self.kind == 'poisson' else arrival_trace.bursty
        return make(self.rate * scale, count, seed)


@dataclass(frozen=True)
class Study:
    """The parameters of a study; the results depend on these fields only."""

    target: Target
    source: Source
    settings: Settings = field(default_factory=Settings)
    policies: tuple[str, ...] = ('mace', 'periodic', 'continuous', 'inference_only')
    requests: int = 1000
    learning: str = 'corrections'
    mistakes: Mistakes = field(default_factory=Mistakes)
    sample_tokens: int = 256
    loads: tuple[float, ...] = ()       # further multiples of the load
    load_requests: int = 200            # at each of these
    seed: int = 0

    def load(self, count: int, factor: float = 1.0) -> Load:
        """Return the load of ``count`` requests at ``factor`` times the rate."""
        return Load(self.source.arrivals(count, self.seed, factor), self.learning,
                    self.mistakes, self.sample_tokens, self.seed)


@dataclass(frozen=True)
class Task:
    """One replay of a study; ``values`` override the study's settings."""

    study: Study
    policy: str
    count: int
    factor: float = 1.0
    values: tuple[tuple[str, Any], ...] = ()
    skips: bool = True

    def run(self, on_progress: Callable[[int], object] | None = None) -> Outcome:
        """Run the replay; see :func:`mace_ros.simulation.replay.replay`."""
        study = self.study
        return replay(
            study.target, study.settings.updated(dict(self.values)), self.policy,
            study.load(self.count, self.factor), factor=self.factor, skips=self.skips,
            on_progress=on_progress)


def tasks_of(study: Study, skips: bool = True) -> list[Task]:
    """Return the replays of a study: all policies at its own load, then at the other loads."""
    main = [Task(study, policy, study.requests, skips=skips) for policy in study.policies]
    return main + [Task(study, policy, study.load_requests, factor, skips=skips)
                   for factor in study.loads for policy in study.policies]


def run(tasks: Sequence[Task], *, processes: int,
        on_progress: Callable[[int], object] | None = None) -> list[Outcome]:
    """
    Run tasks in several processes; return their outcomes in the same order.

    ``on_progress`` is called with the number of requests answered since its last call.
    """
    if processes <= 1 or len(tasks) <= 1:
        return [task.run(on_progress) for task in tasks]
    context = get_context('spawn')
    counter = context.Value('q', 0)
    reported = 0
    # Long tasks first, so that none of them runs alone at the end.
    order = sorted(range(len(tasks)), key=lambda i: -tasks[i].count)
    with ProcessPoolExecutor(
            processes, mp_context=context, initializer=_share, initargs=(counter,)) as pool:
        futures = {pool.submit(_run, tasks[i]): i for i in order}
        found: dict[int, Outcome] = {}
        pending = set(futures)
        while pending:
            try:
                for future in as_completed(pending, timeout=PROGRESS_EVERY_S):
                    pending.discard(future)
                    found[futures[future]] = future.result()
            except TimeoutError:
                pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            done = counter.value
            if on_progress is not None:
                on_progress(done - reported)
            reported = done
    return [found[i] for i in range(len(tasks))]


_counter: Synchronized[int] | None = None   # of a worker process: requests answered in all


def _share(counter: Synchronized[int]) -> None:
    global _counter
    _counter = counter


def _run(task: Task) -> Outcome:
    def on_progress(done: int) -> None:
        if _counter is not None:
            with _counter.get_lock():
                _counter.value += done
    return task.run(on_progress)
