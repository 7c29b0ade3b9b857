# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Outcomes of recent queries: SLO attainment and latency percentiles."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
import math
import threading

from mace_ros.api.events import ErrorCode, FinishReason, Response

# Outcomes that say something about the node; other codes are errors of the client.
COUNTED_CODES = frozenset({
    ErrorCode.NONE, ErrorCode.OVERLOADED, ErrorCode.SLO_UNREACHABLE, ErrorCode.INTERNAL})
MAX_OUTCOMES = 10000    # kept, however long the window


@dataclass(frozen=True)
class Attainment:
    """Statistics of the queries of a window; NaN if there were none."""

    requests: int = 0
    slo_attainment: float = math.nan
    ttft_p95_ms: float = math.nan
    tpot_p95_ms: float = math.nan
    rejected: int = 0         # because of overload
    errors: int = 0
    error: str = ''           # message of the latest error


class LatencyWindow:
    """
    Keeps the outcomes of recent queries; thread-safe.

    Queries that were cancelled, malformed, or sent while the node was not serving are left out:
    they say nothing about the node.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._outcomes: deque[tuple[float, Response]] = deque(maxlen=MAX_OUTCOMES)

    def add(self, outcome: Response, now: float) -> None:
        """Add the outcome of a query that ended at ``now``."""
        if outcome.finish_reason is not FinishReason.CANCELLED and (
                outcome.error_code in COUNTED_CODES):
            with self._lock:
                self._outcomes.append((now, outcome))

    def attainment(self, now: float, window_s: float) -> Attainment:
        """Return statistics of the queries that ended within the last ``window_s`` seconds."""
        with self._lock:
            while self._outcomes and self._outcomes[0][0] < now - window_s:
                self._outcomes.popleft()
            outcomes = [outcome for _, outcome in self._outcomes]
        if not outcomes:
            return Attainment()
        errors = [o for o in outcomes if o.finish_reason is FinishReason.ERROR]
        return Attainment(
            requests=len(outcomes),
            slo_attainment=sum(o.slo_met for o in outcomes) / len(outcomes),
            ttft_p95_ms=percentile((o.ttft_ms for o in outcomes), 0.95),
            tpot_p95_ms=percentile((o.tpot_ms for o in outcomes), 0.95),
            rejected=sum(o.finish_reason is FinishReason.REJECTED for o in outcomes),
            errors=len(errors),
            error=errors[-1].error if errors else '')


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that a ``share`` of the values does not exceed; ignores NaN."""
    known = sorted(v for v in values if not math.isnan(v))
    return known[max(math.ceil(share * len(known)) - 1, 0)] if known else math.nan
