# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Robots that have learned thousands of corrections: files, disk space and rollbacks."""

from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path
import random
import shutil
import threading

import pytest
from support.robot import LESSONS, Robot, taught_robot
import torch

from mace_ros.api.events import (
    AdapterVersion,
    Correction,
    CorrectionState,
    CorrectionStatus,
    FinishReason,
    Query,
    Response,
    VersionState,
)
from mace_ros.api.settings import Settings
from mace_ros.engine import engine
from mace_ros.engine.adapter_cache import AdapterCache
from mace_ros.engine.inbox import Inbox
from mace_ros.learning import backoff
from mace_ros.memory.adapter_slots import ServedVersion
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal import Journal
from mace_ros.store.layout import JOURNAL, WEIGHTS
from mace_ros.store.records import VersionRecord
from mace_ros.store.retention import remove_files

FIRST, SECOND, THIRD = LESSONS
OTHER = 'Tell me about the sea.'
NO_SPACE = 1e7      # MB


@pytest.fixture
def robot(settings: Settings, tmp_path: Path) -> Iterator[Robot]:
    """Return a robot with one slot, and three versions; the slot is empty."""
    with taught_robot(settings, tmp_path) as made:
        yield made


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let files of versions be read from an event on only."""
    load, go_on = AdapterStore.load, threading.Event()

    def slow(*arguments: object) -> object:
        assert go_on.wait(20.0)
        return load(*arguments)     # type: ignore[arg-type]

    monkeypatch.setattr(AdapterStore, 'load', slow)
    yield go_on
    go_on.set()


def rejected(robot: Robot) -> list[AdapterVersion]:
    """Return the events of versions that could not be read."""
    return [e for e in robot.events if isinstance(e, AdapterVersion)
            and e.state is VersionState.REJECTED]


def roll_back(robot: Robot, version: int) -> None:
    """Make a version the newest one."""
    done = robot.engine.rollback('', version)
    while not done.done():
        robot.events += robot.engine.step().events
    done.result()


def change(robot: Robot, name: str, value: float) -> None:
    """Set a parameter."""
    robot.engine.update(robot.engine.settings.updated({name: value}))
    robot.events += robot.engine.step().events


def version_folder(folder: Path, version: int) -> Path:
    """Return the folder of a version."""
    return folder / f'adapters/_robot/v{version:06d}'


# Files

def test_a_file_that_is_truncated_while_the_node_runs_costs_its_version_only(
        robot: Robot, tmp_path: Path) -> None:
    """In place, as ``cp`` of a backup does: were the file mapped, the process would end."""
    assert robot.ask(FIRST).text == 'Ada.'
    assert WEIGHTS not in Path('/proc/self/maps').read_text()
    assert robot.ask(SECOND).text == 'In the shed.'
    os.truncate(version_folder(tmp_path, 1) / WEIGHTS, 100)
    assert robot.ask(FIRST).adapter_version == 0
    [damaged] = rejected(robot)
    assert (damaged.version, damaged.path) == (1, str(version_folder(tmp_path, 1)))
    assert 'SHA-256' in damaged.reason
    assert {q: robot.ask(q).text for q in (SECOND, THIRD)} == {
        q: LESSONS[q] for q in (SECOND, THIRD)}


def test_a_damaged_version_is_no_error_before_the_engine_hears_of_it(
        robot: Robot, tmp_path: Path) -> None:
    """The end of another query may start a query that waits for the version meanwhile."""
    parts, inbox = robot.engine.parts, Inbox(lambda: None)
    cache = AdapterCache(parts.slots, parts.lora, parts.live, parts.store, inbox)
    os.truncate(version_folder(tmp_path, 1) / WEIGHTS, 100)
    version = ServedVersion('', 1)
    assert cache.pin(version) is None
    cache.wait(60.0)
    assert cache.pin(version) is None
    [event] = cache.damaged(version)
    assert event.version == 1 and parts.live.records('').keys() == {2, 3}
    cache.close()


def test_a_rollback_does_without_a_lost_version_that_is_not_the_newest(
        robot: Robot, tmp_path: Path) -> None:
    shutil.rmtree(version_folder(tmp_path, 1))
    assert robot.ask(FIRST).adapter_version == 0
    roll_back(robot, 2)
    assert robot.ask(SECOND).text == 'In the shed.'
    assert robot.ask(FIRST).adapter_version == robot.ask(THIRD).adapter_version == 0


def test_a_restored_backup_answers_again_after_a_rollback(robot: Robot, tmp_path: Path) -> None:
    """To the version that is the newest one already: nothing else changes, and no restart."""
    file = version_folder(tmp_path, 1) / WEIGHTS
    content = file.read_bytes()
    file.unlink()
    assert robot.ask(FIRST).adapter_version == 0
    file.write_bytes(content)
    roll_back(robot, 3)
    assert {q: robot.ask(q).text for q in LESSONS} == LESSONS


def test_other_queries_are_answered_while_a_version_is_read(
        robot: Robot, reading: threading.Event) -> None:
    robot.engine.submit(Query(FIRST, id='waits'))
    assert robot.ask(OTHER).adapter_version == 0
    assert not any(isinstance(e, Response) and e.query_id == 'waits' for e in robot.events)
    reading.set()
    answer = robot.response('waits')
    assert (answer.text, answer.adapter_version) == ('Ada.', 1)


def test_an_idle_robot_reads_a_version_before_it_goes_on_learning(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the query would wait for a learning slice, too."""
    monkeypatch.setattr(engine, 'READ_WAIT_S', 20.0)
    robot.engine.submit(Query(FIRST, id='q'))
    robot.events += robot.engine.step().events
    assert robot.engine.requests.queue_depth == 0
    assert robot.answer('q').text == 'Ada.'


def test_a_query_that_waits_for_a_file_can_be_cancelled(
        robot: Robot, reading: threading.Event) -> None:
    robot.engine.submit(Query(FIRST, id='waits'))
    robot.events += robot.engine.step().events
    robot.engine.cancel('waits')
    assert robot.response('waits').finish_reason is FinishReason.CANCELLED
    reading.set()
    assert {q: robot.ask(q).text for q in LESSONS} == LESSONS


def test_a_version_that_is_taken_back_while_it_is_read_is_not_damaged(
        robot: Robot, tmp_path: Path, reading: threading.Event) -> None:
    """Its files may be deleted by then."""
    robot.engine.submit(Query(FIRST, id='waits'))
    robot.events += robot.engine.step().events
    roll_back(robot, 0)
    (version_folder(tmp_path, 1) / WEIGHTS).unlink()
    reading.set()
    assert robot.response('waits').adapter_version == 0
    assert not rejected(robot)


def test_a_pause_ends_a_query_that_waits_for_a_file(
        robot: Robot, reading: threading.Event) -> None:
    robot.engine.submit(Query(FIRST, id='waits'))
    robot.events += robot.engine.step().events
    [ended] = [e for e in robot.engine.pause() if isinstance(e, Response)]
    assert ended.finish_reason is FinishReason.CANCELLED


# Work that does not grow with all that was learned

def test_a_rollback_reads_one_version(robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    load, read = AdapterStore.load, list[str]()

    def counting(store: AdapterStore, path: str, sha256: str) -> object:
        read.append(path)
        return load(store, path, sha256)

    monkeypatch.setattr(AdapterStore, 'load', counting)
    with monkeypatch.context() as patch:    # what was learned in the other versions stays
        patch.setattr(Journal, 'scope', None)
        roll_back(robot, 2)
    assert [path[-7:] for path in read] == ['v000002']
    assert [robot.ask(q).adapter_version for q in LESSONS] == [1, 2, 0]
    roll_back(robot, 3)
    assert [robot.ask(q).adapter_version for q in LESSONS] == [1, 2, 3]


def test_surplus_versions_are_found_without_reading_whole_records(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each publication: of thousands of versions, that would take a quarter of a second."""
    store = AdapterStore(tmp_path)
    with Journal(tmp_path / JOURNAL) as journal:
        for version in range(1, 6):
            saved = store.save('', version, {'weight': torch.ones(2)}, {})
            journal.publish(VersionRecord(
                '', version, version - 1, continues=version - 1, path=saved.path,
                sha256=saved.sha256))
        monkeypatch.setattr(Journal, 'versions', None)
        journal.forget_old_versions(2)
        remove_files(journal, store)
    assert sorted(path.name for path in tmp_path.glob('adapters/*/*')) == ['v000004', 'v000005']


def test_the_scope_after_rollbacks_is_that_of_a_restart(robot: Robot) -> None:
    """Back and forth, with a correction that was replaced, and one that waits."""
    changed = robot.correct(Correction('Grace.', id='changed', prompt=FIRST))
    assert changed.adapter_version == 4
    change(robot, 'finetune.budget', 0.0)
    robot.engine.correct(Correction('Red.', id='waits', prompt=THIRD))
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'waits')
    draw, live = random.Random(3), robot.engine.parts.live
    for version in (3, 4, 0, 4, *(draw.randrange(5) for _ in range(8))):
        roll_back(robot, version)
        on_record = robot.engine.parts.journal.submit(lambda journal: journal.scope('')).result()
        assert {c.correction_id for c in live.scope('')} == {c.id for c in on_record}


def test_a_job_reads_what_its_version_has_learned_only(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, 'scope', None)
    learned = robot.correct(Correction('Green.', id='newer', prompt=THIRD))
    assert (learned.state, learned.adapter_version) == (CorrectionState.LEARNED, 4)
    assert {q: robot.ask(q).text for q in LESSONS} == {**LESSONS, THIRD: 'Green.'}


# Disk space

def test_corrections_are_rejected_before_the_disk_is_full(robot: Robot, tmp_path: Path) -> None:
    """A thumbs-down needs no version; everything else waits for space."""
    change(robot, 'storage.min_free_mb', NO_SPACE)
    for fields in ({'corrected': 'Red.'}, {'corrected': '', 'hint': 'Look at the gate.'}):
        state = robot.correct(Correction(**fields, id='k', prompt=OTHER))   # type: ignore[arg-type]
        assert state.state is CorrectionState.REJECTED
        assert 'storage.min_free_mb' in state.reason and str(tmp_path) in state.reason
    robot.engine.correct(Correction('', id='disliked', query_id=robot.ask(OTHER).query_id))
    state = robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'disliked')
    assert isinstance(state, CorrectionStatus) and state.state is CorrectionState.RECORDED
    assert {q: robot.ask(q).text for q in LESSONS} == LESSONS
    change(robot, 'storage.min_free_mb', 0.0)
    assert robot.correct(Correction('Red.', id='k', prompt=OTHER)).state is CorrectionState.LEARNED


def test_accepted_corrections_wait_for_space(
        robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, 'LONGEST_S', 0.05)
    robot.engine.correct(Correction('Blue and deep.', id='k', prompt=OTHER))
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'k'
                and e.state is CorrectionState.TRAINING)
    change(robot, 'storage.min_free_mb', NO_SPACE)
    while 'storage.min_free_mb' not in robot.engine.status().learning_error:
        robot.events += robot.engine.step().events
    change(robot, 'storage.min_free_mb', 0.0)
    robot.until(lambda e: isinstance(e, CorrectionStatus) and e.id == 'k'
                and e.state is CorrectionState.LEARNED)
    assert robot.ask(OTHER).text == 'Blue and deep.'
