# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Predicts the time of passes and segments from earlier measurements on the same device.

A hybrid pass takes ``pace * (curve(tokens) + a * decode context + b * prefill context + c)``, a
segment ``pace * its kind's curve(tokens)``. ``c`` is 0 for decode rows only, which some devices
compute in a faster way than other tokens. The curves describe the device and move slowly. The
pace describes the moment (another process on the machine, a hot chip) and moves quickly. The
model is our own: MACE (arXiv 2510.03283) publishes no formula for its predictor.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import itemgetter
from statistics import median
from typing import TypeAlias

from mace_ros.scheduling.cost_curve import Curve, Ratios
from mace_ros.scheduling.plan import Measurement, PassShape, Segment, SegmentKind

# A measured pass or segment, and its seconds.
Sample: TypeAlias = tuple[PassShape | Segment, float]

# The longest calibration, in seconds; the model learns the rest while serving.
CALIBRATION_S = 8.0

# Used before anything was measured: conservative, so that SLOs hold.
UNKNOWN_S, UNKNOWN_TOKEN_S = 0.01, 0.001

# The pace is the median of this many ratios to the curves: two may be outliers, and a change is
# followed within three.
PACE_OVER = 5

# The extra terms of passes: the contexts of decode rows and of prefills, and a constant, which is
# added if a pass has other tokens than decode rows.
PASS_SPREADS = 0.3, 0.3, 10.0
MIXED = 1000

# Part of the pace (an exponent) that is divided out of a time before the curves learn from it.
# The rest lets a lasting pace become part of the curves; otherwise pace and curves could drift
# apart without bound while their product stays right.
PACE_SHARE = 0.95


class CostModel:
    """
    Predicts the seconds of passes and segments, and how far off it usually is.

    Starts from :meth:`calibrate` and keeps learning by :meth:`observe`. With ``upper``, a
    prediction is one that nine of ten measurements stay below.
    """

    def __init__(self, *, pass_curve: Curve | None = None,
                 segment_curves: Mapping[SegmentKind, Curve] | None = None,
                 pass_ratios: Ratios | None = None,
                 segment_ratios: Mapping[SegmentKind, Ratios] | None = None,
                 recent: Iterable[float] = (), errors: Iterable[float] = ()) -> None:
        """
        Start without measurements, or from the state of another model.

        ``recent`` are its latest ratios of measured time to the curves, ``errors`` its latest
        relative errors, oldest first.
        """
        self.pass_curve = pass_curve if pass_curve is not None else Curve(PASS_SPREADS)
        self.segment_curves = {kind: Curve() for kind in SegmentKind} | dict(segment_curves or {})
        self.pass_ratios = pass_ratios if pass_ratios is not None else Ratios()
        self.segment_ratios = {
            kind: Ratios() for kind in SegmentKind} | dict(segment_ratios or {})
        self.recent: deque[float] = deque(recent, maxlen=PACE_OVER)
        self._errors: deque[float] = deque(errors, maxlen=256)
        self._pace = 1.0
        self._update_pace()

    # -- prediction ------------------------------------------------------------------

    def pass_s(
        self, decode_rows: int = 0, decode_context: int = 0, prefill_tokens: int = 0,
        prefill_context: int = 0, finetune_tokens: int = 0, upper: bool = False,
    ) -> float:
        """Return the seconds of a pass of this :class:`PassShape`; 0 for an empty one."""
        tokens = decode_rows + prefill_tokens + finetune_tokens
        if not tokens:
            return 0.0
        seconds = self.pass_curve.at(tokens)
        if seconds <= 0.0:
            return UNKNOWN_S + UNKNOWN_TOKEN_S * tokens
        decode_s, prefill_s, mixed_s = self.pass_curve.coefficients
        seconds += decode_s * decode_context + prefill_s * prefill_context
        if tokens != decode_rows:
            seconds += mixed_s * MIXED
        return seconds * self._pace * (self.pass_ratios.upper if upper else 1.0)

    def upper_s(self, seconds: float) -> float:
        """Return the upper prediction of a pass that is predicted to take ``seconds``."""
        return seconds * self.pass_ratios.upper

    def segment_s(self, kind: SegmentKind, tokens: int, upper: bool = False) -> float:
        """Return the seconds of one segment."""
        curve = self.segment_curves[kind]
        if curve.is_empty:
            return self._guess_s(kind, tokens, upper)
        seconds = curve.at(tokens) * self._pace
        return seconds * self.segment_ratios[kind].upper if upper else seconds

    def _guess_s(self, kind: SegmentKind, tokens: int, upper: bool) -> float:
        """Return the seconds of a segment whose kind was never measured."""
        if (kind is SegmentKind.BACKWARD_RECOMPUTED
                and not self.segment_curves[SegmentKind.BACKWARD].is_empty):
            return (self.segment_s(SegmentKind.FORWARD, tokens, upper)
                    + self.segment_s(SegmentKind.BACKWARD, tokens, upper))
        return UNKNOWN_S + UNKNOWN_TOKEN_S * tokens

    def tokens_within(self, kind: SegmentKind, seconds: float, most: int) -> int:
        """Return the most tokens (0 to ``most``) of a segment that ends within ``seconds``."""
        return bisect_right(range(1, most + 1), seconds,
                            key=lambda tokens: self.segment_s(kind, tokens, upper=True))

    # -- learning --------------------------------------------------------------------

    def calibrate(self, samples: Iterable[Sample]) -> None:
        """Learn from ``samples``; consecutive ones of the same thing count as their median."""
        for what, group in groupby(samples, key=itemgetter(0)):
            seconds = [s for _, s in group]
            for _ in seconds:
                self._learn(what, median(seconds))

    def observe(self, measurement: Measurement) -> float:
        """
        Learn from an iteration; return the seconds that were predicted for what it ran.

        Consecutive segments of the same size count as their median.
        """
        predicted = measured = 0.0
        parts: list[Sample] = list(measurement.segments)
        if measurement.pass_s > 0.0 and measurement.plan.shape.tokens:
            parts.insert(0, (measurement.plan.shape, measurement.pass_s))
        for what, group in groupby(parts, key=itemgetter(0)):
            times = [s for _, s in group]
            seconds = times[0] if len(times) == 1 else median(times)
            if seconds <= 0.0:
                continue   # below the clock's resolution
            expected = self.predicted_s(what)
            predicted += expected * len(times)
            measured += sum(times)
            if self._learn(what, seconds / self._pace ** PACE_SHARE):
                # The ratio of all of them, since a plan relies on all of them ending in time.
                self.ratios_of(what).add(sum(times) / (expected * len(times)))
                self.recent.append(seconds / expected * self._pace)
        if measured > 0.0:
            self._errors.append(abs(predicted - measured) / measured)
        self._update_pace()
        return predicted

    def predicted_s(self, what: PassShape | Segment) -> float:
        """Return the seconds of a pass or a segment."""
        if isinstance(what, Segment):
            return self.segment_s(what.kind, what.tokens)
        return self.pass_s(*what)

    def ratios_of(self, what: PassShape | Segment) -> Ratios:
        """Return the ratios of measured to predicted time of passes, or of a kind of segment."""
        return self.segment_ratios[what.kind] if isinstance(what, Segment) else self.pass_ratios

    def relative_errors(self) -> list[float]:
        """
        Return ``|predicted - measured| / measured`` of the latest iterations, oldest first.

        Each prediction was made before learning from the iteration.
        """
        return list(self._errors)

    def _update_pace(self) -> None:
        if len(self.recent) == PACE_OVER:
            self._pace = median(self.recent)

    def _learn(self, what: PassShape | Segment, seconds: float) -> bool:
        """Update a curve with a time at pace 1; return whether it was sure already."""
        if isinstance(what, Segment):
            return self.segment_curves[what.kind].observe(what.tokens, (), seconds)
        mixed = MIXED if what.tokens != what.decode_rows else 0
        return self.pass_curve.observe(
            what.tokens, (what.decode_context, what.prefill_context, mixed), seconds)
