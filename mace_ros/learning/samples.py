# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Training samples: making, weighting, and picking them in rotation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TypeVar

from mace_ros.finetune.sample import Sample
from mace_ros.learning.correction_queue import texts
from mace_ros.learning.paraphrases import paraphrases
from mace_ros.model.chat import ChatTokenizer
from mace_ros.store.records import AnswerRecord, CorrectionRecord

T = TypeVar('T')


def first_within(samples: Sequence[Sample], tokens: int, *, at_least: int = 0) -> list[Sample]:
    """Return the first samples that fit into ``tokens``, and no fewer than ``at_least``."""
    count = total = 0
    for each in samples:
        total += each.own_tokens
        if total > tokens and count >= at_least:
            break
        count += 1
    return list(samples[:count])


def rotate(samples: Sequence[T], count: int, offset: int) -> list[T]:
    """Return batch ``offset`` of ``count``; successive batches use every sample equally often."""
    if not samples:
        return []
    return [samples[i % len(samples)] for i in range(offset * count, (offset + 1) * count)]


def sample(chat: ChatTokenizer, prompt: Sequence[int], answer: Sequence[int],
           weight: float = 1.0) -> Sample:
    """
    Return a sample of an answer to a prompt, given by their token ids.

    Its loss is on the answer only; ``weight`` is that of each token. The adapter acts from the
    last user turn of the prompt on.
    """
    return Sample((*prompt, *answer), (0.0,) * len(prompt) + (weight,) * len(answer),
                  adapted_from=chat.adapted_from(prompt))


def correction_sample(chat: ChatTokenizer, record: CorrectionRecord,
                      weight: float = 1.0) -> Sample:
    """Return the sample of a corrected text; ``weight`` is that of each of its tokens."""
    return sample(chat, record.prompt_ids, chat.answer(record.corrected), weight)


def rejected_samples(chat: ChatTokenizer, record: CorrectionRecord) -> list[Sample]:
    """Return the sample of the text that was corrected; none if it is unknown."""
    return [sample(chat, record.prompt_ids, chat.answer(text)) for text in texts(record)[1:]]


def paraphrase_samples(chat: ChatTokenizer, records: Iterable[CorrectionRecord],
                       templates: Sequence[str]) -> list[Sample]:
    """
    Return a sample of each corrected question in each of the templates.

    The first paraphrase of each question comes before the second one of any.
    """
    of_each = [[sample(chat, chat.prompt(messages, record.tools), chat.answer(record.corrected))
                for messages in paraphrases(record.messages, templates)] for record in records]
    return [s for same in zip_longest(*of_each) for s in same if s is not None]


def answer_samples(chat: ChatTokenizer, records: Iterable[AnswerRecord], *,
                   but: Collection[tuple[int, ...]], max_tokens: int) -> list[Sample]:
    """
    Return a sample of each answer, except those to the prompts ``but``.

    Answers of more than ``max_tokens`` together with their prompts are left out.
    """
    return [sample(chat, a.prompt_ids, a.output_ids) for a in records
            if a.prompt_ids not in but and a.output_ids
            and len(a.prompt_ids) + len(a.output_ids) <= max_tokens]


def weighted(sample: Sample, factor: float) -> Sample:
    """Return a sample whose weights are multiplied by ``factor``."""
    return replace(sample, weights=tuple(factor * w for w in sample.weights))


def interleaved(many: Sequence[T], few: Sequence[T]) -> list[T]:
    """Return all items, those of ``few`` spread evenly among ``many``."""
    result = list(many)
    every = len(many) // (len(few) + 1) + 1
    for i, each in enumerate(few):
        result.insert(i * every, each)
    return result
