# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What the engine does at a moment, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from mace_ros.scheduling.scheduler import Statistics


@dataclass(frozen=True)
class Hardware:
    """What the engine runs on; ``uuid`` is a CUDA device's, as NVML knows it."""

    kind: str = 'cpu'       # or 'cuda'
    name: str = ''
    uuid: str = ''


@dataclass(frozen=True)
class Status:
    """
    A snapshot between two iterations; ``now`` is on the engine's clock.

    ``journal_error`` says why the latest correction or answer could not be written, and is
    empty if it could. ``journal_backlog`` are writes that wait for the disk, and ``unrecorded``
    are answers that could not be written or did not even wait: no correction can name them.
    ``learning_error`` says why device or disk broke learning off, while it is tried again.
    ``base_questions_left`` are asked of the base model before the first job, which waits for that.
    """

    now: float
    statistics: Statistics
    queue_depth: int = 0
    prefilling: int = 0
    decode_rows: int = 0
    budget_mb: float = 0.0      # of memory for all but the base model
    planned_mb: float = 0.0     # of it in use, as planned
    kv_use: float = 0.0
    kv_cached: float = 0.0      # share that nobody holds, kept to be found again
    shared_tokens: int = 0      # found in the KV cache instead of computed, since the start
    preemptions: int = 0        # since the start
    corrections_waiting: int = 0
    freshness_s: float = 0.0
    live_version: int = 0
    profiles: int = 0
    journal_error: str = ''
    drift_state: int = 0        # as in Scheduler.msg
    drift_level: float = 1.0
    finetune_budget: float = 1.0
    journal_backlog: int = 0
    unrecorded: int = 0
    learning_error: str = ''
    base_questions_left: int = 0
