# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The journal as lines of JSON, for reading, backup or transfer to another robot.

The first line names the base model, without which token ids are meaningless. Every other line
is a record with its field names and a ``kind``: answer, correction or version. The line of a
version may include its files: ``weights``, in base64, and PEFT's ``config``. That of a live one
then has the ids of the corrections that it answers, as ``live``. The last lines are then the
questions whose corrections were deleted: what versions have learned of them, they still know.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, MISSING, replace
from enum import IntEnum
import hashlib
import json
import math
import sys
from typing import Any, TypeAlias, TypeVar

from mace_ros.api.chat_validation import ROLES, text_problem
from mace_ros.api.events import Correction, CorrectionState, VersionState
from mace_ros.api.validation import checked_correction
from mace_ros.store.journal import Journal
from mace_ros.store.layout import vocabulary_of
from mace_ros.store.records import AnswerRecord, CorrectionRecord, PENDING, VersionRecord

KINDS = ('answer', 'correction', 'version')
DELETED = 'deleted question'    # with files of versions
# States of a correction that an import keeps: it was given up, or nothing is learned from it.
KEPT_STATES = (CorrectionState.SUPERSEDED, CorrectionState.REJECTED, CorrectionState.FAILED,
               CorrectionState.PROPOSED, CorrectionState.RECORDED)

# Returns the bytes of a version's weights, and its PEFT configuration.
ReadFiles: TypeAlias = Callable[[VersionRecord], tuple[bytes, dict[str, Any]]]
# Saves both under the profile and version of a record; returns it with path and checksum.
SaveFiles: TypeAlias = Callable[[VersionRecord, bytes, dict[str, Any]], VersionRecord]

_Record = TypeVar('_Record', AnswerRecord, CorrectionRecord, VersionRecord)


class InvalidLine(ValueError):
    """A line can't be imported; the message says which line, and why."""


@dataclass
class _Imported:
    """
    The new numbers of imported versions by exported profile and version, and correction ids.

    ``occupied`` are the profiles that had a live version before the import.
    """

    occupied: frozenset[str]
    numbers: dict[tuple[str, int], int] = field(default_factory=dict)
    corrections: set[str] = field(default_factory=set)


def export(journal: Journal, model: str, kinds: Collection[str] = KINDS,
           profile: str | None = None, read: ReadFiles | None = None) -> Iterator[str]:
    """
    Yield the lines of a journal, of one profile or of all.

    ``model`` is the description of the journal's base model. With ``read``, versions on disk
    are exported with their files.
    """
    yield json.dumps({'kind': 'model', 'model': model})
    with journal.snapshot():
        select: dict[str, Callable[[str | None], tuple[Any, ...]]] = {
            'answer': journal.answers, 'correction': journal.corrections,
            'version': journal.versions}
        live = {} if read is None else _live(journal)
        for kind in (kind for kind in KINDS if kind in kinds):      # corrections before versions
            for record in select[kind](profile):
                files: dict[str, Any] = {}
                if read is not None and kind == 'version' and record.sha256:
                    weights, config = read(record)
                    files = {'weights': base64.b64encode(weights).decode(), 'config': config}
                    if (answered := live.get((record.profile, record.version))) is not None:
                        files['live'] = answered
                yield json.dumps({'kind': kind, **_plain(asdict(record)), **files},
                                 ensure_ascii=False)
        with_versions = read is not None and 'version' in kinds
        for owner in journal.profiles() if profile is None else (profile,):
            for wording in sorted(journal.deleted_questions(owner) if with_versions else ()):
                yield json.dumps({'kind': DELETED, 'profile': owner, 'wording': wording})


def _live(journal: Journal) -> dict[tuple[str, int], list[str]]:
    """Return the ids of the corrections that each live version answers."""
    found: dict[tuple[str, int], list[str]] = {
        (record.profile, record.version): [] for record in journal.live_versions()}
    for profile in journal.profiles():
        successors = journal.live_lineage(profile).successors
        for correction in journal.learned(profile):
            version = successors.get(correction.adapter_version, 0)
            if (profile, version) in found:
                found[profile, version].append(correction.id)
    return found


def import_lines(journal: Journal, lines: Iterable[str], model: str,
                 save: SaveFiles) -> Counter[str]:
    """
    Import an export, all or none; return how many records became what.

    Records whose id is known are skipped. Corrections that the other robot has learned or was
    to learn become ACCEPTED, unless this journal has a later correction of the same prompt;
    those that the other robot gave up keep their state. A version with its files gets a new
    number; one without is skipped. Those that were live become live, and the corrections that they
    answer LEARNED, unless their profile has a live version here; the others can be made live by a
    rollback. ``model`` describes this journal's base model.

    Raises :class:`InvalidLine`; files saved before are then in no record.
    """
    counts: Counter[str] = Counter()
    imported = _Imported(frozenset(record.profile for record in journal.live_versions()))
    model_named = False
    token_ids = range(vocabulary_of(model) or sys.maxsize)
    with journal.transaction():
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                kind = values.pop('kind')
                if values['model'] != model if kind == 'model' else not model_named:
                    raise ValueError(f'its base model must come first, and be {model!r}')
                model_named = True
                what = (_import_version(journal, values, save, imported) if kind == 'version'
                        else _import_deleted(journal, values, imported) if kind == DELETED
                        else _import_record(journal, kind, values, token_ids))
                counts[what] += 1
                if what == 'corrections':
                    imported.corrections.add(values['id'])
            except ValueError as error:
                raise InvalidLine(f'line {number}: {error}') from error
            except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
                raise InvalidLine(
                    f'line {number} is not the line of an export: {type(error).__name__}: '
                    f'{error}') from error
    return counts


def _import_record(
        journal: Journal, kind: str, values: dict[str, Any], token_ids: range) -> str:
    """Import an answer or a correction; return what to count it as."""
    if kind == 'answer':
        answer = _record(AnswerRecord, values, token_ids)
        if journal.answer(answer.query_id) is not None:
            return 'known'
        # Its version is not in this journal.
        journal.record_answer(
            replace(answer, lineage='', adapter_version=0, matched_correction_id=''),
            given_now=False)
        return 'answers'
    if kind == 'correction':
        correction = _record(CorrectionRecord, values, token_ids)
        correction = replace(
            correction, adapter_version=0,
            state=correction.state if correction.state in KEPT_STATES
            else CorrectionState.ACCEPTED)
        if correction.state in PENDING and not correction.corrected.strip():
            raise ValueError('corrected: empty')
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
    raise ValueError(f'kind {kind!r} is not one of {", ".join(KINDS)}')


def _import_version(journal: Journal, values: dict[str, Any], save: SaveFiles,
                    imported: _Imported) -> str:
    """Import a version; return what to count it as."""
    encoded, config = values.pop('weights', None), values.pop('config', None)
    answered = values.pop('live', None)
    record = _record(VersionRecord, values)
    if encoded is None:
        return 'versions without files'
    weights = base64.b64decode(encoded, validate=True)
    if hashlib.sha256(weights).hexdigest() != record.sha256:
        raise ValueError('the checksum of the weights is not that of the version')
    if not isinstance(config, dict):
        raise ValueError('config: an object expected')
    here = {(v.sha256, v.correction_ids): v.version for v in journal.versions(record.profile)}
    known = here.get((record.sha256, record.correction_ids))
    if known is not None:
        imported.numbers[record.profile, record.version] = known
        return 'known'
    occupied = record.profile in imported.occupied
    # Where the files of the parent are not kept any more, the live version before takes its place.
    before = None if occupied else journal.newest(record.profile)
    new = replace(
        record, state=VersionState.PUBLISHED, reason='imported',
        parent=imported.numbers.get(
            (record.profile, record.parent), 0 if before is None else before.version),
        continues=imported.numbers.get((record.profile, record.continues), 0))
    while True:
        try:
            new = save(replace(new, version=journal.next_version(record.profile)), weights, config)
            break
        except FileExistsError:     # of an import that failed
            continue
    journal.record_version(new)
    imported.numbers[record.profile, record.version] = new.version
    if answered is None or occupied:
        return 'versions'
    journal.make_live(new.profile, new.version)
    journal.mark_learned(imported.corrections.intersection(answered), new.version)
    return 'live versions'


def _import_deleted(journal: Journal, values: dict[str, Any], imported: _Imported) -> str:
    """
    Exclude a question from the imported versions; return what to count it as.

    The versions of a profile that had some before may have learned it themselves.
    """
    profile, wording = values['profile'], values['wording']
    _check_texts('profile', [profile])
    _check_texts('wording', [wording])
    checked_correction(Correction('.', prompt='.', profile=profile))
    if profile not in imported.occupied:
        journal.exclude_questions([(profile, wording)])
    return 'deleted questions'


def _record(kind: type[_Record], values: dict[str, Any], token_ids: range = range(0)) -> _Record:
    """Return the record of a line, with every field checked and converted to its type."""
    expected = {field.name: field for field in fields(kind)}
    missing = [field.name for field in fields(kind)
               if field.default is MISSING and field.name not in values]
    if missing:
        raise ValueError(f'{", ".join(missing)} missing')
    for name in values:
        if name not in expected:
            raise ValueError(f'{name} is not a field of {kind.__name__}')
    states = VersionState if kind is VersionRecord else CorrectionState
    converted: dict[str, Any] = {
        name: states[value] if name == 'state'
        else _field(name, str(expected[name].type), value, token_ids)
        for name, value in values.items()}
    record = kind(**converted)
    _check(record)
    return record


def _field(name: str, type_name: str, value: Any, token_ids: range) -> Any:
    """Return the value of a field in its type; raise ValueError."""
    if name in ('prompt_ids', 'output_ids'):
        if not all(type(i) is int and i in token_ids for i in value):
            raise ValueError(f'{name}: token ids are whole numbers below {token_ids.stop}')
        return tuple(value)
    if name == 'messages':
        if not all(m['role'] in ROLES and isinstance(m['content'], str) for m in value):
            raise ValueError(f'messages: each needs a content, and as role {" or ".join(ROLES)}')
        _check_texts(name, [m['content'] for m in value])
        for message in value:
            _check_texts(name, [call[key] for call in message.get('tool_calls', ())
                                for key in ('id', 'name', 'arguments')])
        return tuple(value)
    if name == 'tools':
        _check_texts(name, [tool[key] for tool in value
                            for key in ('name', 'description', 'parameters')])
        return tuple(value)
    if name == 'correction_ids':
        if not all(isinstance(i, str) and not text_problem(i) for i in value):
            raise ValueError(f'{name}: ids are text')
        return tuple(value)
    if value is None and type_name == 'float':
        return math.nan
    if type_name in ('int', 'float'):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f'{name}: a number expected, not {value!r}')
    elif type(value).__name__ != type_name:
        raise ValueError(f'{name}: {type_name} expected, not {value!r}')
    elif isinstance(value, str) and (problem := text_problem(value)):
        raise ValueError(f'{name}: {problem}')
    return value


def _check_texts(name: str, texts: list[Any]) -> None:
    for text in texts:
        if problem := text_problem(text) if isinstance(text, str) else 'not a text':
            raise ValueError(f'{name}: {problem}')


def _check(record: AnswerRecord | CorrectionRecord | VersionRecord) -> None:
    """Apply the checks of a correction that is sent to the node; raise InvalidCorrection."""
    if isinstance(record, CorrectionRecord):
        correction = Correction(
            record.corrected, id=record.id, prompt='.', profile=record.profile,
            weight=record.weight, rejected=record.rejected, source=record.source,
            scope=record.scope, hint=record.hint)
    elif isinstance(record, AnswerRecord):
        correction = Correction(
            '.', prompt='.', query_id=record.query_id, conversation_id=record.conversation_id,
            profile=record.profile, rejected=record.text)
    else:
        correction = Correction('.', prompt='.', profile=record.profile)
    checked_correction(correction)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return values in types that JSON has, with enums by name."""
    plain = dict(values)
    for name, value in values.items():
        if isinstance(value, IntEnum):
            plain[name] = value.name
        elif isinstance(value, float) and math.isnan(value):
            plain[name] = None
    return plain
