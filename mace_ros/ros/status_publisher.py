# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What is told about the node itself: ``~/latency``, ``~/scheduler`` and ``/diagnostics``."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
import math
import platform
import time

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy

from mace_ros.api.events import Event, Response
from mace_ros.api.settings import Settings
import mace_ros.msg as msg
from mace_ros.ros.conversion import latency_from
from mace_ros.telemetry.device_counters import DeviceCounters
from mace_ros.telemetry.health import Finding, Health
from mace_ros.telemetry.latency import Attainment
from mace_ros.telemetry.status import Hardware, Status

DIAGNOSTICS_PERIOD_S = 1.0
ATTAINMENT_PERIOD_S = 1.0
RELIABLE = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)


class StatusPublisher:
    """Watches the node with timers of the thread that serves ROS."""

    def __init__(self, node: Node, *, health: Health, settings: Callable[[], Settings],
                 sample: Callable[[], Future[Status | None]]) -> None:
        """``sample`` asks for a status, which is None while there is no engine."""
        self._node, self._health, self._settings, self._ask = node, health, settings, sample
        self._latency = node.create_publisher(msg.Latency, '~/latency', RELIABLE)
        self._scheduler = node.create_publisher(msg.Scheduler, '~/scheduler', RELIABLE)
        self.diagnostics = node.create_publisher(DiagnosticArray, '/diagnostics', RELIABLE)
        self.watch(Hardware())
        self._attainment = (-math.inf, Attainment())
        self._asked: Future[Status | None] | None = None
        # Steady: a robot that is looked at may live in simulated time, and it may stand still.
        clock = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = node.create_timer(self._period_s(), self._sample, clock=clock)
        node.create_timer(DIAGNOSTICS_PERIOD_S, self.diagnose, clock=clock)

    def watch(self, hardware: Hardware) -> None:
        """Read the counters of that device from now on."""
        self._status: Status | None = None      # rates are of one engine
        self._hardware_id = hardware.name or platform.node()
        self._counters = DeviceCounters(hardware)

    def settings_changed(self) -> None:
        """Put another rate in force."""
        period_ns = int(self._period_s() * 1e9)
        if self._timer.timer_period_ns != period_ns:
            self._timer.timer_period_ns = period_ns
            self._timer.reset()

    def hear(self, event: Event, stamp: Time) -> None:
        """Take in what happened; from any thread."""
        self._health.note(event, time.monotonic())
        if isinstance(event, Response):
            self._latency.publish(latency_from(event, stamp))

    def _period_s(self) -> float:
        return 1.0 / self._settings().monitor.rate_hz

    def _sample(self) -> None:
        # A device that is loading a model is not asked again and again.
        if self._asked is None or self._asked.done():
            self._asked = self._ask()
            self._asked.add_done_callback(self._sampled)

    def _sampled(self, done: Future[Status | None]) -> None:
        """Publish the sample, in the device's thread."""
        status, before = done.result(), self._status
        self._status = status
        if status is None:
            return
        at, attainment = self._attainment
        if status.now >= at + ATTAINMENT_PERIOD_S:    # it looks at all requests of the window
            attainment = self._health.window.attainment(
                status.now, self._settings().monitor.window_s)
            self._attainment = status.now, attainment
        message = scheduler_message(status, before or status, attainment)
        message.learning_frozen = self._health.frozen
        message.header.stamp = self._node.get_clock().now().to_msg()
        self._scheduler.publish(message)

    def diagnose(self) -> None:
        """Publish how the node is; from any thread."""
        array = DiagnosticArray()
        array.header.stamp = self._node.get_clock().now().to_msg()
        name = self._node.get_fully_qualified_name().lstrip('/')
        array.status = [
            diagnostic_status(finding, name, self._hardware_id)
            for finding in self._health.findings(
                self._status, self._counters.read(), self._settings(), time.monotonic())]
        self.diagnostics.publish(array)


def scheduler_message(status: Status, before: Status, attainment: Attainment) -> msg.Scheduler:
    """Return the numbers of a status; rates are since the one before."""
    now, then = status.statistics, before.statistics
    elapsed = status.now - before.now

    def rate(tokens: int) -> float:
        return tokens / elapsed if elapsed > 0 else math.nan

    return msg.Scheduler(
        queue_depth=status.queue_depth, prefilling=status.prefilling,
        decode_rows=status.decode_rows, kv_use=status.kv_use,
        kv_cached=status.kv_cached, memory_budget_mb=status.budget_mb,
        memory_planned_mb=status.planned_mb,
        corrections_waiting=status.corrections_waiting, freshness_s=status.freshness_s,
        live_version=status.live_version, profiles=status.profiles,
        drift=status.drift_state, drift_level=status.drift_level,
        finetune_budget=status.finetune_budget,
        busy_share=now.busy_share, serving_share=now.serving_share,
        learning_share=now.learning_share,
        decode_rate=rate(now.decode_tokens - then.decode_tokens),
        prefill_rate=rate(now.prefill_tokens - then.prefill_tokens),
        finetune_rate=rate(now.piggybacked_tokens + now.finetune_tokens
                           - then.piggybacked_tokens - then.finetune_tokens),
        pass_decode_rows=now.shape.decode_rows, pass_prefill_tokens=now.shape.prefill_tokens,
        pass_finetune_tokens=now.shape.finetune_tokens,
        predicted_ms=now.predicted_s * 1e3, measured_ms=now.measured_s * 1e3,
        requests=attainment.requests, slo_attainment=attainment.slo_attainment,
        ttft_p95_ms=attainment.ttft_p95_ms, tpot_p95_ms=attainment.tpot_p95_ms,
        iterations=now.iterations, finetune_steps=now.finetune_steps, rejected=now.rejected,
        prefill_tokens=now.prefill_tokens, shared_tokens=status.shared_tokens,
        preemptions=status.preemptions, late_for_learning=now.late_for_learning)


def diagnostic_status(finding: Finding, node: str, hardware_id: str) -> DiagnosticStatus:
    """Return a finding as rqt_robot_monitor shows it."""
    return DiagnosticStatus(
        level=bytes([finding.level]), name=f'{node}: {finding.name}', message=finding.message,
        hardware_id=hardware_id,
        values=[KeyValue(key=key, value=_text(value)) for key, value in finding.values.items()])


def _text(value: float | int | str) -> str:
    if isinstance(value, float):
        return 'unknown' if math.isnan(value) else f'{value:.4g}'
    return str(value)
