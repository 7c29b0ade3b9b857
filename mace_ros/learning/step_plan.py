# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The samples of an optimizer step, in parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mace_ros.api.settings import FinetuneSettings
from mace_ros.finetune.sample import Preference, Sample
from mace_ros.learning.correction_queue import PendingCorrection
from mace_ros.learning.gate import batches
from mace_ros.learning.samples import first_within, rejected_samples
from mace_ros.model.chat import ChatTokenizer


@dataclass(frozen=True)
class StepPlan:
    """
    The samples of an optimizer step, in parts that run one after the other.

    The first part has the preferences, and begins with the ``must_be_right`` samples that
    must be right before training may end.
    """

    parts: tuple[list[Sample], ...]
    must_be_right: int
    preferences: tuple[Preference, ...] = ()


def plan_step(chat: ChatTokenizer, corrections: Sequence[PendingCorrection],
              needed: Sequence[Sample], others: Iterable[Sample], finetune: FinetuneSettings, *,
              most: int, at_least: int) -> StepPlan:
    """
    Divide the samples of a step into parts of ``most`` tokens each if possible.

    ``needed`` are those that must be right, as many as the first part has room for, but
    ``at_least`` the first ones, which are the corrections.
    Under ``finetune.objective: dpo``, the rejected answers of ``corrections`` come behind them.
    """
    pairs = [(i, c.reference, s) for i, c in enumerate(corrections)
             for s in rejected_samples(chat, c.record)] if finetune.objective == 'dpo' else []
    worse = [s for _, _, s in pairs]
    must_be_right = first_within(
        needed, most - sum(s.own_tokens for s in worse), at_least=at_least)
    first = [*must_be_right, *worse]
    rest = [*needed[len(must_be_right):], *others]
    beside = first_within(rest, most - sum(s.own_tokens for s in first))
    return StepPlan(
        ([*first, *beside], *batches(rest[len(beside):], most)), len(must_be_right),
        tuple(Preference(i, len(must_be_right) + k, reference, finetune.dpo_beta)
              for k, (i, reference, _) in enumerate(pairs)))
