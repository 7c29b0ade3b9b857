# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The cost model as JSON, for the next start of the node and for the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mace_ros.scheduling.cost_curve import Curve, FilterState, KNOTS, Ratios
from mace_ros.scheduling.cost_model import CostModel, PASS_SPREADS
from mace_ros.scheduling.plan import SegmentKind

AnyCostModel = TypeVar('AnyCostModel', bound=CostModel)


def to_dict(cost: CostModel) -> dict[str, Any]:
    """Return everything that a cost model has learned, as plain data."""
    return {
        'pass': _curve_to_dict(cost.pass_curve),
        'segments': {kind.name: _curve_to_dict(curve)
                     for kind, curve in cost.segment_curves.items() if not curve.is_empty},
        'pass_ratios': list(cost.pass_ratios),
        'segment_ratios': {
            kind.name: list(ratios) for kind, ratios in cost.segment_ratios.items()},
        'recent': list(cost.recent),
        'errors': cost.relative_errors()}


def from_dict(kind: type[AnyCostModel], data: Mapping[str, Any]) -> AnyCostModel:
    """
    Return a cost model of class ``kind`` with what :func:`to_dict` returned.

    Raises ``ValueError`` or ``LookupError`` if that was another version of it.
    """
    return kind(
        pass_curve=_curve_from_dict(data['pass'], PASS_SPREADS),
        segment_curves={SegmentKind[name]: _curve_from_dict(curve, ())
                        for name, curve in data['segments'].items()},
        pass_ratios=Ratios(data['pass_ratios']),
        segment_ratios={SegmentKind[name]: Ratios(ratios)
                        for name, ratios in data['segment_ratios'].items()},
        recent=data['recent'], errors=data['errors'])


def _curve_to_dict(curve: Curve) -> dict[str, Any]:
    state = curve.state
    return {
        'tokens': KNOTS, 'seconds': curve.levels, 'coefficients': curve.coefficients,
        'guess': state.guess.tolist(), 'unit': state.unit,
        'state': state.mean.tolist(), 'covariance': state.covariance.tolist(),
        'skips': [[tokens, left] for tokens, left in state.skips.items()]}


def _curve_from_dict(data: Mapping[str, Any], spreads: Sequence[float]) -> Curve:
    return Curve(spreads, FilterState(
        mean=np.array(data['state']), covariance=np.array(data['covariance']),
        guess=np.array(data['guess']), unit=data['unit'], skips=dict(data['skips'])))
