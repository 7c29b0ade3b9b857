# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The live versions of each profile: their files, and which questions they answer.

A version has learned a few corrections. The next version continues it and takes its place, or
begins anew and is live beside it. So several versions of a profile may be live, and each
correction is answered by one of them: the version that has learned it, or the one that continues
that version. What a version has learned cannot be lost by a version that does not continue it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from mace_ros.api.settings import AdapterSettings, EVERYWHERE
from mace_ros.learning.scope import entry, Match, Scope
from mace_ros.memory.adapter_slots import BASE, ServedVersion
from mace_ros.store.corrections import Deleted
from mace_ros.store.records import CorrectionRecord, VersionRecord, wording_key

Weights: TypeAlias = Mapping[str, Tensor]


@dataclass
class LiveSet:
    """
    The live versions of one profile; ``newest`` is 0 without a version.

    ``records`` name the files of the live versions. Their weights stay on disk until a query or a
    job needs them: those of thousands of versions would fill the memory.
    ``successors`` maps each version of the lineage to the live version that contains its
    corrections.
    ``everywhere`` is the newest version that was trained to answer every question, 0 without one.
    """

    newest: int = 0
    records: dict[int, VersionRecord] = field(default_factory=dict)
    successors: dict[int, int] = field(default_factory=dict)
    everywhere: int = 0

    def drop(self, version: int) -> None:
        """Let the base model answer in place of a version that cannot be read."""
        self.records.pop(version, None)
        self.successors = {older: 0 if newer == version else newer
                           for older, newer in self.successors.items()}
        self.newest = max(self.records, default=0)
        if self.everywhere == version:
            self.everywhere = 0


@dataclass(frozen=True)
class VersionMatch:
    """The version in whose scope a question is, and the correction that it resembles most."""

    version: ServedVersion
    match: Match


class LiveVersions:
    """
    The live versions of all profiles with their scopes.

    Any thread may call :meth:`newest`; everything else is for the device's thread only.
    """

    def __init__(self, frequency: Callable[[str], float]) -> None:
        """Begin without a version; see :class:`Scope` for ``frequency``."""
        self._frequency = frequency
        self._live: dict[str, LiveSet] = {}
        self._scopes: dict[str, Scope] = {}
        self._nothing = Scope(frequency)
        # Of each profile, the wordings of questions whose corrections were deleted.
        self._deleted: dict[str, set[str]] = {}

    # -- versions --------------------------------------------------------------------

    @property
    def profiles(self) -> int:
        """Profiles that have a live version of their own."""
        return sum(live.newest > 0 for live in self._live.values())

    def newest(self, profile: str) -> int:
        """Return the newest live version of a profile itself, 0 if it has none; any thread."""
        return self._of(profile).newest

    def records(self, profile: str) -> Mapping[int, VersionRecord]:
        """Return the records of a profile's live versions, by number."""
        return self._of(profile).records

    def drop(self, version: ServedVersion) -> VersionRecord | None:
        """
        Let the base model answer in place of a version that cannot be read; return its record.

        Returns None if it is not live any more: then it is no loss.
        """
        live = self._of(version.profile)
        record = live.records.get(version.version)
        if record is not None:
            live.drop(version.version)
        return record

    def learned_by(self, version: ServedVersion) -> set[str]:
        """Return the ids of the corrections that a live version answers."""
        successors = self._of(version.profile).successors
        return {known.correction_id for known in self.scope(version.profile)
                if successors.get(known.learned_in, 0) == version.version}

    def everywhere(self, profile: str, default: str = EVERYWHERE) -> int:
        """
        Return the profile's version that answers every question in no scope, 0 if none does.

        It was trained for that, and the ``default`` scope or that of a correction which it has
        learned is everywhere.
        """
        live = self._of(profile)
        answers = live.everywhere and (default == EVERYWHERE or any(
            known.scope == EVERYWHERE
            and live.successors.get(known.learned_in) == live.everywhere
            for known in self.scope(profile)))
        return live.everywhere if answers else 0

    def publish(self, record: VersionRecord, learned: Iterable[CorrectionRecord]) -> None:
        """
        Serve a version, and the corrections that it has learned.

        It takes the place of the version that it continues.
        """
        live = self._live.setdefault(record.profile, LiveSet())
        live.records.pop(record.continues, None)
        for older, successor in live.successors.items():
            if record.continues and record.continues in (successor, older):
                live.successors[older] = record.version
        live.newest = live.successors[record.version] = record.version
        live.records[record.version] = record
        if record.everywhere:
            live.everywhere = record.version
        self.learned(record.profile, learned)

    def roll_back(self, profile: str, live: LiveSet,
                  forgotten: Sequence[CorrectionRecord]) -> None:
        """Serve other versions of a profile, which have not learned the ``forgotten`` ones."""
        self._live[profile] = live
        self.forget(forgotten)

    def replace(self, profile: str, live: LiveSet, learned: Iterable[CorrectionRecord]) -> None:
        """Serve other versions of a profile, with the corrections that they have learned."""
        self._live[profile] = live
        self._scopes[profile] = Scope(self._frequency)
        self.learned(profile, learned)

    def _of(self, profile: str) -> LiveSet:
        return self._live.get(profile) or LiveSet()

    # -- scopes ----------------------------------------------------------------------

    def scope(self, profile: str) -> Scope:
        """Return what the versions of a profile have learned."""
        return self._scopes.get(profile, self._nothing)

    def learned(self, profile: str, learned: Iterable[CorrectionRecord]) -> None:
        """Add corrections that the versions now answer right."""
        scope = self._scopes.setdefault(profile, Scope(self._frequency))
        for record in learned:
            scope.add(entry(record))

    def failed(self, record: CorrectionRecord) -> None:
        """Forget the correction that this one was to replace: it was wrong, too."""
        scope = self.scope(record.profile)
        known = scope.get(record.prompt_ids)
        if known is None or known.correction_id != record.id:
            scope.discard_replaced(entry(record))

    def forget(self, records: Sequence[CorrectionRecord]) -> None:
        """Take corrections out of the scope."""
        for record in records:
            scope = self.scope(record.profile)
            known = scope.get(record.prompt_ids)
            if known is not None and known.correction_id == record.id:
                scope.discard(record.prompt_ids)

    def delete(self, deleted: Deleted) -> None:
        """Forget deleted corrections for good; see :meth:`exclude`."""
        self.forget(deleted.records)
        for profile, wording in deleted.questions:
            self.exclude(profile, [wording])

    def exclude(self, profile: str, wordings: Iterable[str]) -> None:
        """
        Let no version of a profile answer the questions of deleted corrections.

        Otherwise, a correction that resembles a deleted one would bring in a version that has
        learned both. From then on, only a learned correction of the same question, in these or
        other words, brings in a version for it.
        """
        self._deleted.setdefault(profile, set()).update(wordings)

    def excludes(self, profile: str, questions: Sequence[str]) -> bool:
        """Return whether a question is one of a deleted correction."""
        deleted = self._deleted.get(profile)
        return bool(deleted and questions and wording_key(questions[-1]) in deleted)

    def match(self, profile: str, questions: Sequence[str],
              settings: AdapterSettings) -> tuple[VersionMatch | None, float]:
        """
        Return the version in whose scope a question is, and the similarity to the nearest one.

        The first of ``questions`` that is in a scope decides: the question alone, then the
        question with those before it (:func:`mace_ros.learning.question.questions`).
        """
        scope, excluded = self.scope(profile), self.excludes(profile, questions)
        best, asked = None, ''
        for question in questions:
            found = scope.match(question)
            if found is not None and (best is None or found.similarity > best.similarity):
                best, asked = found, question
            if best is not None and best.similarity >= settings.scope_threshold and not (
                    excluded and not scope.is_of_same_question(asked, best)):
                version = self._of(profile).successors.get(best.learned_in, 0)
                return VersionMatch(_served(profile, version), best), best.similarity
        return None, 0.0 if best is None else best.similarity

    def will_answer(self, version: ServedVersion, questions: Sequence[str],
                    records: Sequence[CorrectionRecord], settings: AdapterSettings) -> bool:
        """Return whether a version will answer a question once it has learned more corrections."""
        found, _ = self.match(version.profile, questions, settings)
        if found is not None and found.version == version:
            return True
        added = Scope(self._frequency)
        for record in records:
            added.add(entry(record))
        matches = (added.match(question) for question in questions)
        return any(m is not None and m.similarity >= settings.scope_threshold for m in matches)


def _served(profile: str, version: int) -> ServedVersion:
    return ServedVersion(profile, version) if version else BASE
