# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The state of the node itself as ``~/latency``, ``~/scheduler`` and ``/diagnostics``."""

from __future__ import annotations

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
from mace_ros.api.hardware import Hardware
import mace_ros.msg as msg
from mace_ros.ros.conversion import latency_from
from mace_ros.ros.engine_thread import EngineThread
from mace_ros.ros.parameters import ParameterServer
from mace_ros.telemetry.device_counters import DeviceCounters
from mace_ros.telemetry.health import Finding, Health
from mace_ros.telemetry.latency import Attainment
from mace_ros.telemetry.status import Status

DIAGNOSTICS_PERIOD_S = 1.0
ATTAINMENT_PERIOD_S = 1.0
RELIABLE = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)


class StatusPublisher:
    """Samples the engine and the device with timers, and publishes what it finds."""

    def __init__(self, node: Node, health: Health, parameters: ParameterServer,
                 engine_thread: EngineThread) -> None:
        """Create the publishers and the timers, which run in the thread that serves ROS."""
        self._node, self._health, self._parameters = node, health, parameters
        self._engine_thread = engine_thread
        self._latency = node.create_publisher(msg.Latency, '~/latency', RELIABLE)
        self._scheduler = node.create_publisher(msg.Scheduler, '~/scheduler', RELIABLE)
        self.diagnostics = node.create_publisher(DiagnosticArray, '/diagnostics', RELIABLE)
        self.watch(Hardware())
        self._attainment = (-math.inf, Attainment())
        self._sampling: Future[Status | None] | None = None
        # A steady clock: timers must also run when simulated time stands still.
        clock = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = node.create_timer(self._period_s(), self._sample, clock=clock)
        node.create_timer(DIAGNOSTICS_PERIOD_S, self.publish_diagnostics, clock=clock)

    def watch(self, hardware: Hardware) -> None:
        """Read the counters of this device from now on."""
        self._status: Status | None = None      # rates are differences within one engine
        self._hardware_id = hardware.name or platform.node()
        self._counters = DeviceCounters(hardware)

    def update_rate(self) -> None:
        """Apply ``monitor.rate_hz``."""
        period_ns = int(self._period_s() * 1e9)
        if self._timer.timer_period_ns != period_ns:
            self._timer.timer_period_ns = period_ns
            self._timer.reset()

    def on_event(self, event: Event, stamp: Time) -> None:
        """Take note of an event, and publish the latency of a response; from any thread."""
        self._health.note(event, time.monotonic())
        if isinstance(event, Response):
            self._latency.publish(latency_from(event, stamp))

    def publish_diagnostics(self) -> None:
        """Publish the health of the node; from any thread."""
        array = DiagnosticArray()
        array.header.stamp = self._node.get_clock().now().to_msg()
        name = self._node.get_fully_qualified_name().lstrip('/')
        array.status = [
            diagnostic_status(finding, name, self._hardware_id)
            for finding in self._health.findings(
                self._status, self._counters.read(), self._parameters.settings,
                time.monotonic())]
        self.diagnostics.publish(array)

    def _period_s(self) -> float:
        return 1.0 / self._parameters.settings.monitor.rate_hz

    def _sample(self) -> None:
        # While the engine thread loads a model, one request is enough.
        if self._sampling is None or self._sampling.done():
            self._sampling = self._engine_thread.call(self._engine_status)
            self._sampling.add_done_callback(self._on_sample)

    def _engine_status(self) -> Status | None:
        engine = self._engine_thread.engine
        return None if engine is None else engine.status()

    def _on_sample(self, done: Future[Status | None]) -> None:
        """Publish a sample; in the engine thread."""
        status, before = done.result(), self._status
        self._status = status
        if status is None:
            return
        at, attainment = self._attainment
        if status.now >= at + ATTAINMENT_PERIOD_S:    # costs a pass over the whole window
            attainment = self._health.window.attainment(
                status.now, self._parameters.settings.monitor.window_s)
            self._attainment = status.now, attainment
        message = scheduler_message(status, before or status, attainment)
        message.learning_frozen = self._health.frozen
        message.header.stamp = self._node.get_clock().now().to_msg()
        self._scheduler.publish(message)


def scheduler_message(status: Status, before: Status, attainment: Attainment) -> msg.Scheduler:
    """Return the message of a status; rates are relative to the status ``before``."""
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
