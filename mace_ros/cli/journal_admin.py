# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
List, export, import and delete what a robot keeps: corrections, answers and versions.

It works on the storage folder. Listing and exporting are safe beside a running node; what
changes the folder is refused while a node uses it.
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

from mace_ros.store.export import export, InvalidLine, KINDS, take_in
from mace_ros.store.journal import AnswerRecord, CorrectionRecord, Journal, VersionRecord
from mace_ros.store.journal_file import JournalError
from mace_ros.store.layout import CONFIG, default_folder, JOURNAL, MODEL, WEIGHTS
from mace_ros.store.lock import StorageInUse, StorageLock
from mace_ros.store.retention import (
    forget_answers,
    forget_corrections,
    forget_version,
    needed_versions,
    remove_files,
)


class Refused(RuntimeError):
    """It can't be done; the message says why."""


@contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    """Open the journal in a folder that a node has used before."""
    if not (folder / JOURNAL).exists():
        raise Refused(f'{folder} is no storage folder of a node; name one with --folder')
    # How many answers are kept is for the node to say.
    with Journal(folder / JOURNAL, max_answers=sys.maxsize) as journal:
        yield journal


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a node from using the folder meanwhile."""
    lock = StorageLock(folder, wait_s=0.0)
    try:
        yield
    finally:
        lock.release()


def base_model(folder: Path) -> str:
    """Return the name of the base model, '' if there is none yet."""
    note = folder / MODEL
    return note.read_text().strip() if note.exists() else ''


def read_files(folder: Path, record: VersionRecord) -> tuple[bytes, dict[str, Any]]:
    """Return the weights and the configuration of a version in a storage folder."""
    path = folder / record.path
    return (path / WEIGHTS).read_bytes(), json.loads((path / CONFIG).read_text())


def save_files(folder: Path, record: VersionRecord, weights: bytes,
               config: dict[str, Any]) -> VersionRecord:
    """Save a version in a storage folder that nobody uses; return it as it is there."""
    # Only now: torch takes its time.
    from safetensors import SafetensorError
    from safetensors.torch import load

    from mace_ros.store.adapter_store import AdapterStore

    try:
        tensors = load(weights)
    except SafetensorError as error:
        raise ValueError(f'weights: {error}') from error
    saved = AdapterStore(folder).save(record.profile, record.version, tensors, config)
    return replace(record, path=saved.path, sha256=saved.sha256)


def show(record: AnswerRecord | CorrectionRecord | VersionRecord, live: bool = False) -> str:
    """Return a line about a record, its fields apart by tabs."""
    if isinstance(record, VersionRecord):
        cells = [record.version, record.state.name, record.profile, f'parent {record.parent}',
                 f'{len(record.correction_ids)} corrections',
                 'live' if live else 'on disk' if record.sha256 else 'no files', record.reason]
    else:
        question = next(
            (m['content'] for m in reversed(record.messages) if m['role'] == 'user'), '')
        if isinstance(record, AnswerRecord):
            cells = [record.query_id, f'version {record.adapter_version}', record.profile,
                     question, record.text]
        else:
            cells = [record.id, record.state.name, record.profile, question, record.corrected,
                     f'version {record.adapter_version}' if record.adapter_version else '',
                     record.reason]
    return '\t'.join(' '.join(str(cell).split()) for cell in cells)


def do_list(given: argparse.Namespace) -> None:
    """Print a line for each record."""
    with opened(given.folder) as journal, journal.snapshot():
        lives = journal.lives()
        for record in getattr(journal, given.what)(given.profile):
            print(show(record, record in lives))


def do_export(given: argparse.Namespace) -> None:
    """Write the lines to a file, or to stdout."""
    with opened(given.folder) as journal:
        lines = export(journal, base_model(given.folder), given.only or KINDS, given.profile,
                       partial(read_files, given.folder) if given.weights else None)
        if given.file == '-':
            for line in lines:
                print(line)
        else:
            with open(given.file, 'w', encoding='utf-8') as file:
                file.writelines(f'{line}\n' for line in lines)


def do_import(given: argparse.Namespace) -> None:
    """Take in the lines of a file, or of stdin."""
    with opened(given.folder) as journal, alone(given.folder):
        save = partial(save_files, given.folder)
        source = sys.stdin.fileno() if given.file == '-' else given.file
        # What is no text is refused with its line.
        with open(source, encoding='utf-8', errors='surrogateescape') as file:
            taken = take_in(journal, file, base_model(given.folder), save)
    print(f'{taken["corrections"]} corrections, {taken["answers"]} answers and '
          f'{taken["versions"]} versions taken in, {taken["known"]} known already')
    if taken['versions']:
        print('no version of these is live: ~/rollback makes one so', file=sys.stderr)
    if passed := taken['versions without files']:
        print(f'{passed} versions passed over, whose files are not in the export (see '
              'mace_journal export --weights); their corrections are learned anew',
              file=sys.stderr)


def do_delete(given: argparse.Namespace) -> None:
    """Delete records, all or none."""
    with opened(given.folder) as journal, alone(given.folder):
        with journal.transaction():
            if given.what == 'versions':
                _forget_versions(journal, given.profile or '', given.id)
            else:
                forget = forget_corrections if given.what == 'corrections' else forget_answers
                count = forget(journal, given.id)
                if count < len(set(given.id)):
                    raise Refused(f'{len(set(given.id)) - count} of these are not on record; '
                                  'nothing is deleted')
        if given.what == 'versions':
            # Only now: torch takes its time.
            from mace_ros.store.adapter_store import AdapterStore
            remove_files(journal, AdapterStore(given.folder))
        if not journal.compact():
            raise Refused('deleted, but another process reads the journal, whose log still has '
                          'it: end that process, and run this again or start the node')
    print(f'{len(set(given.id))} {given.what} deleted')


def _forget_versions(journal: Journal, profile: str, numbers: Sequence[str]) -> None:
    by_number = {str(record.version): record for record in journal.versions(profile)}
    for number in numbers:
        record = by_number.get(number)
        if record is None or not record.sha256:
            raise Refused(f'profile {profile!r} has no version {number} on disk; '
                          'nothing is deleted')
        if (profile, record.version) in needed_versions(journal):
            raise Refused(f'version {number} of profile {profile!r} is live, or a profile begins '
                          'from it: roll back first (~/rollback); nothing is deleted')
        forget_version(journal, record)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog='mace_journal', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True, metavar='COMMAND')
    whats = ('corrections', 'answers', 'versions')

    listing = commands.add_parser('list', help='print a line for each', description=(
        'Print a line for each, oldest first; its fields are apart by tabs.'))
    listing.add_argument('what', choices=whats)
    listing.set_defaults(run=do_list)

    out = commands.add_parser('export', help='write all of it as lines of JSON', description=(
        'Write corrections, answers and versions as lines of JSON.'))
    out.add_argument('file', nargs='?', default='-', help='default: stdout')
    out.add_argument('--only', action='append', choices=KINDS, help='may be given again')
    out.add_argument('--weights', action='store_true',
                     help='with the files of versions: some megabytes each')
    out.set_defaults(run=do_export)

    into = commands.add_parser('import', help='take in an export', description=(
        'Take in an export, all or none. What is known stays as it is; corrections that another '
        'robot has learned are to be learned by this one, unless it was told later what to say. '
        'Versions that were exported with their '
        'weights get new numbers; none becomes live before ~/rollback makes it so.'))
    into.add_argument('file', nargs='?', default='-', help='default: stdin')
    into.set_defaults(run=do_import)

    away = commands.add_parser('delete', help='delete for good', description=(
        'Delete for good, all or none. With a correction go all answers to its question. What a '
        'version has learned of it stays until that version is rolled back and deleted, too. '
        'Of a version the files are deleted; that there was one stays on record.'))
    away.add_argument('what', choices=whats)
    away.add_argument('id', nargs='+', help='of a correction or query; the number of a version')
    away.set_defaults(run=do_delete)

    made.set_defaults(node='/mace', folder=None)
    for each in (made, listing, out, into, away):   # before the command, or after it
        each.add_argument('--node', default=argparse.SUPPRESS,
                          help='full name of the node whose folder it is (default: /mace)')
        each.add_argument('--folder', type=Path, default=argparse.SUPPRESS,
                          help="the folder, if the node's storage.folder is set")
    for command in (listing, out, away):
        command.add_argument('--profile', help="default: all; of versions to delete the robot's")
    return made


def main() -> int:
    """Run the program; return the exit code: 1 if it can't be done, 2 for a wrong command."""
    given = parser().parse_args()
    given.folder = (given.folder or default_folder(given.node)).expanduser()
    try:
        given.run(given)
        sys.stdout.flush()
    except BrokenPipeError:     # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Refused, JournalError, StorageInUse, InvalidLine, OSError) as error:
        print(f'mace_journal: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
