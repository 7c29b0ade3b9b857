# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The parameter table as parameters of a ROS node."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter as NodeParameter

from mace_ros.api.settings import InvalidSetting, Parameter, PARAMETERS, Settings, Value


class ParameterServer:
    """
    Declares the parameters on a node, and keeps :class:`Settings` that are always valid.

    A change of several parameters is applied or rejected as a whole, with the reason.
    """

    def __init__(self, node: Node, on_change: Callable[[Settings], None]) -> None:
        """
        Declare all parameters, with the values of the command line and of parameter files.

        ``on_change`` gets the new settings after each change. Raises :class:`InvalidSetting`
        for an initial value that is not allowed.
        """
        self._on_change = on_change
        try:
            node.declare_parameters(
                '', [(p.name, p.default, descriptor(p)) for p in PARAMETERS.values()])
        except InvalidParameterTypeException as error:
            raise InvalidSetting(f'{error} (a float needs its decimal point)') from error
        except InvalidParameterValueException as error:
            raise InvalidSetting(str(error)) from error
        # rclpy has no public access to the overrides of this node.
        unknown = set(getattr(node, '_parameter_overrides', ())) - {
            *PARAMETERS, 'use_sim_time', 'start_type_description_service'}
        for name in sorted(n for n in unknown if not n.startswith('qos_overrides.')):
            node.get_logger().warning(f'{name}: unknown parameter')
        self._settings = Settings().updated(
            {name: node.get_parameter(name).value for name in PARAMETERS})
        # Humble has no callback after a change. There the change counts as made once it is
        # accepted here, since no other callback can reject it afterwards.
        self._has_post_set_callback = hasattr(node, 'add_post_set_parameters_callback')
        node.add_on_set_parameters_callback(self._on_set)
        if self._has_post_set_callback:
            node.add_post_set_parameters_callback(self._apply)

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    def _on_set(self, parameters: list[NodeParameter]) -> SetParametersResult:
        try:
            self._settings.updated(_known(parameters))
        except InvalidSetting as error:
            return SetParametersResult(successful=False, reason=str(error))
        if not self._has_post_set_callback:
            self._apply(parameters)
        return SetParametersResult(successful=True)

    def _apply(self, parameters: list[NodeParameter]) -> None:
        values = _known(parameters)
        if values:
            self._settings = self._settings.updated(values)
            self._on_change(self._settings)


def descriptor(parameter: Parameter) -> ParameterDescriptor:
    """Return the descriptor that ``ros2 param describe`` and rqt_reconfigure show."""
    made = ParameterDescriptor(
        name=parameter.name,
        description=parameter.description + (f' [{parameter.unit}]' if parameter.unit else ''),
        read_only=parameter.read_only)
    if parameter.choices:
        made.additional_constraints = 'one of: ' + ', '.join(parameter.choices)
    if parameter.minimum is None or parameter.maximum is None:
        return made
    if isinstance(parameter.default, float):
        made.floating_point_range = [FloatingPointRange(
            from_value=float(parameter.minimum), to_value=float(parameter.maximum))]
    else:
        made.integer_range = [IntegerRange(
            from_value=int(parameter.minimum), to_value=int(parameter.maximum), step=1)]
    return made


def _known(parameters: Iterable[NodeParameter]) -> dict[str, Value]:
    """Return the values of table parameters, without those of every node (use_sim_time)."""
    return {p.name: p.value for p in parameters if p.name in PARAMETERS}
