# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The engine's state between two iterations, as plain numbers."""

from __future__ import annotations

from mace_ros.engine.answer_recorder import AnswerRecorder
from mace_ros.engine.background_requests import BackgroundRequests
from mace_ros.engine.learner_port import LearnerPort
from mace_ros.engine.parts import Parts
from mace_ros.engine.request_manager import RequestManager
from mace_ros.memory.budget import MB
from mace_ros.scheduling.scheduler import Scheduler
from mace_ros.store.journal_file import free_mb
from mace_ros.telemetry.status import Status


def take_status(parts: Parts, scheduler: Scheduler, requests: RequestManager,
                recorder: AnswerRecorder, background: BackgroundRequests, learner: LearnerPort,
                now: float) -> Status:
    """Return the state at ``now`` on the engine's clock."""
    pool, running, learning = parts.pool, parts.state.running, learner.status()
    decode_rows, limit = sum(r.is_decoding for r in running), max(pool.limit, 1)
    return Status(
        now=now, statistics=scheduler.statistics(now), queue_depth=requests.queue_depth,
        prefilling=len(running) - decode_rows, decode_rows=decode_rows,
        budget_mb=parts.memory.budget.total / MB,
        planned_mb=parts.memory.budget.planned(pool.held_blocks + pool.cached_blocks) / MB,
        kv_use=pool.held_blocks / limit, kv_cached=pool.cached_blocks / limit,
        shared_tokens=parts.kv_cache.shared_tokens, preemptions=parts.kv_cache.preemptions,
        corrections_waiting=learning.waiting,
        freshness_s=now - learning.oldest_at if learning.waiting else 0.0,
        live_version=parts.live.newest(''), profiles=parts.live.profiles,
        journal_error=recorder.journal_error, drift_state=learning.drift_state,
        drift_level=learning.drift_level, finetune_budget=learning.budget,
        journal_backlog=parts.journal.backlog, unrecorded=recorder.unrecorded,
        storage_free_mb=free_mb(parts.store.folder),
        learning_error=learning.last_error,
        base_questions_left=background.anchors_remaining if learner.wants_anchors else 0)
