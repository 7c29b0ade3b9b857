# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""One run of the node, from start to kill, and a client that keeps it busy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
import random
import sqlite3
import time
from typing import Any

from bench.durability.storage import StorageSnapshot
from bench.systems.node import NodeProcess, START_S
from mace_ros.store.layout import JOURNAL

RUN_S = 12.0           # longest run after the start, for kills at random times
WAIT_S = 200.0          # at most, for the phase at which a kill aims, on a slow machine
# Time for messages on their way, and for Fast DDS (3.2.3) to release the shared memory that the
# killed process had locked: a client that is closed earlier crashes.
DRAIN_S = 3.0
ASK_S = 0.2             # between two questions
MAX_UNANSWERED = 8      # questions, so that a slow machine has time to learn
CORRECT_EVERY = 5       # questions; the node learns nearly as fast, so that it publishes
BURST = 20              # corrections at once
PROFILES = ('', 'ann')
SYNC_S = 0.02           # added to each fsync, as on an SD card
SETTLED_S = 60.0        # at most, for the announcements of live versions after the start


@dataclass
class Promises:
    """What the node has told its client in all runs."""

    acknowledged: set[str] = field(default_factory=set)                         # corrections
    announced: dict[str, tuple[int, str]] = field(default_factory=dict)         # by profile


class NodeRun:
    """A node process and its client, from the start to the kill."""

    def __init__(self, folder: Path, parameters: dict[str, Any], number: int,
                 rng: random.Random, promises: Promises) -> None:
        """Start both."""
        from mace_ros.msg import AdapterVersion, CorrectionStatus

        from mace_ros.ros.client import LATCHED, MaceClient, RELIABLE

        self._rng, self._promises, self._number = rng, promises, number
        self._adapters = folder / 'storage' / 'adapters'
        self._client = MaceClient()
        self._announcements: list[Any] = []     # of versions
        self._statuses: list[Any] = []          # of corrections, also those of earlier runs
        self._client.node.create_subscription(
            CorrectionStatus, '/mace/correction_status', self._statuses.append, RELIABLE)
        self._client.node.create_subscription(
            AdapterVersion, '/mace/adapter_version', self._announcements.append, LATCHED)
        self._node = NodeProcess(folder, parameters, sync_s=SYNC_S)
        self._began = time.monotonic()
        self._ready = False
        self._queries: list[tuple[str, Any]] = []       # profile and handle
        self._corrections: set[str] = set()
        self._used_versions: set[tuple[str, int]] = set()
        self._questions = 0
        self.wrong_start: list[str] = []
        self.lived_s = 0.0

    @property
    def log(self) -> str:
        """The output of the node."""
        return self._node.log

    @property
    def errors(self) -> Counter[str]:
        """Errors in the log of the node."""
        return self._node.errors

    def start(self, snapshot: StorageSnapshot | None) -> float:
        """Wait until the live versions of ``snapshot`` serve; return the seconds to readiness."""
        self._client.wait_until_ready(START_S)
        ready_s, self._ready = time.monotonic() - self._began, True
        expected = dict(snapshot.live) if snapshot is not None else {}
        expected.setdefault('', (0, ''))
        end = time.monotonic() + SETTLED_S
        while (any(self._first_version(p) is None for p in expected)
               and time.monotonic() < end):
            time.sleep(0.01)
        self.wrong_start = [
            f'{profile!r}: {self._first_version(profile)} served instead of {live}'
            for profile, live in expected.items() if self._first_version(profile) != live]
        self.wrong_start += [f'{path.name} still exists'
                             for path in self._adapters.glob('*/.tmp-*')]
        self._known_folders = self._folders()
        return ready_s

    def run_until(self, aim: str) -> None:
        """Keep the node busy until the time of the kill."""
        (earliest_s, latest_s), is_reached = self._trigger(aim)
        ask_at, kill_at = time.monotonic(), time.monotonic() + WAIT_S
        reached = False
        while (now := time.monotonic()) < kill_at:
            if not reached and is_reached():
                reached, kill_at = True, now + self._rng.uniform(earliest_s, latest_s)
            if now >= ask_at:
                ask_at = now + ASK_S
                if sum(not q.is_complete() for _, q in self._queries) < MAX_UNANSWERED:
                    self._ask()
            time.sleep(0.0005)

    def kill(self) -> None:
        """Kill the node; add what it has acknowledged and announced to the promises."""
        from mace_ros.msg import AdapterVersion, CorrectionStatus

        self.lived_s = time.monotonic() - self._began
        self._node.kill()
        time.sleep(DRAIN_S)
        self._collect()
        self._client.close()
        self._promises.acknowledged |= {
            s.id for s in self._statuses if s.state != CorrectionStatus.REJECTED}
        for message in self._announcements:
            if message.state == AdapterVersion.PUBLISHED:
                self._promises.announced[message.profile] = (message.version, message.sha256)

    def phases(self, snapshot: StorageSnapshot) -> list[str]:
        """Return the phases that the kill interrupted, judged by the traces that they left."""
        from mace_ros.msg import CorrectionStatus

        if not self._ready:
            return ['starting']
        newest = {s.id: s.state for s in self._statuses}
        interrupted = {
            'saving': snapshot.leftovers,
            'recording': set(snapshot.unrecorded) - self._known_folders,
            'publishing': [profile for profile, live in snapshot.live.items()
                           if live != self._promises.announced.get(profile)],
            'training': CorrectionStatus.TRAINING in newest.values(),
            'intake': self._corrections - newest.keys()}
        return [phase for phase, found in interrupted.items() if found] or ['serving']

    def unknown_versions(self, snapshot: StorageSnapshot) -> list[str]:
        """Return the versions that have answered and are not in the journal."""
        return [f'{profile!r}: {version}' for profile, version in sorted(self._used_versions)
                if version and (profile, version) not in snapshot.versions]

    # -- the client ------------------------------------------------------------------

    def _trigger(self, aim: str) -> tuple[tuple[float, float], Callable[[], bool]]:
        """Return a condition, and the range of seconds from then to the kill."""
        from mace_ros.msg import CorrectionStatus

        if aim == 'intake':
            at = time.monotonic() + self._rng.uniform(0.0, RUN_S / 2)
            return (0.0, SYNC_S), lambda: time.monotonic() > at and self._burst()
        if aim == 'training':
            return (0.0, 1.0), lambda: any(
                s.state == CorrectionStatus.TRAINING for s in list(self._statuses))
        if aim == 'saving':     # fsync of weights, configuration and folder
            return (0.0, 3 * SYNC_S), lambda: any(self._adapters.glob('*/.tmp-*'))
        if aim == 'recording':      # after the rename
            return (0.0, SYNC_S / 2), lambda: bool(self._folders() - self._known_folders)
        if aim == 'publishing':     # recorded, not announced
            known = self._recorded_versions()
            return (0.0, 0.0), lambda: self._recorded_versions() > known
        return (0.0, RUN_S if aim == 'any' else 0.0), lambda: True

    def _ask(self) -> None:
        """Ask; every few questions, correct an earlier answer or a question of its own."""
        self._collect()
        profile = self._rng.choice(PROFILES)
        self._questions += 1
        name = f'{self._number}-{self._questions}'
        question = f'Question {self._rng.randrange(10000)}?'
        answered = [q for p, q in self._queries if p == profile and q.is_complete()]
        self._queries.append((
            profile, self._client.ask(question, query_id=name, profile=profile)))
        if self._questions % CORRECT_EVERY == 0:
            about = {'query_id': self._rng.choice(answered).id} if (
                answered and self._rng.random() < 0.5) else {'prompt': question}
            self._correct(name, profile, **about)

    def _burst(self) -> bool:
        """Send many corrections at once, most of which contradict each other; return True."""
        for i in range(BURST):
            self._correct(f'{self._number}-burst-{i}', PROFILES[i % len(PROFILES)],
                          prompt=f'Question {i % 4}?')
        return True

    def _correct(self, name: str, profile: str, **about: Any) -> None:
        self._corrections.add(name)
        self._client.correct(f'Answer {name}.', correction_id=name, profile=profile, **about)

    def _collect(self) -> None:
        """Note the versions of complete responses."""
        responses = [query.response for _, query in self._queries if query.is_complete()]
        self._used_versions |= {(r.adapter_profile, r.adapter_version) for r in responses}

    def _first_version(self, profile: str) -> tuple[int, str] | None:
        """Return version and checksum of the first announcement for a profile."""
        from mace_ros.msg import AdapterVersion

        return next(((m.version, m.sha256) for m in list(self._announcements)
                     if m.state == AdapterVersion.PUBLISHED and m.profile == profile), None)

    def _recorded_versions(self) -> int:
        """Return the number of versions in the journal, opened read-only."""
        journal = self._adapters.with_name(JOURNAL)
        with closing(sqlite3.connect(f'file:{journal}?mode=ro', uri=True)) as opened:
            return int(opened.execute('SELECT count(*) FROM versions').fetchone()[0])

    def _folders(self) -> set[str]:
        return {f'adapters/{path.parent.name}/{path.name}' for path in self._adapters.glob('*/v*')}
