# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""How the latest queries fared."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
import math
import threading

from mace_ros.api.events import ErrorCode, FinishReason, Response

# Those that the node itself, and not whoever asked, is to blame for.
OWN_FAULTS = frozenset({
    ErrorCode.NONE, ErrorCode.OVERLOADED, ErrorCode.SLO_UNREACHABLE, ErrorCode.INTERNAL})
MOST = 10000            # queries that are kept, however long the window


@dataclass(frozen=True)
class Attainment:
    """What became of the queries of a window; NaN where there was none."""

    requests: int = 0
    slo_attainment: float = math.nan
    ttft_p95_ms: float = math.nan
    tpot_p95_ms: float = math.nan
    turned_away: int = 0      # because of too much load
    errors: int = 0
    error: str = ''           # the latest one's


class LatencyWindow:
    """
    Keeps the outcomes of some time; from any thread.

    Left out is what says nothing about the node: queries that were cancelled, that were
    malformed, or that came while it did not serve.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._lock = threading.Lock()
        self._outcomes: deque[tuple[float, Response]] = deque(maxlen=MOST)

    def add(self, outcome: Response, now: float) -> None:
        """Note the end of a query at ``now``."""
        if outcome.finish_reason is not FinishReason.CANCELLED and (
                outcome.error_code in OWN_FAULTS):
            with self._lock:
                self._outcomes.append((now, outcome))

    def attainment(self, now: float, window_s: float) -> Attainment:
        """Return what became of those that ended within the last ``window_s`` seconds."""
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
            turned_away=sum(o.finish_reason is FinishReason.REJECTED for o in outcomes),
            errors=len(errors),
            error=errors[-1].error if errors else '')


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that so many are not above; NaN values do not count."""
    known = sorted(v for v in values if not math.isnan(v))
    return known[max(math.ceil(share * len(known)) - 1, 0)] if known else math.nan
