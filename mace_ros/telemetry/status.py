# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A snapshot of the engine in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
import math

from mace_ros.scheduling.scheduler import Statistics


@dataclass(frozen=True)
class Status:
    """
    A snapshot between two iterations.

    ``unrecorded`` answers could not be written to the journal, or were dropped because its
    backlog was full: no correction can refer to them by id. Before the first learning job, the
    base model answers ``base_questions_left`` more anchor questions.
    """

    now: float                  # on the engine's clock
    statistics: Statistics
    queue_depth: int = 0
    prefilling: int = 0
    decode_rows: int = 0
    budget_mb: float = 0.0      # memory for everything but the base model
    planned_mb: float = 0.0     # part of the budget that is planned to be in use
    kv_use: float = 0.0         # share of the KV cache that requests hold
    kv_cached: float = 0.0      # share that only the prefix cache holds
    shared_tokens: int = 0      # found in the prefix cache instead of computed, since the start
    preemptions: int = 0        # since the start
    corrections_waiting: int = 0
    freshness_s: float = 0.0    # age of the oldest correction that is not live
    live_version: int = 0
    profiles: int = 0
    journal_error: str = ''     # of the latest write; empty if it succeeded
    drift_state: int = 0        # as in Scheduler.msg
    drift_level: float = 1.0
    finetune_budget: float = 1.0
    journal_backlog: int = 0    # writes that wait for the disk
    unrecorded: int = 0
    storage_free_mb: float = math.nan   # on the disk of the storage folder; NaN is unknown
    learning_error: str = ''    # why learning failed and will be retried
    base_questions_left: int = 0
