# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The node: ROS messages in, engine, ROS messages out.

Three threads: the main one waits for a signal, one serves ROS and never computes, and
one owns the device (:mod:`mace_ros.ros.device`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError as FutureTimeout
import os
from pathlib import Path
import sys
import threading
import time
import traceback
from typing import Any, TYPE_CHECKING

import rclpy
from rclpy.context import Context
from rclpy.duration import Duration
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

from mace_ros.events import (
    CorrectionProgress,
    CorrectionState,
    Event,
    Finished,
    FinishReason,
    Token,
    VersionEvent,
    VersionState,
)
import mace_ros.msg as msg
from mace_ros.ros.conversion import correction_from, message_from, query_from
from mace_ros.ros.device import Device
from mace_ros.ros.intake import Intake
from mace_ros.ros.latch import VersionLatch
from mace_ros.ros.parameters import ParameterServer
from mace_ros.ros.spinning import Spinner
from mace_ros.ros.stop_signal import StopSignal
from mace_ros.settings import InvalidSetting, Settings

if TYPE_CHECKING:
    from mace_ros.engine import Engine

DEPTH = 1000            # messages that a burst may bring
RELIABLE = QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.RELIABLE)

# From a signal to the end; launch kills ten seconds after Ctrl-C.
END_TIMEOUT_S = 7.0
ACKNOWLEDGE_TIMEOUT_S = 1.0


class MaceNode(Node):
    """Answers queries and learns from corrections; see the README for its topics."""

    def __init__(self, *, context: Context | None = None,
                 failed: Callable[[], None] = lambda: None) -> None:
        """
        Declare parameters and topics; what comes in waits until :meth:`activate`.

        ``failed`` is called, in another thread, once :attr:`failure` says why the node
        can't go on. Raises :class:`InvalidSetting`.
        """
        super().__init__('mace', context=context)
        self.failure = ''
        self._on_failure = failed
        self._engine: Engine | None = None
        self._update_lock = threading.Lock()
        self._table = ParameterServer(self, self._update)

        # One live version for each adapter slot, and the base model.
        version_depth = self._table.settings.adapter.slots + 1
        self._latch = VersionLatch(version_depth)
        self._outputs = {
            Token: self.create_publisher(msg.ResponseChunk, '~/response_chunk', RELIABLE),
            Finished: self.create_publisher(msg.Response, '~/response', RELIABLE),
            CorrectionProgress: self.create_publisher(
                msg.CorrectionStatus, '~/correction_status', RELIABLE),
            VersionEvent: self.create_publisher(
                msg.AdapterVersion, '~/adapter_version', QoSProfile(
                    depth=version_depth, reliability=ReliabilityPolicy.RELIABLE,
                    durability=DurabilityPolicy.TRANSIENT_LOCAL)),
        }
        self._intake = Intake(
            limit=lambda: self._table.settings.scheduler.max_queue, refuse=self._publish)
        self._device = Device(self, publish=self._publish, hopeless=self._give_up)
        self.create_subscription(msg.Query, '~/query', self._on_query, RELIABLE)
        self.create_subscription(msg.Correction, '~/correction', self._on_correction, RELIABLE)
        self.create_subscription(msg.Cancel, '~/cancel', self._on_cancel, RELIABLE)

    # -- its life --------------------------------------------------------------------

    def start(self) -> None:
        """Configure, then activate; an error is logged, and ends the node."""
        def check(done: Future[None]) -> None:
            error = done.exception()
            if error is None:
                return
            self.get_logger().debug(''.join(traceback.format_exception(error)))
            # Named errors say themselves what to do; of others the type may help.
            named = type(error).__module__.startswith('mace_ros.')
            self._give_up(str(error) if named else f'{type(error).__name__}: {error}')

        def configured(done: Future[None]) -> None:
            check(done)
            if done.exception() is None:
                self.activate().add_done_callback(check)

        self.configure().add_done_callback(configured)

    def configure(self) -> Future[None]:
        """Load the model and what was learned, in the device's thread."""
        return self._device.call(self._load)

    def activate(self) -> Future[None]:
        """Serve, beginning with what came in meanwhile."""
        return self._device.call(self._serve)

    def deactivate(self) -> Future[None]:
        """Take nothing more, and run no further iteration."""
        self._intake.close('the node is stopping')
        return self._device.call(lambda: self._device.drive(None))

    def cleanup(self) -> Future[None]:
        """Cancel what runs, bring the journal to disk, and free the device."""
        return self._device.call(self._unload)

    def stop(self) -> bool:
        """
        Deactivate, clean up, and wait until everybody has heard it.

        Returns False if the device's thread can't be ended, as while it loads a model.
        """
        end = time.monotonic() + END_TIMEOUT_S
        self.deactivate()
        freed = self.cleanup()
        if self._engine is not None:
            try:
                freed.result(END_TIMEOUT_S)
            except FutureTimeout:
                self.get_logger().error('an iteration does not end; giving up on it')
            except Exception as error:
                self.get_logger().error(f'the engine could not be closed: {error}')
        self._wait_until_heard()
        return self._device.stop(max(0.1, end - time.monotonic()) if freed.done() else 0.1)

    def _load(self) -> None:
        log = self.get_logger()
        log.info('loading the libraries')
        # OpenMP's threads spin for each other a moment only, and then sleep: for ever would
        # be no faster, and many times slower where other processes want a core, too.
        os.environ.setdefault('GOMP_SPINCOUNT', '20000')
        os.environ.setdefault('TQDM_DISABLE', '1')    # bars are not for a log
        # Not above: torch takes seconds, and parameters are served meanwhile.
        from mace_ros.engine import Engine
        storage = self.storage_folder()
        self._engine = Engine(
            self._table.settings, storage=storage, wake=self._device.wake,
            progress=self._say)
        log.info(f'journal and adapter versions are in {storage}')

    def _say(self, text: str) -> None:
        self.get_logger().info(text)

    def _serve(self) -> None:
        engine = self._engine
        if engine is None:     # stopped meanwhile
            return
        self._update(self._table.settings)    # what was set while the model was loaded
        self._intake.open(engine)
        self._device.drive(engine)
        self.get_logger().info('ready')
        # Before the events of the first iteration, which this thread has yet to run.
        self._publish(engine.restored)

    def _unload(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            self._publish(engine.close())

    def _give_up(self, reason: str) -> None:
        self.get_logger().fatal(reason)
        self.failure = reason
        self._intake.close(reason)
        self._on_failure()

    def _wait_until_heard(self) -> None:
        end = time.monotonic() + ACKNOWLEDGE_TIMEOUT_S
        for publisher in self._outputs.values():
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
        home = Path(os.environ.get('ROS_HOME') or '~/.ros').expanduser()
        name = self.get_fully_qualified_name().strip('/').replace('/', '__')
        return home / 'mace_ros' / name

    # -- what comes in; only enqueued ------------------------------------------------

    def _on_query(self, message: msg.Query) -> None:
        self.get_logger().debug(f'query {message.id!r}: {message.text!r}')
        self._intake.put(query_from(message))

    def _on_correction(self, message: msg.Correction) -> None:
        self.get_logger().debug(f'correction {message.id!r}: {message.corrected!r}')
        self._intake.put(correction_from(message))

    def _on_cancel(self, message: msg.Cancel) -> None:
        self._intake.put(message.query_id)

    def _update(self, _: Settings) -> None:
        # Whoever comes last hands over the newest, not the one that it came with.
        with self._update_lock:
            if self._engine is not None:
                self._engine.update(self._table.settings)

    # -- what goes out ---------------------------------------------------------------

    def _publish(self, events: Sequence[Event]) -> None:
        stamp = self.get_clock().now().to_msg()
        for event in events:
            due = self._latch.to_publish(event) if isinstance(event, VersionEvent) else [event]
            for each in due:
                self._outputs[type(each)].publish(message_from(each, stamp))
            self._log(event)

    def _log(self, event: Event) -> None:
        """Say what happened; never what was asked or answered."""
        log = self.get_logger()
        if isinstance(event, VersionEvent):
            text = f'adapter version {event.version} of profile {event.profile!r}'
            if event.state is not VersionState.PUBLISHED:
                log.warning(f'{text}: {event.state.name} {event.reason}'.rstrip())
            elif event.version:
                log.info(f'{text} is live: {len(event.correction_ids)} corrections in '
                         f'{event.train_seconds:.1f} s, {event.path}')
            else:
                log.info(f'profile {event.profile!r} is served by the base model')
        elif isinstance(event, CorrectionProgress):
            text = f'correction {event.id}: {event.state.name} {event.reason}'.rstrip()
            if event.state in (CorrectionState.REJECTED, CorrectionState.FAILED):
                log.warning(text, throttle_duration_sec=1.0)
            else:
                log.info(text)
        elif isinstance(event, Finished):
            text = f'query {event.query_id}: {event.finish_reason.name} {event.error}'.rstrip()
            if event.finish_reason is FinishReason.ERROR:
                log.error(text, throttle_duration_sec=1.0)
            elif event.finish_reason is FinishReason.REJECTED:
                log.warning(text, throttle_duration_sec=1.0)
            else:
                log.debug(text)


USAGE = """\
Answers queries with a language model, and learns from corrections while it does so.

parameters (all are in share/mace_ros/config/mace.yaml, with comments):
  --ros-args --params-file FILE        from a file
  --ros-args -p model.source:=MODEL    the model: a hub id, a local folder or a GGUF file
  --ros-args -p NAME:=VALUE            any other

topics: query, correction, cancel (in); response_chunk, response, correction_status,
adapter_version (out); all below the node's name, which is /mace.
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
    try:
        parse(remove_ros_args(arguments)[1:])
        rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:    # of rcl: bad arguments, or no keys where security is on
        print(f'mace_node: {type(error).__name__}: {error}', file=sys.stderr)
        return 2
    try:
        node = MaceNode(failed=stop.send)
    except InvalidSetting as error:
        get_logger('mace').fatal(str(error))
        rclpy.shutdown()
        return 1
    server = Spinner(node, name='ros')
    server.start()
    node.start()
    stop.wait()
    ended = node.stop()
    server.stop(1.0)
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
