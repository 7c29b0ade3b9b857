# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A node that is managed through its lifecycle services."""

from __future__ import annotations

from collections.abc import Iterator
import gc
from pathlib import Path
import resource
import signal
import statistics
import threading
import time
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from mace_ros.msg import CorrectionStatus, Response
from mace_ros.srv import Trace
import pytest
from rclpy.context import Context
from support.fake_graphs import use_fake_graphs
from support.graph import ENVIRONMENT, wait_until
from support.robot import RANDOM_MODEL
from support.ros_graph import (
    call,
    NodeProcess,
    resolved,
    set_parameters,
    wait_until_it_replies,
)

from mace_ros.engine import builder
from mace_ros.engine.engine import Engine
from mace_ros.model.capturing import CaptureFailed
from mace_ros.model.cuda_graph_runner import CapturedPass
from mace_ros.model.graphed_layers import GraphedLayers
from mace_ros.ros.client import MaceClient
from mace_ros.ros.executor_thread import ExecutorThread
from mace_ros.ros.node import MaceNode
from mace_ros.telemetry import trace

START_S = 100.0
ANSWER_S = 100.0
CYCLES = 6
MEGABYTE = 1 << 20


class NodeHere:
    """The node in this process, so that faults can be injected."""

    def __init__(self, **parameters: object) -> None:
        self._arguments = ['--ros-args']
        for name, value in {'lifecycle.autostart': 'false', **parameters}.items():
            self._arguments += ['-p', f'{name}:={value}']

    def start(self) -> None:
        self._context = Context()
        self._context.init(args=self._arguments)
        self._node = MaceNode(context=self._context)
        self._spinner = ExecutorThread(self._node, name='ros', context=self._context)
        self._spinner.start()

    def kill(self, *, linger_s: float = 0.0) -> None:
        """Stop the node, and its executor ``linger_s`` later."""
        assert self._node.stop()
        time.sleep(linger_s)
        self._spinner.stop()
        self._node.destroy_node()
        self._context.shutdown()
        # rclpy keeps the services of a lifecycle node until it is collected: the next node's
        # first request could reach them.
        del self._node, self._spinner
        gc.collect()


class Managed:
    """A node, and a client that also manages it."""

    def __init__(self, node: NodeProcess | NodeHere) -> None:
        self.node = node
        self.node.start()
        self.client = MaceClient()
        wait_until_it_replies(self.client, GetState, '/mace/get_state', START_S)

    def close(self) -> None:
        self.node.kill()
        self.client.close()

    def change(self, label: str) -> bool:
        return call(self.client, ChangeState, '/mace/change_state', timeout_s=START_S,
                    transition=Transition(label=label)).success

    @property
    def state(self) -> int:
        return call(self.client, GetState, '/mace/get_state', timeout_s=START_S).current_state.id

    def ask(self, **fields: object) -> Response:
        return self.client.ask('Hi', **{'max_tokens': 2, **fields}).result(ANSWER_S)

    def diagnosed(self, name: str, level: bytes, text: str = '') -> bool:
        """Return whether a diagnostic status of this level and text arrives."""
        found = []
        subscription = self.client.node.create_subscription(
            DiagnosticArray, '/diagnostics', lambda array: found.extend(
                s for s in array.status if (s.name, s.level) == (f'mace: {name}', level)
                and text in s.message), 10)
        try:
            return wait_until(lambda: found, ANSWER_S)
        finally:
            self.client.node.destroy_subscription(subscription)

    def activate(self) -> bool:
        return self.change('configure') and self.change('activate')

    def clean_up(self) -> bool:
        return self.change('deactivate') and self.change('cleanup')


@pytest.fixture(scope='module')
def managed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    """Yield a node whose model does not exist yet."""
    folder = tmp_path_factory.mktemp('managed')
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        made = Managed(NodeProcess(folder, **{
            'lifecycle.autostart': 'false',
            'model.source': folder / 'model', 'model.threads': 1,
            'model.weight_dtype': 'float32', 'memory.kv_cache_tokens': 524288,
            # A short window, so that diagnostics soon forget failures of learning.
            **RANDOM_MODEL, 'monitor.window_s': 1.0}))
        yield made
        made.close()


def test_an_unconfigured_node_refuses_queries(managed: Managed) -> None:
    assert managed.state == State.PRIMARY_STATE_UNCONFIGURED
    # The first responses may be published before the node has matched the subscription.
    answers = []

    def received() -> list[Response]:
        answers.append(managed.client.ask('Hi'))
        return [a.response for a in answers if a.is_complete()]

    assert wait_until(received, START_S)
    [response, *_] = received()
    assert (response.finish_reason, response.error_code) == (
        Response.REJECTED, Response.NOT_SERVING)
    assert 'not active' in response.error
    assert not managed.change('activate')     # it must be configured first
    assert managed.state == State.PRIMARY_STATE_UNCONFIGURED


def test_a_failed_configuration_says_why(managed: Managed, all_tokens: Path) -> None:
    missing = managed.node.folder / 'model'
    assert not managed.change('configure')
    assert managed.state == State.PRIMARY_STATE_UNCONFIGURED
    reason = f"model.source: '{missing}' is neither a folder"
    assert reason in managed.node.log
    assert managed.diagnosed('serving', DiagnosticStatus.ERROR, reason)
    missing.symlink_to(all_tokens)    # so that the next attempt succeeds


def test_get_state_answers_during_configuration(managed: Managed) -> None:
    service = managed.client.node.create_client(GetState, '/mace/get_state')
    assert service.wait_for_service(START_S)
    changing = threading.Thread(target=managed.change, args=['configure'])
    changing.start()
    states = []
    while changing.is_alive():
        reply = resolved(service.call_async(GetState.Request()), START_S)
        states.append(reply.current_state.id)
        time.sleep(0.2)
    changing.join()
    managed.client.node.destroy_client(service)
    assert State.TRANSITION_STATE_CONFIGURING in states
    assert managed.state == State.PRIMARY_STATE_INACTIVE
    assert managed.diagnosed('serving', DiagnosticStatus.OK, 'inactive')
    assert managed.ask().error_code == Response.NOT_SERVING
    refused = call(managed.client, Trace, '/mace/trace')
    assert not refused.success and 'not active' in refused.message


def test_deactivation_cancels_queries_and_loses_no_correction(managed: Managed) -> None:
    assert managed.change('activate')
    managed.client.wait_until_ready(ANSWER_S)
    answered = managed.ask()
    endless = managed.client.ask('Hi', max_tokens=3000, ttft_slo_ms=6e5, tpot_slo_ms=6e5)
    next(endless.stream(ANSWER_S))
    learning = managed.client.correct('Ho.', query_id=answered.query_id)
    assert managed.change('deactivate')
    assert endless.result(ANSWER_S).finish_reason == Response.CANCELLED
    assert learning.wait(CorrectionStatus.ACCEPTED, ANSWER_S).state == CorrectionStatus.ACCEPTED
    assert managed.ask().error_code == Response.NOT_SERVING

    assert managed.change('activate')
    assert learning.wait(timeout_s=ANSWER_S).state == CorrectionStatus.LEARNED
    assert managed.ask(max_tokens=8).text == 'Ho.'
    assert managed.clean_up()


def test_repeated_cycles_leave_no_memory_behind(managed: Managed) -> None:
    used, freed = [], []
    for _ in range(CYCLES):
        assert managed.activate()
        assert managed.ask(max_tokens=8).text == 'Ho.'      # the correction is still learned
        used.append(managed.node.memory())
        assert managed.clean_up()
        freed.append(managed.node.memory())
    assert min(used) > max(freed) + 20 * MEGABYTE     # a configured node uses memory
    # The first cycles fill caches of libraries.
    for resident in (used[3:], freed[3:]):
        usual = statistics.median(resident)
        assert 0.95 * usual < min(resident) <= max(resident) < 1.05 * usual, resident


def test_a_corrupt_version_is_reported_and_served_again_once_restored(managed: Managed) -> None:
    [adapter] = managed.node.folder.glob('storage/adapters/*/*/adapter_model.safetensors')
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-4] + b'\0\1\2\3')
    assert managed.activate()
    response = managed.ask(max_tokens=8)
    assert (response.finish_reason, response.adapter_version) == (Response.LENGTH, 0)
    assert response.text != 'Ho.'
    assert managed.diagnosed('learning', DiagnosticStatus.ERROR, adapter.name)
    assert managed.clean_up()

    adapter.write_bytes(whole)
    assert managed.activate()
    assert managed.ask(max_tokens=8).text == 'Ho.'
    assert managed.diagnosed('learning', DiagnosticStatus.OK)


def test_a_full_disk_refuses_corrections_and_nothing_else(managed: Managed) -> None:
    def correct() -> CorrectionStatus:
        learning = managed.client.correct('He.', prompt='Who?')
        return learning.wait(CorrectionStatus.ACCEPTED, ANSWER_S)

    # Without learning, whose failures would be in the diagnostics as well.
    assert set_parameters(managed.client, {'finetune.budget': 0.0}) == [(True, '')]
    pid, unlimited = managed.node.process.pid, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    try:
        # The answer is given, although it can't be recorded.
        assert managed.ask(max_tokens=8).text == 'Ho.'
        assert managed.diagnosed('learning', DiagnosticStatus.ERROR, 'journal')
        refused = correct()
        assert refused.state == CorrectionStatus.REJECTED
        assert 'journal' in refused.reason
        assert managed.ask(max_tokens=8).text == 'Ho.'
        assert managed.diagnosed('learning', DiagnosticStatus.ERROR, 'journal')
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
    assert managed.ask(max_tokens=8).text == 'Ho.'
    assert managed.diagnosed('learning', DiagnosticStatus.OK)
    assert correct().state == CorrectionStatus.ACCEPTED
    assert managed.clean_up()


def test_shutdown_from_active(managed: Managed) -> None:
    """The last test of this node."""
    assert managed.activate()
    assert managed.change('shutdown')
    assert managed.state == State.PRIMARY_STATE_FINALIZED
    managed.node.send(signal.SIGINT)
    assert managed.node.wait(60.0) == 0      # test_shutdown.py measures the time
    for done in ('inactive: queries', 'the model is unloaded', 'stopped after'):
        assert done in managed.node.log
    assert 'Traceback' not in managed.node.log


def test_shutdown_from_unconfigured(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRONMENT, 'ROS_LOG_DIR': str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    new = Managed(NodeHere(**{'storage.folder': tmp_path}))
    assert new.change('shutdown')
    assert new.state == State.PRIMARY_STATE_FINALIZED
    new.close()


def test_a_node_ends_even_if_its_shutdown_fails(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRONMENT, 'ROS_LOG_DIR': str(tmp_path)}.items():
        monkeypatch.setenv(name, value)

    def fails() -> None:
        raise OSError('injected')

    monkeypatch.setattr(builder, 'release_memory', fails)
    new = Managed(NodeHere(**{'storage.folder': tmp_path}))
    assert not new.change('shutdown')
    assert new.state == State.PRIMARY_STATE_FINALIZED
    new.close()


def test_a_trace_cut_off_by_a_stop_is_written_completely(
        tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRONMENT, 'ROS_LOG_DIR': str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    write = trace.write_trace

    def slowly(*given: Any) -> None:
        time.sleep(0.5)
        write(*given)

    monkeypatch.setattr(trace, 'write_trace', slowly)
    new = Managed(NodeHere(**{
        'model.source': model_folder, 'model.threads': 1, 'storage.folder': tmp_path / 'storage',
        'model.weight_dtype': 'float32', 'memory.kv_cache_tokens': 8192}))
    assert new.activate()
    begun = call(new.client, Trace, '/mace/trace', seconds=60.0)
    assert begun.success, begun.message
    assert new.ask().finish_reason == Response.LENGTH
    new.close()
    assert Path(begun.path).stat().st_size > 0


def test_timers_that_fire_after_the_stop_do_no_harm(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str]) -> None:
    for name, value in {**ENVIRONMENT, 'ROS_LOG_DIR': str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    node = NodeHere(**{'storage.folder': tmp_path, 'monitor.rate_hz': 100.0})
    node.start()
    node.kill(linger_s=0.5)
    assert 'failed' not in capfd.readouterr().err


@pytest.fixture(scope='module')
def here(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Managed]:
    folder = tmp_path_factory.mktemp('here')
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, 'ROS_LOG_DIR': str(folder)}.items():
            patch.setenv(name, value)
        made = Managed(NodeHere(**{
            'model.source': model_folder, 'model.threads': 1, 'storage.folder': folder / 'storage',
            'model.weight_dtype': 'float32', 'memory.kv_cache_tokens': 8192,
            # Few shapes to capture.
            'scheduler.max_requests': 4, 'scheduler.max_batch_tokens': 64}))
        yield made
        made.close()


# Transitions before, and the method of the engine that fails.
FAULTS = {
    'activate': (['configure'], 'update'),
    'deactivate': (['configure', 'activate'], 'pause'),
    'cleanup': (['configure'], 'pause')}


@pytest.mark.parametrize('transition', FAULTS)
def test_a_failed_transition_says_why_and_the_node_can_be_configured_again(
        here: Managed, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
        transition: str) -> None:
    before, function = FAULTS[transition]
    assert all(here.change(label) for label in before)

    def fails(*_: object) -> None:
        monkeypatch.undo()
        raise OSError('injected')

    monkeypatch.setattr(Engine, function, fails)
    assert not here.change(transition)
    assert here.state == State.PRIMARY_STATE_UNCONFIGURED
    assert here.diagnosed('serving', DiagnosticStatus.ERROR, 'OSError: injected')
    assert 'failed: OSError: injected' in capfd.readouterr().err

    assert here.activate()
    assert here.diagnosed('serving', DiagnosticStatus.OK, 'active')
    assert here.ask().finish_reason == Response.LENGTH
    assert here.clean_up()


# The captures that fail, and the last of them that succeeds before.
CAPTURES = {'the first pass': (CapturedPass, 'capture', 0), 'a later pass': (
    CapturedPass, 'capture', 5), 'a step': (GraphedLayers, 'capture', 1),
    'a step that keeps graphs': (GraphedLayers, 'capture_kept', 0)}


@pytest.mark.parametrize('what', CAPTURES)
def test_a_failed_capture_leaves_a_node_that_serves_and_can_be_configured_again(
        here: Managed, capfd: pytest.CaptureFixture[str], what: str) -> None:
    """Device graphs are faked; ``test_graph_capture.py`` has the failures of all captures."""
    owner, method, successes = CAPTURES[what]
    done: list[object] = []

    def fails_late(*_: object) -> None:
        done.append(None)
        if len(done) > successes:
            raise CaptureFailed('injected')

    def logged() -> list[str]:
        return [line for line in capfd.readouterr().err.splitlines()
                if 'injected' in line or 'pass shapes' in line]

    with pytest.MonkeyPatch.context() as patch:
        use_fake_graphs(patch)
        patch.setattr(builder, 'has_graphs', lambda model: True)
        with patch.context() as fault:
            fault.setattr(owner, method, fails_late)
            assert here.activate()
        [line] = logged()
        assert 'device graphs: ' in line and 'run eagerly: ' in line
        assert len(done) == successes + 1       # nothing is captured after a failure
        assert here.ask().finish_reason == Response.LENGTH
        assert here.clean_up()

        assert here.activate()
        [line] = logged()
        assert 'device graphs: ' in line and 'injected' not in line
        assert here.ask().finish_reason == Response.LENGTH
        assert here.clean_up()


def test_shutdown_from_inactive(here: Managed) -> None:
    """The last test of this node."""
    assert here.change('configure')
    assert here.change('shutdown')
    assert here.state == State.PRIMARY_STATE_FINALIZED
