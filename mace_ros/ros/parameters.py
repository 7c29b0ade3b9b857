# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The parameter table as parameters of a ROS node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    ParameterType,
    SetParametersResult,
)
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter as NodeParameter

from mace_ros.api.settings import InvalidSetting, Parameter, PARAMETERS, Settings, Value
from mace_ros.store.layout import default_folder

FOLDER = PARAMETERS['storage.folder']
TYPES = {bool: ParameterType.PARAMETER_BOOL, int: ParameterType.PARAMETER_INTEGER,
         float: ParameterType.PARAMETER_DOUBLE, str: ParameterType.PARAMETER_STRING}


class ParameterServer:
    """
    Declares the parameters on a node, and keeps :class:`Settings` that are always valid.

    A change of several parameters is applied or rejected as a whole, with the reason. The range
    that a tool shows as a slider grows when a larger value is set that is allowed; ROS refuses
    values outside the range of a descriptor, and has no range for display only.
    """

    def __init__(self, node: Node, on_change: Callable[[Settings], None]) -> None:
        """
        Declare all parameters, with the values of the command line and of parameter files.

        ``on_change`` gets the new settings after each change. Raises :class:`InvalidSetting`
        for an initial value that is not allowed.
        """
        self._node, self._on_change = node, on_change
        # rclpy has no public access to the overrides of this node.
        overrides = {name: override.value for name, override
                     in getattr(node, '_parameter_overrides', {}).items()}
        # Humble has no callback before a change, which would widen a range.
        sliders = hasattr(node, 'add_pre_set_parameters_callback')
        try:
            node.declare_parameters('', [
                (p.name, p.default, descriptor(
                    p, slider=sliders and _on_slider(p, overrides.get(p.name)),
                    read_only=p.read_only and p is not FOLDER))
                for p in PARAMETERS.values()])
        except InvalidParameterTypeException as error:
            raise InvalidSetting(f'{error} (a float needs its decimal point)') from error
        except InvalidParameterValueException as error:
            raise InvalidSetting(str(error)) from error
        self._show_folder_in_use()
        unknown = set(overrides) - {
            *PARAMETERS, 'use_sim_time', 'start_type_description_service'}
        for name in sorted(n for n in unknown if not n.startswith('qos_overrides.')):
            node.get_logger().warning(f'{name}: unknown parameter')
        self._settings = Settings().updated(
            {name: node.get_parameter(name).value for name in PARAMETERS})
        # Humble has no callback after a change. There the change counts as made once it is
        # accepted here, since no other callback can reject it afterwards.
        self._has_post_set_callback = hasattr(node, 'add_post_set_parameters_callback')
        if sliders:
            node.add_pre_set_parameters_callback(self._widen)
        node.add_on_set_parameters_callback(self._on_set)
        if self._has_post_set_callback:
            node.add_post_set_parameters_callback(self._apply)

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    def _show_folder_in_use(self) -> None:
        """Let ``storage.folder`` read back as an absolute path, from now on read-only."""
        folder = self._node.get_parameter(FOLDER.name).value
        path = (Path(folder).expanduser().absolute() if folder
                else default_folder(self._node.get_fully_qualified_name()))
        self._node.set_parameters([NodeParameter(FOLDER.name, value=str(path))])
        self._node.set_descriptor(FOLDER.name, descriptor(FOLDER))

    def _widen(self, parameters: list[NodeParameter]) -> list[NodeParameter]:
        """Extend the range of a parameter to its maximum before a value beyond its slider."""
        for parameter in parameters:
            row = PARAMETERS.get(parameter.name)
            if row is not None and not row.read_only and not _on_slider(row, parameter.value):
                self._node.set_descriptor(row.name, descriptor(row))
        return parameters

    def _on_set(self, parameters: list[NodeParameter]) -> SetParametersResult:
        try:
            self._settings.updated(_known(parameters))
        except InvalidSetting as error:
            return SetParametersResult(successful=False, reason=str(error))
        if not self._has_post_set_callback:
            self._apply(parameters)
        return SetParametersResult(successful=True)

    def _apply(self, parameters: list[NodeParameter]) -> None:
        before, values = self._settings, _known(parameters)
        if not values:
            return
        self._settings = before.updated(values)
        for name in values:
            old, new = before.value(name), self._settings.value(name)
            if new != old:
                self._node.get_logger().info(f'{name} is {new!r}, and was {old!r}')
        self._on_change(self._settings)


def descriptor(parameter: Parameter, *, slider: bool = False,
               read_only: bool | None = None) -> ParameterDescriptor:
    """
    Return the descriptor that ``ros2 param describe`` and rqt_reconfigure show.

    With ``slider``, its range ends where the parameter's slider does.
    """
    made = ParameterDescriptor(
        name=parameter.name,
        description=parameter.description + (f' [{parameter.unit}]' if parameter.unit else ''),
        read_only=parameter.read_only if read_only is None else read_only,
        type=TYPES[type(parameter.default)])
    if parameter.choices:
        made.additional_constraints = 'one of: ' + ', '.join(parameter.choices)
    if parameter.minimum is None or parameter.maximum is None:
        return made
    maximum = parameter.maximum
    if slider and parameter.slider is not None:
        maximum = parameter.slider
        made.additional_constraints = f'up to {parameter.maximum:g} can be set'
    if isinstance(parameter.default, float):
        made.floating_point_range = [FloatingPointRange(
            from_value=float(parameter.minimum), to_value=float(maximum))]
    else:
        made.integer_range = [IntegerRange(
            from_value=int(parameter.minimum), to_value=int(maximum), step=1)]
    return made


def _on_slider(parameter: Parameter, value: object) -> bool:
    """Return whether a slider of the parameter can show the value."""
    return not (parameter.slider is not None and isinstance(value, (int, float))
                and value > parameter.slider)


def _known(parameters: Iterable[NodeParameter]) -> dict[str, Value]:
    """Return the values of table parameters, without those of every node (use_sim_time)."""
    return {p.name: p.value for p in parameters if p.name in PARAMETERS}
