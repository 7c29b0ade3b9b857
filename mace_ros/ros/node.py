# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The node: ROS messages in, engine, ROS messages out.

Three threads: the main one waits for a signal, one serves ROS and never computes, and
one owns the device (:mod:`mace_ros.ros.engine_thread`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
import os
from pathlib import Path
import sys
import threading
import time
import traceback
from typing import Any, TYPE_CHECKING

from builtin_interfaces.msg import Time
import rclpy
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.context import Context
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNodeMixin, LifecycleState, TransitionCallbackReturn
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

from mace_ros.api.events import (
    AdapterVersion,
    CorrectionState,
    CorrectionStatus,
    Event,
    FinishReason,
    Response,
    ResponseChunk,
    VersionState,
)
from mace_ros.api.settings import InvalidSetting, Settings
from mace_ros.api.validation import MAX_ID
import mace_ros.msg as msg
from mace_ros.ros.conversion import correction_from, message_from, query_from
from mace_ros.ros.engine_thread import EngineThread
from mace_ros.ros.executor_thread import ExecutorThread
from mace_ros.ros.generate_action import GenerateActionServer
from mace_ros.ros.latched_versions import LatchedVersions
from mace_ros.ros.parameters import ParameterServer
from mace_ros.ros.request_gate import RequestGate
from mace_ros.ros.services import Services
from mace_ros.ros.status_publisher import StatusPublisher
from mace_ros.ros.stop_signal import StopSignal
from mace_ros.store.layout import default_folder
from mace_ros.telemetry.health import ACTIVE, Health
from mace_ros.telemetry.status import Hardware, Status

if TYPE_CHECKING:
    from mace_ros.engine.engine import Engine

DEPTH = 1000            # messages that a burst may bring
RELIABLE = QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.RELIABLE)

# From a signal to the end; launch kills ten seconds after Ctrl-C.
END_TIMEOUT_S = 7.0
ACKNOWLEDGE_TIMEOUT_S = 1.0

NOT_ACTIVE = 'the node is not active'


class MaceNode(LifecycleNodeMixin, Node):
    """
    Answers queries and learns from corrections; see docs/interfaces.md.

    A managed node. Its transitions run in the device's thread, between two iterations,
    so that the thread that serves ROS goes on while a model is loaded.
    """

    def __init__(self, *, context: Context | None = None,
                 failed: Callable[[], None] = lambda: None) -> None:
        """
        Declare parameters and interfaces.

        ``failed`` is called, in another thread, once :attr:`failure` says why the node
        can't go on. Raises :class:`InvalidSetting`.
        """
        Node.__init__(self, 'mace', context=context)
        # Reentrant: ~/get_state answers while ~/change_state is busy in the other thread.
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        self.failure = ''
        self._on_failure = failed
        self._engine: Engine | None = None
        self._stopping = False
        self._update_lock = threading.Lock()
        self._table = ParameterServer(self, self._update)

        # One live version for each adapter slot, and the base model.
        version_depth = self._table.settings.adapter.slots + 1
        self._latch = LatchedVersions(version_depth)
        self._outputs = {
            ResponseChunk: self.create_publisher(msg.ResponseChunk, '~/response_chunk', RELIABLE),
            Response: self.create_publisher(msg.Response, '~/response', RELIABLE),
            CorrectionStatus: self.create_publisher(
                msg.CorrectionStatus, '~/correction_status', RELIABLE),
            AdapterVersion: self.create_publisher(
                msg.AdapterVersion, '~/adapter_version', QoSProfile(
                    depth=version_depth, reliability=ReliabilityPolicy.RELIABLE,
                    durability=DurabilityPolicy.TRANSIENT_LOCAL)),
        }
        self._intake = RequestGate(
            limit=lambda: self._table.settings.scheduler.max_queue, refuse=self._publish)
        if not self._table.settings.lifecycle.autostart:
            self._intake.close(NOT_ACTIVE)
        self._device = EngineThread(self, publish=self._publish, fatal_error=self._give_up)
        self._device.adopt(self._service_change_state)
        self._health = Health()
        self._monitor = StatusPublisher(
            self, health=self._health, settings=lambda: self._table.settings,
            sample=lambda: self._device.call(self._sample))
        self._goals = GenerateActionServer(self, self._intake.put)
        self._calls = Services(
            self, engine=lambda: self._engine, active=lambda: self._health.state == ACTIVE,
            freeze=self._freeze, storage=self.storage_folder)
        self.create_subscription(msg.Query, '~/query', self._on_query, RELIABLE)
        self.create_subscription(msg.Correction, '~/correction', self._on_correction, RELIABLE)
        self.create_subscription(msg.Cancel, '~/cancel', self._on_cancel, RELIABLE)

    # -- its life; all in the device's thread, unless it says something else -----------

    def start(self) -> None:
        """Configure and activate, unless a lifecycle manager does; from any thread."""
        if self._table.settings.lifecycle.autostart:
            self._device.call(self._autostart)

    def _autostart(self) -> None:
        for transition in (self.trigger_configure, self.trigger_activate):
            if self._stopping:
                return
            if transition() is not TransitionCallbackReturn.SUCCESS:
                self._give_up(self._health.fault or 'somebody else changed its state')
                return

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model and what was learned."""
        return self._transition('inactive', 'loading the model', self._load)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Serve, beginning with what came in meanwhile if the node starts itself."""
        return self._transition(ACTIVE, 'activating', self._serve)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Take nothing more, and cancel what runs; what is still to be learned waits."""
        return self._transition('inactive', 'deactivating', self._pause)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the device."""
        return self._transition('unconfigured', 'freeing the device', self._unload)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Cancel what runs, bring the journal to disk, and free the device."""
        return self._transition('finalized', 'shutting down', self._unload)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free what a failed transition left behind, so that it can be configured again."""
        fault = self._health.fault
        outcome = self._transition('unconfigured', 'freeing the device', self._unload)
        self._health.fault = fault or self._health.fault
        return outcome

    def _transition(self, goal: str, doing: str,
                    work: Callable[[], None]) -> TransitionCallbackReturn:
        """Do the work; rclpy would keep to itself why it failed."""
        health = self._health
        health.doing, health.fault = doing, ''
        try:
            work()
        except Exception as error:
            self.get_logger().debug(traceback.format_exc())
            # Named errors say themselves what to do; of others the type may help.
            named = type(error).__module__.startswith('mace_ros.')
            health.fault = str(error) if named else f'{type(error).__name__}: {error}'
            self.get_logger().error(f'{doing} failed: {health.fault}')
            return TransitionCallbackReturn.ERROR
        finally:
            health.doing = ''
        health.state = goal
        return TransitionCallbackReturn.SUCCESS

    def stop(self) -> bool:
        """
        Shut down, and wait until everybody has heard it; from the main thread.

        Returns False if the device's thread can't be ended, as while it loads a model.
        """
        end = time.monotonic() + END_TIMEOUT_S
        self._stopping = True
        self._intake.close('the node is stopping')
        freed = self._device.call(self._end)
        if self._engine is not None or not self._health.doing:    # else it loads a model
            try:
                freed.result(END_TIMEOUT_S)
            except FutureTimeout:
                self.get_logger().error('an iteration does not end; giving up on it')
            except Exception as error:      # a state that nothing leads out of
                self.get_logger().error(f'shutting down failed: {error}')
        self._wait_until_heard()
        self._calls.stop(0.1)
        return self._device.stop(max(0.1, end - time.monotonic()) if freed.done() else 0.1)

    def _end(self) -> None:
        if self._health.state != 'finalized':    # by ~/change_state
            self.trigger_shutdown()

    def _load(self) -> None:
        log = self.get_logger()
        log.info('loading the libraries')
        # OpenMP's threads spin for each other a moment only, and then sleep: for ever would
        # be no faster, and many times slower where other processes want a core, too.
        os.environ.setdefault('GOMP_SPINCOUNT', '20000')
        os.environ.setdefault('TQDM_DISABLE', '1')    # bars are not for a log
        # Not above: torch takes seconds, and parameters are served meanwhile.
        from mace_ros.engine.builder import build_engine
        storage = self.storage_folder()
        self._engine = build_engine(
            self._table.settings, storage=storage, wake=self._device.wake,
            progress=self._say)
        self._monitor.watch(self._engine.hardware)
        log.info(f'journal and adapter versions are in {storage}')

    def _say(self, text: str) -> None:
        self._health.doing = text
        self.get_logger().info(text)

    def _serve(self) -> None:
        engine = self._engine
        assert engine is not None
        self._update(self._table.settings)    # what was set while the model was loaded
        self._intake.open(engine)
        if self._stopping:     # meanwhile: it must not stay open
            self._intake.close('the node is stopping')
        self._device.drive(engine)
        self.get_logger().info('ready')
        # Before the events of the first iteration, which this thread has yet to run.
        self._publish(engine.start())

    def _rest(self) -> None:
        self._intake.close('the node is stopping' if self._stopping else NOT_ACTIVE)
        self._device.drive(None)

    def _pause(self) -> None:
        self._rest()
        assert self._engine is not None
        self._publish(self._engine.pause())

    def _unload(self) -> None:
        self._rest()
        # Let go of first: one that can't be closed must not be kept either.
        engine, self._engine = self._engine, None
        if engine is not None:
            self._publish(engine.close())
            self._monitor.watch(Hardware())
            del engine
        if 'torch' in sys.modules:    # also after a model that could not be loaded to its end
            from mace_ros.model.hardware import release_memory
            release_memory()

    def _give_up(self, reason: str) -> None:
        self.get_logger().fatal(reason)
        self.failure = self._health.fault = reason
        self._monitor.diagnose()    # the timer may not come to it any more
        self._intake.close(reason)
        self._on_failure()

    def _wait_until_heard(self) -> None:
        end = time.monotonic() + ACKNOWLEDGE_TIMEOUT_S
        for publisher in (*self._outputs.values(), self._monitor.diagnostics):
            left = max(0.0, end - time.monotonic())
            try:
                publisher.wait_for_all_acked(Duration(seconds=left))
            except RuntimeError as error:    # a middleware that can't tell
                self.get_logger().debug(str(error))

    def storage_folder(self) -> Path:
        """Return where journal and adapter versions are kept."""
        folder = self._table.settings.storage.folder
        if folder:
            return Path(folder).expanduser()
        return default_folder(self.get_fully_qualified_name())

    def _sample(self) -> Status | None:
        return None if self._engine is None else self._engine.status()

    # -- what comes in; only enqueued ------------------------------------------------

    def _on_query(self, message: msg.Query) -> None:
        self.get_logger().debug(f'query {message.id!r}: {message.text!r}')
        self._intake.put(query_from(message))

    def _on_correction(self, message: msg.Correction) -> None:
        self.get_logger().debug(f'correction {message.id!r}: {message.corrected!r}')
        self._intake.put(correction_from(message))

    def _on_cancel(self, message: msg.Cancel) -> None:
        self._intake.put(message.query_id)

    def _freeze(self, frozen: bool) -> None:
        self._health.frozen = frozen
        self._update(self._table.settings)

    def _update(self, _: Settings) -> None:
        self._monitor.settings_changed()
        # Whoever comes last hands over the newest, not the one that it came with.
        with self._update_lock:
            settings = self._table.settings
            if self._health.frozen:
                settings = settings.updated({'finetune.budget': 0.0})
            if self._engine is not None:
                self._engine.update(settings)

    # -- what goes out ---------------------------------------------------------------

    def _publish(self, events: Sequence[Event]) -> None:
        stamp = self.get_clock().now().to_msg()
        for event in events:
            try:
                self._publish_one(event, stamp)
            except Exception as error:      # the others must not be lost for it
                self.get_logger().error(
                    f'{type(event).__name__} could not be published: {error}')

    def _publish_one(self, event: Event, stamp: Time) -> None:
        due = self._latch.to_publish(event) if isinstance(event, AdapterVersion) else [event]
        for each in due:
            message = message_from(each, stamp)
            self._outputs[type(each)].publish(message)
            self._goals.hear(each, message)
        self._monitor.hear(event, stamp)
        self._log(event)

    def _log(self, event: Event) -> None:
        """Say what happened; never what was asked or answered."""
        log = self.get_logger()
        if isinstance(event, AdapterVersion):
            text = f'adapter version {event.version} of profile {event.profile!r}'
            if event.state is not VersionState.PUBLISHED:
                log.warning(f'{text}: {event.state.name} {event.reason}'.rstrip())
            elif event.version:
                log.info(f'{text} is live: {len(event.correction_ids)} corrections in '
                         f'{event.train_seconds:.1f} s, {event.path}')
            else:
                log.info(f'profile {event.profile!r} is served by the base model')
        elif isinstance(event, CorrectionStatus):
            text = f'correction {_shown(event.id)}: {event.state.name} {event.reason}'.rstrip()
            if event.state in (CorrectionState.REJECTED, CorrectionState.FAILED):
                log.warning(text, throttle_duration_sec=1.0)
            else:
                log.info(text)
        elif isinstance(event, Response):
            text = (f'query {_shown(event.query_id)}: {event.finish_reason.name} '
                    f'{event.error}').rstrip()
            if event.finish_reason is FinishReason.ERROR:
                log.error(text, throttle_duration_sec=1.0)
            elif event.finish_reason is FinishReason.REJECTED:
                log.warning(text, throttle_duration_sec=1.0)
            else:
                log.debug(text)


def _shown(text: str) -> str:
    """Return an id as a line of the log may have it: whoever sent it may have meant harm."""
    return text if text.isprintable() and len(text) <= MAX_ID else repr(text[:MAX_ID])


USAGE = """\
Answers queries with a language model, and learns from corrections while it does so.

parameters (all are in share/mace_ros/config/mace.yaml, with comments):
  --ros-args --params-file FILE        from a file
  --ros-args -p model.source:=MODEL    the model: a hub id, a local folder or a GGUF file
  --ros-args -p NAME:=VALUE            any other

topics: query, correction, cancel (in); response_chunk, response, correction_status,
adapter_version, latency, scheduler (out)
services: freeze_learning, list_versions, rollback, trace, and those of a lifecycle node
action: generate
All of these are below the node's name, which is /mace. /diagnostics is not.
"""


def parse(arguments: Sequence[str]) -> None:
    """Answer --help, and refuse what ROS does not know either."""
    argparse.ArgumentParser(
        prog='mace_node', description=USAGE,
        usage='mace_node [-h] [--ros-args ...]',
        formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(arguments)


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; return the exit code."""
    arguments: list[Any] = sys.argv if args is None else args
    stop = StopSignal()
    # rcl's own default is to run without security where it is on and there are no keys.
    os.environ.setdefault('ROS_SECURITY_STRATEGY', 'Enforce')
    try:
        parse(remove_ros_args(arguments)[1:])
        rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
        node = MaceNode(failed=stop.send)
    except RuntimeError as error:    # of rcl: bad arguments; security that can't be had
        print(f'mace_node: {type(error).__name__}: {error}', file=sys.stderr)
        return 2
    except InvalidSetting as error:
        get_logger('mace').fatal(str(error))
        rclpy.shutdown()
        return 1
    server = ExecutorThread(node, name='ros')
    server.start()
    node.start()
    stop.wait()
    ended = node.stop()
    ended = server.stop(1.0) and ended
    node.destroy_node()
    rclpy.shutdown()
    code = 1 if node.failure else 0
    if not ended:
        # A thread in the middle of torch would bring the interpreter's own end down.
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == '__main__':
    sys.exit(main())
