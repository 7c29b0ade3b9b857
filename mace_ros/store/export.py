# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A journal as lines of JSON, to be read, kept or given to another robot.

The first line names the base model, without which token ids mean nothing. Each other one
is a record with the names of its fields, and a ``kind``: answer, correction or version. A
version may have its files with it: ``weights``, in base64, and PEFT's ``config``.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, fields, MISSING, replace
from enum import IntEnum
import hashlib
import json
import math
import sys
from typing import Any, TypeAlias, TypeVar

from mace_ros.api.events import Correction, CorrectionState, VersionState
from mace_ros.api.validation import checked_correction, text_problem
from mace_ros.store.journal import AnswerRecord, CorrectionRecord, Journal, PENDING, VersionRecord
from mace_ros.store.layout import vocabulary_of

KINDS = ('answer', 'correction', 'version')
ROLES = ('system', 'user', 'assistant')     # of what is asked and answered here

# Returns the bytes of a version's weights, and its configuration.
ReadFiles: TypeAlias = Callable[[VersionRecord], tuple[bytes, dict[str, Any]]]
# Saves those under the profile and version of a record; returns it with path and checksum.
SaveFiles: TypeAlias = Callable[[VersionRecord, bytes, dict[str, Any]], VersionRecord]

_Record = TypeVar('_Record', AnswerRecord, CorrectionRecord, VersionRecord)


class InvalidLine(ValueError):
    """A line is not what an export has; the message says which one, and why."""


def export(journal: Journal, model: str, kinds: Collection[str] = KINDS,
           profile: str | None = None, read: ReadFiles | None = None) -> Iterator[str]:
    """
    Yield the lines of a journal of that base model; None is all profiles.

    Versions that are on disk have their files with them if there is somebody to ``read`` these.
    """
    yield json.dumps({'kind': 'model', 'model': model})
    with journal.snapshot():
        found: dict[str, Callable[[str | None], tuple[Any, ...]]] = {
            'answer': journal.answers, 'correction': journal.corrections,
            'version': journal.versions}
        for kind in kinds:
            for record in found[kind](profile):
                files = {}
                if read is not None and kind == 'version' and record.sha256:
                    weights, config = read(record)
                    files = {'weights': base64.b64encode(weights).decode(), 'config': config}
                yield json.dumps({'kind': kind, **_plain(asdict(record)), **files},
                                 ensure_ascii=False)


def take_in(journal: Journal, lines: Iterable[str], model: str,
            save: SaveFiles) -> Counter[str]:
    """
    Keep what is in an export, all or none; return how many of each kind.

    What is known by its id is left as it is. A correction that another robot has learned,
    or was about to, is to be learned by this one, unless this one was told later what to say;
    one that it had given up stays so. A version with its files gets a new number here, and can
    be made live by a rollback; one without is passed over. ``model`` is the base model of this
    journal. Raises :class:`InvalidLine`; what was saved until then is on no record.
    """
    taken: Counter[str] = Counter()
    numbers: dict[tuple[str, int], int] = {}     # of versions here, by profile and number there
    begun = False
    token_ids = range(vocabulary_of(model) or sys.maxsize)
    with journal.transaction():
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                kind = values.pop('kind')
                if values['model'] != model if kind == 'model' else not begun:
                    raise ValueError(f'its base model must come first, and be {model!r}')
                begun = True
                taken[_take_version(journal, values, save, numbers) if kind == 'version'
                      else _take(journal, kind, values, token_ids)] += 1
            except ValueError as error:
                raise InvalidLine(f'line {number}: {error}') from error
            except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
                raise InvalidLine(
                    f'line {number} is nothing that was exported: {type(error).__name__}: '
                    f'{error}') from error
    return taken


def _take(journal: Journal, kind: str, values: dict[str, Any], token_ids: range) -> str:
    """Take in a line; return what became of it, in a word."""
    if kind == 'answer':
        answer = _record(AnswerRecord, values, token_ids)
        if journal.answer(answer.query_id) is not None:
            return 'known'
        # The version that gave it is not one of this journal's.
        journal.record_answer(replace(answer, lineage='', adapter_version=0), given_now=False)
        return 'answers'
    if kind == 'correction':
        correction = _record(CorrectionRecord, values, token_ids)
        lost = (CorrectionState.SUPERSEDED, CorrectionState.REJECTED, CorrectionState.FAILED)
        correction = replace(
            correction, adapter_version=0,
            state=correction.state if correction.state in lost else CorrectionState.ACCEPTED)
        if correction.state in PENDING and (newer := journal.newer_than(correction)):
            correction = replace(
                correction, state=CorrectionState.SUPERSEDED, reason=f'by correction {newer}')
        if not journal.accept(correction):
            return 'known'
        if correction.state in PENDING:
            journal.supersede(correction)
        return 'corrections'
    if kind == 'model':
        return 'models'
    raise ValueError(f'kind {kind!r} is none of {", ".join(KINDS)}')


def _take_version(journal: Journal, values: dict[str, Any], save: SaveFiles,
                  numbers: dict[tuple[str, int], int]) -> str:
    """Take in a version; return what became of it, in a word."""
    coded, config = values.pop('weights', None), values.pop('config', None)
    record = _record(VersionRecord, values)
    if coded is None:
        return 'versions without files'
    weights = base64.b64decode(coded, validate=True)
    if hashlib.sha256(weights).hexdigest() != record.sha256:
        raise ValueError('the weights have another checksum than the version')
    if not isinstance(config, dict):
        raise ValueError('config: an object expected')
    here = {(v.sha256, v.correction_ids): v.version for v in journal.versions(record.profile)}
    known = here.get((record.sha256, record.correction_ids))
    if known is not None:
        numbers[record.profile, record.version] = known
        return 'known'
    new = replace(record, state=VersionState.PUBLISHED, reason='imported',
                  parent=numbers.get((record.profile, record.parent), 0))
    while True:
        new = replace(new, version=journal.next_version(record.profile))
        try:
            journal.record_version(save(new, weights, config))
        except FileExistsError:     # left by what was broken off
            continue
        numbers[record.profile, record.version] = new.version
        return 'versions'


def _record(kind: type[_Record], values: dict[str, Any], token_ids: range = range(0)) -> _Record:
    """Return the record of a line, with all fields in their types."""
    expected = {field.name: field for field in fields(kind)}
    missing = [field.name for field in fields(kind)
               if field.default is MISSING and field.name not in values]
    if missing:
        raise ValueError(f'{", ".join(missing)} missing')
    for name, value in values.items():
        if name not in expected:
            raise ValueError(f'{name} is no field of a {kind.__name__}')
        if name in ('prompt_ids', 'output_ids'):
            if not all(type(i) is int and i in token_ids for i in value):
                raise ValueError(f'{name}: token ids are whole numbers below {token_ids.stop}')
            values[name] = tuple(value)
        elif name == 'messages':
            if not all(m['role'] in ROLES and isinstance(m['content'], str) for m in value):
                raise ValueError(f'messages: each has a content, and as role {" or ".join(ROLES)}')
            if problem := next(filter(None, (text_problem(m['content']) for m in value)), ''):
                raise ValueError(f'messages: {problem}')
            values[name] = tuple(value)
        elif name == 'correction_ids':
            if not all(isinstance(i, str) and not text_problem(i) for i in value):
                raise ValueError(f'{name}: ids are text')
            values[name] = tuple(value)
        elif name == 'state':
            values[name] = (VersionState if kind is VersionRecord else CorrectionState)[value]
        elif value is None and expected[name].type == 'float':
            values[name] = math.nan
        elif expected[name].type in ('int', 'float'):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f'{name}: a number expected, not {value!r}')
        elif type(value).__name__ != expected[name].type:
            raise ValueError(f'{name}: {expected[name].type} expected, not {value!r}')
        elif isinstance(value, str) and (problem := text_problem(value)):
            raise ValueError(f'{name}: {problem}')
    record = kind(**values)
    if isinstance(record, CorrectionRecord):
        # As if somebody had sent it.
        checked_correction(Correction(
            record.corrected, id=record.id, prompt='.', profile=record.profile,
            weight=record.weight, rejected=record.rejected, source=record.source))
    elif isinstance(record, AnswerRecord):
        checked_correction(Correction(
            '.', prompt='.', query_id=record.query_id, conversation_id=record.conversation_id,
            profile=record.profile, rejected=record.text))
    else:
        checked_correction(Correction('.', prompt='.', profile=record.profile))
    return record


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as JSON can hold them, and people read them."""
    plain = dict(values)
    for name, value in values.items():
        if isinstance(value, IntEnum):
            plain[name] = value.name
        elif isinstance(value, float) and math.isnan(value):
            plain[name] = None
    return plain
