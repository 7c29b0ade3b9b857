# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Which questions resemble an edit in memory; no answer is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import time

from bench.edits.edit_set import Edit
from bench.edits.memory import EditMemory
from bench.edits.sequential import Row
from bench.edits.unrelated import Unrelated
from mace_ros.api.settings import Settings
from mace_ros.model.loading import load_model


def measure(settings: Settings, edits: Sequence[Edit], unrelated: Sequence[Unrelated],
            sizes: Iterable[int]) -> list[Row]:
    """
    For each size, remember that many edits; return a sample for each kind of question.

    A sample has the similarities of its questions, whether each resembles its own edit most, and
    how many milliseconds it took to find that out.
    """
    tokenizer = load_model(settings.model.source, device='cpu', dtype='float32',
                           cache=settings.storage.model_cache).tokenizer
    rows: list[Row] = []
    for size in sorted(sizes):
        remembered, memory = edits[:size], EditMemory(tokenizer)
        for edit in remembered:
            memory.add(edit)
        for kind, asked in (
                ('rephrase', [(edit.rephrase, edit) for edit in remembered if edit.rephrase]),
                ('near', [(edit.near_miss, edit) for edit in remembered if edit.near_miss]),
                ('unrelated', [(question, None) for _, question in unrelated])):
            found, ms = [], []
            for question, _ in asked:
                began = time.perf_counter()
                found.append(memory.nearest(question))
                ms.append((time.perf_counter() - began) * 1e3)
            rows.append({
                'remembered': size, 'threshold': settings.adapter.scope_threshold, 'kind': kind,
                'similarities': [similarity for _, similarity in found], 'ms': ms,
                'own': [nearest is edit for (nearest, _), (_, edit) in zip(
                    found, asked, strict=True)]})
    return rows
