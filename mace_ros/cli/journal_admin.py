# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
List, export, import and delete what a robot keeps: corrections, answers and versions.

The program works on the storage folder. Listing and exporting are safe beside a running node;
importing and deleting are refused while a node uses the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
import json
import os
from pathlib import Path
import sys
from typing import Any

from mace_ros.api.wording import counted
from mace_ros.store.export import export, import_lines, InvalidLine, KINDS
from mace_ros.store.journal import Journal
from mace_ros.store.journal_file import JournalError
from mace_ros.store.layout import CONFIG, default_folder, JOURNAL, MODEL, WEIGHTS
from mace_ros.store.lock import StorageInUse, StorageLock
from mace_ros.store.records import AnswerRecord, CorrectionRecord, VersionRecord
from mace_ros.store.retention import remove_files

RECORDS = ('corrections', 'answers', 'versions')


class Refused(RuntimeError):
    """A command can't be carried out; the message says why."""


@contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    """Open the journal of an existing storage folder."""
    if not (folder / JOURNAL).exists():
        raise Refused(f'{folder} is no storage folder of a node; name one with --folder')
    # The limit of answers is a parameter of the node, which is unknown here.
    with Journal(folder / JOURNAL, max_answers=sys.maxsize) as journal:
        yield journal


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep nodes from using the folder."""
    lock = StorageLock(folder, wait_s=0.0)
    try:
        yield
    finally:
        lock.release()


def base_model(folder: Path) -> str:
    """Return the description of the base model, '' if the folder has none yet."""
    note = folder / MODEL
    return note.read_text().strip() if note.exists() else ''


def read_files(folder: Path, record: VersionRecord) -> tuple[bytes, dict[str, Any]]:
    """Return the weights and the PEFT configuration of a version."""
    path = folder / record.path
    return (path / WEIGHTS).read_bytes(), json.loads((path / CONFIG).read_text())


def save_files(folder: Path, record: VersionRecord, weights: bytes,
               config: dict[str, Any]) -> VersionRecord:
    """Save a version in a locked folder; return its record with path and checksum."""
    # Imported here, since torch takes seconds to load and other commands don't need it.
    from mace_ros.store.adapter_store import AdapterStore

    saved = AdapterStore(folder).save_bytes(record.profile, record.version, weights, config)
    return replace(record, path=saved.path, sha256=saved.sha256)


def format_record(record: AnswerRecord | CorrectionRecord | VersionRecord,
                  live: bool = False) -> str:
    """Return one line for a record, its fields separated by tabs."""
    if isinstance(record, VersionRecord):
        cells: list[object] = [
            record.version, record.state.name, record.profile, f'parent {record.parent}',
            counted(len(record.correction_ids), 'correction'),
            'live' if live else 'on disk' if record.sha256 else 'no files', record.reason]
    elif isinstance(record, AnswerRecord):
        cells = [record.query_id, f'version {record.adapter_version}', record.profile,
                 last_question(record), record.text, record.matched_correction_id]
    else:
        cells = [record.id, record.state.name, record.profile, last_question(record),
                 record.corrected or (record.hint and f'hint: {record.hint}'),
                 f'version {record.adapter_version}' if record.adapter_version else '',
                 record.reason, record.scope]
    return format_line(*cells)


def format_line(*cells: object) -> str:
    """Return a line of these cells, separated by tabs."""
    return '\t'.join(' '.join(str(cell).split()) for cell in cells)


def last_question(record: AnswerRecord | CorrectionRecord) -> str:
    """Return the last question of a prompt."""
    return next((m['content'] for m in reversed(record.messages) if m['role'] == 'user'), '')


def list_records(given: argparse.Namespace) -> None:
    """Print one line for each record."""
    with opened(given.folder) as journal, journal.snapshot():
        live = journal.live_versions()
        for record in getattr(journal, given.what)(given.profile):
            print(format_record(record, record in live))


def show_scope(given: argparse.Namespace) -> None:
    """Print one line for each correction that versions answer now, or after a rollback to one."""
    with opened(given.folder) as journal, journal.snapshot():
        if given.version is None:
            profiles = journal.profiles() if given.profile is None else (given.profile,)
            lines = [line for profile in profiles
                     for line in scope_lines(journal, profile, journal.newest(profile))]
        else:
            profile = given.profile or ''
            newest = journal.version(profile, given.version)
            if newest is None:
                raise Refused(f'profile {profile!r} has no version {given.version} on record')
            lines = list(scope_lines(journal, profile, newest))
    for line in lines:
        print(line)
    if not lines:
        print(f'{given.folder}: nothing is learned yet', file=sys.stderr)


def scope_lines(journal: Journal, profile: str,
                newest: VersionRecord | None) -> Iterator[str]:
    """Yield a line for each correction that is answered while a version is the newest one."""
    successors = {} if newest is None else journal.lineage(profile, newest.version).successors
    for correction in journal.scope(profile) if newest is None else journal.scope_of(newest):
        version = successors.get(correction.adapter_version, 0)     # 0: the base model
        yield format_line(
            profile, f'version {version}', correction.id,
            correction.scope or 'adapter.scope', last_question(correction),
            correction.corrected, correction.source)


def export_records(given: argparse.Namespace) -> None:
    """Write an export to a file, or to stdout."""
    with opened(given.folder) as journal:
        lines = export(journal, base_model(given.folder), given.only or KINDS, given.profile,
                       partial(read_files, given.folder) if given.weights else None)
        if given.file == '-':
            for line in lines:
                print(line)
        else:
            with open(given.file, 'w', encoding='utf-8') as file:
                file.writelines(f'{line}\n' for line in lines)


def import_records(given: argparse.Namespace) -> None:
    """Import the export in a file, or from stdin."""
    with opened(given.folder) as journal, locked(given.folder):
        save = partial(save_files, given.folder)
        source = sys.stdin.fileno() if given.file == '-' else given.file
        # surrogateescape: bytes that are not UTF-8 are reported with the number of their line.
        with open(source, encoding='utf-8', errors='surrogateescape') as file:
            counts = import_lines(journal, file, base_model(given.folder), save)
    print(f'{counted(counts["corrections"], "correction")}, '
          f'{counted(counts["answers"], "answer")} and '
          f'{counted(counts["versions"] + counts["live versions"], "version")} imported, '
          f'{counts["known"]} known already')
    if counts['versions']:
        print(counted(counts['versions'], 'of these versions is', 'of these versions are')
              + ' not live: use ~/rollback to make one live', file=sys.stderr)
    if skipped := counts['versions without files']:
        print(f'{counted(skipped, "version")} skipped, since the export has no files of them '
              '(see mace_journal export --weights); their corrections will be learned again',
              file=sys.stderr)


def delete_records(given: argparse.Namespace) -> None:
    """Delete records, all or none."""
    superseded: set[str] = set()        # corrections that are deleted with the given ones
    with opened(given.folder) as journal, locked(given.folder):
        with journal.transaction():
            if given.what == 'versions':
                forget_versions(journal, given.profile or '', given.id)
            else:
                deleted = ({r.id for r in journal.forget_corrections(given.id).records}
                           if given.what == 'corrections' else journal.forget_answers(given.id))
                if missing := set(given.id) - deleted:
                    raise Refused(
                        f'not on record: {", ".join(sorted(missing))}; nothing is deleted')
                superseded = deleted - set(given.id)
        if given.what == 'versions':
            from mace_ros.store.adapter_store import AdapterStore
            remove_files(journal, AdapterStore(given.folder))
        if not journal.compact():
            raise Refused('deleted, but another process reads the journal, whose log still '
                          'contains it: end that process, and run this again or start the node')
    print(counted(len(set(given.id)), given.what.removesuffix('s')), 'deleted'
          + (f', and {len(superseded)} superseded by that' if superseded else ''))


def forget_versions(journal: Journal, profile: str, numbers: Sequence[str]) -> None:
    """Mark the files of versions for deletion; raise :class:`Refused` for those in use."""
    by_number = {str(record.version): record for record in journal.versions(profile)}
    in_use = journal.versions_in_use()
    for number in numbers:
        record = by_number.get(number)
        if record is None or not record.sha256:
            raise Refused(f'profile {profile!r} has no version {number} on disk; '
                          'nothing is deleted')
        if (profile, record.version) in in_use:
            raise Refused(f'version {number} of profile {profile!r} is live: roll back first '
                          '(~/rollback); nothing is deleted')
        journal.forget_version_files(record)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog='mace_journal', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True, metavar='COMMAND')

    list_ = commands.add_parser('list', help='print one line per record', description=(
        'Print one line per record, oldest first; its fields are separated by tabs.'))
    list_.add_argument('what', choices=RECORDS)
    list_.set_defaults(run=list_records)

    scope = commands.add_parser('scope', help='print what versions have learned', description=(
        'Print one line for each correction in the scope of a version: profile, version (0: the '
        'base model), id, scope, question, answer and source. Questions that resemble none of them '
        'are answered by the base model (see adapter.scope).'))
    scope.add_argument('--version', type=int, help='default: the live ones')
    scope.set_defaults(run=show_scope)

    export_ = commands.add_parser('export', help='write records as lines of JSON', description=(
        'Write corrections, answers and versions as lines of JSON.'))
    export_.add_argument('file', nargs='?', default='-', help='default: stdout')
    export_.add_argument('--only', action='append', choices=KINDS, help='may be repeated')
    export_.add_argument('--weights', action='store_true',
                         help='include the files of versions, some megabytes each')
    export_.set_defaults(run=export_records)

    import_ = commands.add_parser('import', help='import an export', description=(
        'Import an export, all or none. Known records are left as they are. Corrections that the '
        'other robot has learned will be learned by this one, unless this one has received a '
        'later correction of the same prompt. Versions exported with their weights get new '
        'numbers. If a profile has no live version here, those that were live there are live here, '
        'and answer their corrections without learning; ~/rollback makes another one live.'))
    import_.add_argument('file', nargs='?', default='-', help='default: stdin')
    import_.set_defaults(run=import_records)

    delete = commands.add_parser('delete', help='delete records for good', description=(
        'Delete records for good, all or none. Deleting a correction also deletes all answers to '
        'its question, and the corrections that it has superseded. From the next start on, the '
        "base model (or, for a profile, the robot's version) answers that question in the same "
        'words, unless a newer correction of the question is kept. The weights keep what they '
        'learned until that version is rolled back and deleted. Deleting a version deletes its '
        'files; its record '
        'stays.'))
    delete.add_argument('what', choices=RECORDS)
    delete.add_argument('id', nargs='+', help='id of a correction or query; number of a version')
    delete.set_defaults(run=delete_records)

    made.set_defaults(node='/mace', folder=None)
    for each in (made, list_, scope, export_, import_, delete):    # before or after the command
        each.add_argument('--node', default=argparse.SUPPRESS,
                          help='full name of the node (default: /mace)')
        each.add_argument('--folder', type=Path, default=argparse.SUPPRESS,
                          help="the storage folder, if the node's storage.folder is set")
    for command in (list_, scope, export_, delete):
        command.add_argument(
            '--profile', help="default: all profiles; for versions to delete, the robot's own")
    return made


def without_ros_args(arguments: Sequence[str]) -> list[str]:
    """Leave out the ROS arguments, which launch and ``ros2 run`` may append: up to a ``--``."""
    own, ros = [], False
    for argument in arguments:
        if argument == '--ros-args':
            ros = True
        elif ros:
            ros = argument != '--'
        else:
            own.append(argument)
    return own


def main() -> int:
    """Run the program; return the exit code: 1 if a command fails, 2 for a wrong command."""
    given = parser().parse_args(without_ros_args(sys.argv[1:]))
    given.folder = (given.folder or default_folder(given.node)).expanduser()
    try:
        given.run(given)
        sys.stdout.flush()
    except BrokenPipeError:     # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Refused, JournalError, StorageInUse, InvalidLine, OSError) as error:
        print(f'mace_journal: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
