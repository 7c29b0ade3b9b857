# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
How long will it take? Predicted from what the same device took before.

A hybrid pass takes ``pace * (curve(tokens) + a * decode context + b * prefill context)``,
a segment ``pace * its kind's curve(tokens)``. The curves belong to the device and move
slowly; the pace belongs to the moment (a neighbour on the machine, a hot chip) and moves
quickly. Our own model: MACE (arXiv 2510.03283) publishes no formula for its predictor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import itemgetter
from statistics import median
from typing import Any, TypeAlias

from mace_ros.scheduling.cost_curve import Curve, Ratios
from mace_ros.scheduling.plan import Measurement, PassShape, Segment, SegmentKind

# What was measured, and its seconds.
Sample: TypeAlias = tuple[PassShape | Segment, float]

# Before anything was measured: a slow device, so that nothing is promised.
UNKNOWN_S, UNKNOWN_TOKEN_S = 0.01, 0.001

# The pace is the median of so many ratios to the curves: two may be outliers, and a
# change is followed within three.
PACE_OVER = 5

# How much of the pace the curves take to pass (an exponent): a pace that lasts becomes the
# device's own, or else pace and curves could drift apart for ever without being wrong.
PASSING = 0.95


class CostModel:
    """
    Predicts the seconds of passes and segments, and knows how far it is usually off.

    Starts from :meth:`calibrate`, goes on with :meth:`observe`. With ``upper``, a
    prediction is one that nine of ten measurements stay below.
    """

    def __init__(self) -> None:
        """Begin without a measurement."""
        self._pass = Curve(contexts=2)
        self._segments = {kind: Curve() for kind in SegmentKind}
        self._pass_ratios = Ratios()
        self._segment_ratios = {kind: Ratios() for kind in SegmentKind}
        self._recent: deque[float] = deque(maxlen=PACE_OVER)
        self._pace = 1.0
        self._errors: deque[float] = deque(maxlen=256)

    # -- predicting ------------------------------------------------------------------

    def pass_s(
        self, decode_rows: int = 0, decode_context: int = 0, prefill_tokens: int = 0,
        prefill_context: int = 0, finetune_tokens: int = 0, upper: bool = False,
    ) -> float:
        """Return the seconds of a pass of this :class:`PassShape`; 0 for an empty one."""
        tokens = decode_rows + prefill_tokens + finetune_tokens
        if not tokens:
            return 0.0
        seconds = self._pass.at(tokens)
        if seconds <= 0.0:
            return UNKNOWN_S + UNKNOWN_TOKEN_S * tokens
        decode_s, prefill_s = self._pass.coefficients
        seconds += decode_s * decode_context + prefill_s * prefill_context
        return seconds * self._pace * (self._pass_ratios.upper if upper else 1.0)

    def upper_s(self, seconds: float) -> float:
        """Return what nine of ten passes stay below that were predicted to take so long."""
        return seconds * self._pass_ratios.upper

    def segment_s(self, kind: SegmentKind, tokens: int, upper: bool = False) -> float:
        """Return the seconds of one segment."""
        curve = self._segments[kind]
        if curve.is_empty:
            return self._guess_s(kind, tokens, upper)
        seconds = curve.at(tokens) * self._pace
        return seconds * self._segment_ratios[kind].upper if upper else seconds

    def _guess_s(self, kind: SegmentKind, tokens: int, upper: bool) -> float:
        """Return the seconds of a segment of a kind that was never measured."""
        known = self._segments
        if kind is SegmentKind.BACKWARD_RECOMPUTED and not known[SegmentKind.BACKWARD].is_empty:
            return (self.segment_s(SegmentKind.FORWARD, tokens, upper)
                    + self.segment_s(SegmentKind.BACKWARD, tokens, upper))
        return UNKNOWN_S + UNKNOWN_TOKEN_S * tokens

    def tokens_within(self, kind: SegmentKind, seconds: float, most: int) -> int:
        """Return the most tokens (0 to ``most``) of a segment that stays below ``seconds``."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.segment_s(kind, middle, upper=True) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    # -- learning --------------------------------------------------------------------

    def calibrate(self, samples: Iterable[Sample]) -> None:
        """Learn from ``samples``; several of one thing in a row count as their median."""
        for what, group in groupby(samples, key=itemgetter(0)):
            seconds = [s for _, s in group]
            for _ in seconds:
                self._learn(what, median(seconds))

    def observe(self, measurement: Measurement) -> float:
        """
        Learn from an iteration; return the seconds that were predicted for what it ran.

        Several segments of one size in a row count as their median.
        """
        predicted = measured = 0.0
        parts: list[Sample] = list(measurement.segments)
        if measurement.pass_s > 0.0 and measurement.plan.shape.tokens:
            parts.insert(0, (measurement.plan.shape, measurement.pass_s))
        for what, group in groupby(parts, key=itemgetter(0)):
            times = [s for _, s in group]
            seconds = times[0] if len(times) == 1 else median(times)
            if seconds <= 0.0:
                continue   # a clock too coarse
            expected = self._expected_s(what)
            predicted += expected * len(times)
            measured += sum(times)
            if self._learn(what, seconds / self._pace ** PASSING):
                # Of them all, since a plan counts on all of them ending in time.
                (self._segment_ratios[what.kind] if isinstance(what, Segment)
                 else self._pass_ratios).add(sum(times) / (expected * len(times)))
                self._recent.append(seconds / expected * self._pace)
        if measured > 0.0:
            self._errors.append(abs(predicted - measured) / measured)
        if len(self._recent) == PACE_OVER:
            self._pace = median(self._recent)
        return predicted

    def _expected_s(self, what: PassShape | Segment) -> float:
        if isinstance(what, Segment):
            return self.segment_s(what.kind, what.tokens)
        return self.pass_s(*what)

    def _learn(self, what: PassShape | Segment, seconds: float) -> bool:
        """Teach the curves a time free of the moment's pace. Return whether they were sure."""
        if isinstance(what, Segment):
            return self._segments[what.kind].observe(what.tokens, (), seconds)
        return self._pass.observe(
            what.tokens, (what.decode_context, what.prefill_context), seconds)

    def relative_errors(self) -> list[float]:
        """
        Return |predicted - measured| / measured of the latest iterations, oldest first.

        Each was predicted before it was learned from.
        """
        return list(self._errors)

    # -- keeping ---------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return all that was learned, as plain data for JSON."""
        return {
            'pass': self._pass.to_dict(),
            'segments': {kind.name: curve.to_dict() for kind, curve in self._segments.items()
                         if not curve.is_empty},
            'pass_ratios': list(self._pass_ratios),
            'segment_ratios': {
                kind.name: list(ratios) for kind, ratios in self._segment_ratios.items()},
            'recent': list(self._recent),
            'errors': list(self._errors),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostModel:
        """Return the model that :meth:`to_dict` described."""
        model = cls()
        model._pass = Curve.from_dict(data['pass'])
        for name, curve in data['segments'].items():
            model._segments[SegmentKind[name]] = Curve.from_dict(curve)
        model._pass_ratios = Ratios(data['pass_ratios'])
        for name, ratios in data['segment_ratios'].items():
            model._segment_ratios[SegmentKind[name]] = Ratios(ratios)
        model._recent.extend(data['recent'])
        if len(model._recent) == PACE_OVER:
            model._pace = median(model._recent)
        model._errors.extend(data['errors'])
        return model
