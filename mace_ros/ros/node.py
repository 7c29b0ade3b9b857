# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The node: ROS messages in, the engine's events as ROS messages out.

It has three threads: the main thread waits for a signal, one thread serves ROS and
computes nothing but the formats of answers, and one owns the engine and the device
(:mod:`mace_ros.ros.engine_thread`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError as FutureTimeout
import os
from pathlib import Path
import sys
import threading
import traceback
from typing import Any, TYPE_CHECKING

from builtin_interfaces.msg import Time
import rclpy
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.context import Context
from rclpy.lifecycle import LifecycleNodeMixin, LifecycleState, TransitionCallbackReturn
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

from mace_ros.api.events import Event
from mace_ros.api.hardware import Hardware
from mace_ros.api.settings import InvalidSetting, Settings
import mace_ros.msg as msg
from mace_ros.ros.conversion import cancel_from, correction_from, query_from
from mace_ros.ros.engine_thread import EngineThread
from mace_ros.ros.event_log import log_event
from mace_ros.ros.event_topics import EventTopics, RELIABLE
from mace_ros.ros.executor_thread import ExecutorThread
from mace_ros.ros.generate_action import GenerateActionServer
from mace_ros.ros.lifecycle_bond import LifecycleBond
from mace_ros.ros.parameters import ParameterServer
from mace_ros.ros.request_gate import NOT_ACTIVE, RequestGate
from mace_ros.ros.services import Services
from mace_ros.ros.shutdown import Shutdown
from mace_ros.ros.status_publisher import StatusPublisher
from mace_ros.ros.stop_signal import StopSignal
from mace_ros.telemetry.health import Health, NodeState

if TYPE_CHECKING:
    from mace_ros.engine.engine import Engine

# Launch sends a SIGTERM five seconds after Ctrl-C, and says so. The rest of these five seconds
# is for the middleware and the interpreter, which end after the node's own threads.
SHUTDOWN_TIMEOUT_S = 4.0
ENGINE_TIMEOUT_S = 3.0          # of these, for the running iteration and the journal
ACKNOWLEDGE_TIMEOUT_S = 1.0

STOPPING = 'the node is stopping'


class MaceNode(LifecycleNodeMixin, Node):
    """
    Answers queries and learns from corrections; see docs/reference/interfaces.md.

    A lifecycle node. Its transitions run in the engine thread, between two iterations, so that
    ROS is served while a model is loaded.
    """

    def __init__(self, *, context: Context | None = None,
                 on_failure: Callable[[], None] | None = None) -> None:
        """
        Declare the parameters and create the interfaces.

        ``on_failure`` is called, in another thread, once :attr:`failure` says why the node
        can't continue. Raises :class:`InvalidSetting`.
        """
        Node.__init__(self, 'mace', context=context)
        # Reentrant: ~/get_state must answer while ~/change_state runs in the engine thread.
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        self.failure = ''
        self._on_failure = on_failure
        self._stopping = False
        self._update_lock = threading.Lock()

        self._health = Health()
        self._parameter_server = ParameterServer(self, self._update_engine)
        settings = self._parameter_server.settings
        self._storage = Path(settings.storage.folder)

        self._topics = EventTopics(self)
        self._gate = RequestGate(self._parameter_server, publish=self._publish)
        self._engine_thread = EngineThread(
            self, publish=self._publish, on_failure=self._give_up)
        self._status = StatusPublisher(
            self, self._health, self._parameter_server, self._engine_thread)
        self._action = GenerateActionServer(self, self._gate)
        self._bond = LifecycleBond(self)
        self._service_calls = Services(
            self, self._gate, self._engine_thread, storage=self._storage,
            freeze_learning=self._freeze_learning)

        self._engine_thread.serve(self._service_change_state)
        if not settings.lifecycle.autostart:
            self._gate.close(NOT_ACTIVE)
        self.create_subscription(msg.Query, '~/query', self._on_query, RELIABLE)
        self.create_subscription(msg.Correction, '~/correction', self._on_correction, RELIABLE)
        self.create_subscription(msg.Cancel, '~/cancel', self._on_cancel, RELIABLE)

    @property
    def engine(self) -> Engine | None:
        """The loaded engine; None while the node is unconfigured."""
        return self._engine_thread.engine

    # -- start and stop ----------------------------------------------------------------

    def start(self) -> None:
        """Configure and activate, unless a lifecycle manager does; from any thread."""
        if self._parameter_server.settings.lifecycle.autostart:
            self._engine_thread.call(self._autostart)

    def _autostart(self) -> None:
        for transition in (self.trigger_configure, self.trigger_activate):
            if self._stopping:
                return
            if transition() is not TransitionCallbackReturn.SUCCESS:
                self._give_up(
                    self._health.fault or 'its lifecycle state was changed during the start')
                return

    def stop(self) -> bool:
        """
        Shut down, and wait until subscribers have the last messages; from the main thread.

        Returns False if the engine thread can't be ended, as while it loads a model.
        """
        shutdown = Shutdown(SHUTDOWN_TIMEOUT_S)
        self._stopping = True
        self._gate.close(STOPPING)
        # Asked first: the engine's thread may have unloaded the engine a moment later.
        loading = self.engine is None and bool(self._health.doing)
        done = self._engine_thread.call(self._shut_down)
        if loading:
            self.get_logger().info(f'{self._health.doing}: abandoned')
        else:
            with shutdown.waiting_for('the running iteration and the journal'):
                self._wait_for_shutdown(done, shutdown.left(ENGINE_TIMEOUT_S))
        with shutdown.waiting_for('subscribers to acknowledge the last messages'):
            self._topics.wait_until_acknowledged(
                self._status.diagnostics, timeout_s=shutdown.left(ACKNOWLEDGE_TIMEOUT_S))
        with shutdown.waiting_for('a trace to be written'):
            self._service_calls.stop(shutdown.left(SHUTDOWN_TIMEOUT_S))
        with shutdown.waiting_for("the end of the engine's thread"):
            ended = self._engine_thread.stop(
                shutdown.left(SHUTDOWN_TIMEOUT_S if done.done() else 0.1))
        self.get_logger().info(str(shutdown))
        return ended

    def _wait_for_shutdown(self, done: Future[None], timeout_s: float) -> None:
        try:
            done.result(timeout_s)
        except FutureTimeout:
            self.get_logger().error(
                'the running iteration did not end in time and is abandoned')
        except Exception as error:      # no transition leads to shutdown from this state
            self.get_logger().error(f'shutting down failed: {error}')

    def _shut_down(self) -> None:
        if self._health.state is not NodeState.FINALIZED:    # ~/change_state may have been called
            self.trigger_shutdown()

    def _give_up(self, reason: str) -> None:
        self.get_logger().fatal(reason)
        self.failure = self._health.fault = reason
        self._status.publish_diagnostics()    # the timer may not fire again
        self._gate.close(reason)
        if self._on_failure is not None:
            self._on_failure()

    # -- lifecycle transitions, in the engine thread -------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model, the journal and the adapter versions."""
        return self._transition(NodeState.INACTIVE, 'loading the model', self._load)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Serve, starting with the requests that waited if the node starts itself."""
        return self._transition(NodeState.ACTIVE, 'activating', self._serve)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Refuse new requests and cancel running ones; pending corrections wait."""
        return self._transition(NodeState.INACTIVE, 'deactivating', self._pause)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the device."""
        return self._transition(
            NodeState.UNCONFIGURED, 'freeing the device', self._unload)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Cancel running requests, write the journal, and free the device."""
        return self._transition(NodeState.FINALIZED, 'shutting down', self._unload)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free what a failed transition left behind, so that the node can be configured again."""
        fault = self._health.fault
        result = self._transition(
            NodeState.UNCONFIGURED, 'freeing the device', self._unload)
        self._health.fault = fault or self._health.fault
        return result

    def _transition(self, goal: NodeState, doing: str,
                    work: Callable[[], None]) -> TransitionCallbackReturn:
        """Do the work of a transition; report an exception, which rclpy would swallow."""
        health = self._health
        health.doing, health.fault = doing, ''
        try:
            work()
        except Exception as error:
            self.get_logger().debug(traceback.format_exc())
            # The messages of mace_ros's own errors are complete; for others the type may help.
            own = type(error).__module__.startswith('mace_ros.')
            health.fault = str(error) if own else f'{type(error).__name__}: {error}'
            self.get_logger().error(f'{doing} failed: {health.fault}')
            return TransitionCallbackReturn.ERROR
        finally:
            health.doing = ''
        health.state = goal
        return TransitionCallbackReturn.SUCCESS

    def _load(self) -> None:
        log = self.get_logger()
        log.info('loading the libraries')
        # OpenMP's threads spin for a moment before they sleep, since waking them takes longer. By
        # default they would spin for longer, and take the cores from other programs.
        os.environ.setdefault('GOMP_SPINCOUNT', '20000')
        os.environ.setdefault('TQDM_DISABLE', '1')    # no progress bars in the log
        # Imported here, since torch takes seconds to load and parameters are served meanwhile.
        from mace_ros.engine.builder import build_engine
        engine = build_engine(
            self._parameter_server.settings, storage=self._storage, wake=self._engine_thread.wake,
            progress=self._report_progress)
        engine.parts.constraints.prepare()
        self._engine_thread.load(engine)
        self._status.watch(engine.hardware)
        log.info(f'journal and adapter versions are in {self._storage}')

    def _report_progress(self, text: str) -> None:
        self._health.doing = text
        self.get_logger().info(text)

    def _serve(self) -> None:
        engine = self.engine
        assert engine is not None
        if self._parameter_server.settings.lifecycle.bond:
            self._bond.start()
        self._update_engine(self._parameter_server.settings)    # changes made during the load
        self._gate.open(engine)
        if self._stopping:     # set since the transition began: the gate must not stay open
            self._gate.close(STOPPING)
        self._engine_thread.run()
        self.get_logger().info('ready')
        # These events precede those of the first iteration, which runs after this callback.
        self._publish(engine.start())

    def _pause(self) -> None:
        engine = self.engine
        assert engine is not None
        self._gate.close(STOPPING if self._stopping else NOT_ACTIVE)
        self._bond.stop()
        self._engine_thread.idle()
        self._publish(engine.pause())
        self.get_logger().info(
            'inactive: queries and corrections are refused, and pending corrections wait')

    def _unload(self) -> None:
        self._gate.close(STOPPING if self._stopping else NOT_ACTIVE)
        self._bond.stop()
        # Unloaded before it is closed: an engine that can't be closed must not stay loaded.
        engine = self._engine_thread.unload()
        if engine is not None:
            self._publish(engine.close())
            self._status.watch(Hardware())
            del engine
            self.get_logger().info('the journal is closed, and the model is unloaded')
        if 'torch' in sys.modules:    # also after a load that failed half-way
            from mace_ros.engine.builder import release_memory
            release_memory()

    # -- incoming messages, in the thread that serves ROS --------------------------------

    def _on_query(self, message: msg.Query) -> None:
        self.get_logger().debug(f'query {message.id!r}: {message.text!r}')
        self._gate.put(query_from(message))

    def _on_correction(self, message: msg.Correction) -> None:
        self.get_logger().debug(f'correction {message.id!r}: {message.corrected!r}')
        self._gate.put(correction_from(message))

    def _on_cancel(self, message: msg.Cancel) -> None:
        self._gate.put(cancel_from(message))

    def _freeze_learning(self, frozen: bool) -> None:
        self._health.frozen = frozen
        self._update_engine(self._parameter_server.settings)

    def _update_engine(self, _: Settings) -> None:
        """Pass the current settings to the engine, with a budget of 0 while learning is frozen."""
        self._status.update_rate()
        # Reading the settings inside the lock makes the last of several threads pass on the
        # newest settings.
        with self._update_lock:
            settings = self._parameter_server.settings
            if self._health.frozen:
                settings = settings.updated({'finetune.budget': 0.0})
            engine = self.engine
            if engine is not None:
                engine.update(settings)

    # -- outgoing events, from any thread ------------------------------------------------

    def _publish(self, events: Sequence[Event]) -> None:
        stamp = self.get_clock().now().to_msg()
        for event in events:
            try:
                self._publish_one(event, stamp)
            except Exception as error:      # the other events must still be published
                self.get_logger().error(
                    f'{type(event).__name__} could not be published: {error}')

    def _publish_one(self, event: Event, stamp: Time) -> None:
        message = self._topics.publish(event, stamp)
        self._action.on_event(event, message)
        self._status.on_event(event, stamp)
        log_event(self.get_logger(), event)


USAGE = """\
Answers queries with a language model, and learns from corrections at the same time.

parameters (all are in share/mace_ros/config/mace.yaml, with comments):
  --ros-args --params-file FILE        from a file
  --ros-args -p model.source:=MODEL    the model: a hub id, a local folder or a GGUF file
  --ros-args -p NAME:=VALUE            any other parameter

topics: query, correction, cancel (in); response_chunk, response, correction_status,
adapter_version, latency, scheduler (out)
services: embed, freeze_learning, list_versions, rollback, trace, and those of a lifecycle node
action: generate
All of these are below the node's name, /mace by default; /diagnostics is global.
"""


def parse(arguments: Sequence[str]) -> None:
    """Handle --help, and refuse arguments that ROS does not know."""
    argparse.ArgumentParser(
        prog='mace_node', description=USAGE,
        usage='mace_node [-h] [--ros-args ...]',
        formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(arguments)


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; return the exit code."""
    arguments: list[Any] = sys.argv if args is None else args
    stop = StopSignal()
    # By default, rcl runs without security where it is enabled but keys are missing.
    os.environ.setdefault('ROS_SECURITY_STRATEGY', 'Enforce')
    try:
        parse(remove_ros_args(arguments)[1:])
        rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
        node = MaceNode(on_failure=stop.send)
    except RuntimeError as error:    # from rcl: bad arguments, or security that is unavailable
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
        # The interpreter would crash at its exit while another thread is inside torch.
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == '__main__':
    sys.exit(main())
