# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The numbers of ~/latency and ~/scheduler, and of the server, for Prometheus."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest, Histogram

from mace_ros.msg import Latency, Response, Scheduler
from mace_ros.ros.client import MaceClient, RELIABLE

BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
REASONS = {getattr(Response, name): name.lower() for name in (
    'STOP', 'LENGTH', 'CANCELLED', 'REJECTED', 'ERROR')}
PHASES = {'queue_ms': 'from arrival to the first prefill',
          'ttft_ms': 'from arrival to the first token',
          'tpot_ms': 'per output token after the first', 'e2e_ms': 'from arrival to the end'}


class Metrics:
    """Counts what the node reports about its queries, and shows the numbers of its scheduler."""

    def __init__(self, client: MaceClient) -> None:
        """Subscribe with the client's node."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            'mace_http_requests', 'Requests by path and status', ['path', 'status'],
            registry=self.registry)
        # Without it, the numbers of a node that has ended would pass for those of now.
        Gauge('mace_up', 'Whether the node serves; if not, mace_scheduler_* are its last numbers',
              registry=self.registry).set_function(client.is_ready)
        self._queries = Counter(
            'mace_queries', 'Queries that ended, those of ROS included', ['finish_reason'],
            registry=self.registry)
        self._tokens = Counter(
            'mace_tokens', 'Tokens of queries that ended', ['kind'], registry=self.registry)
        self._times = {field: Histogram(
            f'mace_{field.removesuffix("_ms")}_seconds', f'Time {meaning}',
            buckets=TOKEN_BUCKETS_S if field == 'tpot_ms' else BUCKETS_S, registry=self.registry)
            for field, meaning in PHASES.items()}
        self._slo_met = Counter(
            'mace_slo_met', 'Queries that met their objectives', registry=self.registry)
        kinds = Scheduler.get_fields_and_field_types()
        self._scheduler = {name: Gauge(
            f'mace_scheduler_{name}', f'{name} of mace_ros/msg/Scheduler', registry=self.registry)
            for name, kind in kinds.items() if kind != 'std_msgs/Header'}
        name = client.name
        client.node.create_subscription(Latency, f'{name}/latency', self._on_latency, RELIABLE)
        client.node.create_subscription(
            Scheduler, f'{name}/scheduler', self._on_scheduler, RELIABLE)

    def text(self) -> bytes:
        """Return all numbers in Prometheus' text format."""
        return generate_latest(self.registry)

    def _on_latency(self, message: Latency) -> None:
        self._queries.labels(REASONS.get(message.finish_reason, 'unknown')).inc()
        self._tokens.labels('prompt').inc(message.prompt_tokens)
        self._tokens.labels('output').inc(message.output_tokens)
        self._slo_met.inc(int(message.slo_met))
        for field, histogram in self._times.items():
            value = getattr(message, field)
            if math.isfinite(value):
                histogram.observe(value / 1e3)

    def _on_scheduler(self, message: Scheduler) -> None:
        for name, gauge in self._scheduler.items():
            gauge.set(getattr(message, name))
