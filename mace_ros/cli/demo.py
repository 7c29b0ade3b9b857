# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Ask, correct, and get the right answer: the node in another process, a client in this one.

The exit code is 0 only if the new answer contains the correction, the adapter version has risen,
and two unrelated answers are unchanged.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import TypeVar

from mace_ros.api.wording import counted
from mace_ros.cli.common import STATES
from mace_ros.cli.demo_screen import ANSWER, ASIDE, FAILED, PASSED, QUESTION, Screen, screen
from mace_ros.msg import AdapterVersion, CorrectionStatus, Response, Scheduler
from mace_ros.ros.client import CorrectionHandle, MaceClient

T = TypeVar('T')

QUERIES = ('What is your name?', 'What is the opposite of hot?', 'Say hello in French.')
CORRECTED = 'My name is Rover.'      # the answer to the first query
# Neither replay nor the gate knows these, so they show whether learning forgets.
PROBES = ('What is the capital of France?', 'What is the capital of Japan?')
MAX_TOKENS = 40

# What a correction takes, in times per output token on the same device: seconds until it is in
# force over TPOT, as bench.edits and bench.colocation record them.
LEARN_TOKENS = 60.0
STAGES = {
    CorrectionStatus.ACCEPTED: 'on disk; the live version is scored on it',
    CorrectionStatus.TRAINING: 'fine-tune steps until every token of the answer leads'}

START_TIMEOUT_S = 900.0    # includes the conversion of the model
ANSWER_TIMEOUT_S = 120.0
LEARN_TIMEOUT_S = 600.0


class DemoFailed(Exception):
    """The demo could not be completed."""


class Demo:
    """The steps of the demo."""

    def __init__(self, screen: Screen, node: subprocess.Popen[str], client: MaceClient) -> None:
        self._screen, self._node, self._client = screen, node, client

    def run(self) -> list[str]:
        """Run the demo; return what went wrong."""
        started = time.monotonic()
        version = self._wait(lambda: self._client.wait_until_ready(1.0), START_TIMEOUT_S)
        self._screen.line(
            f'   ready after {time.monotonic() - started:.1f} s, adapter version '
            f'{version.version}')

        self._screen.step('Three queries')
        wrong, *_ = [self._ask(question) for question in QUERIES]
        self._screen.step('Two probes, which are excluded from learning')
        before = [self._ask(question, no_learn=True) for question in PROBES]

        self._screen.step(f'Correct the answer to "{QUERIES[0]}": {CORRECTED}',
                          expected_s=max(1.0, LEARN_TOKENS * wrong.tpot_ms / 1e3))
        learned = self._follow(self._client.correct(CORRECTED, query_id=wrong.query_id))
        if learned.state != CorrectionStatus.LEARNED:
            raise DemoFailed(f'the correction is {STATES[learned.state]}: {learned.reason}')
        new = self._wait(
            lambda: self._client.wait_for_version(learned.adapter_version, timeout_s=1.0),
            ANSWER_TIMEOUT_S)
        self._show(new)

        self._screen.step('The same question again')
        right = self._ask(QUERIES[0])
        self._screen.step('The probes again')
        after = [self._ask(question, no_learn=True) for question in PROBES]
        return list(problems(version, right, before, after))

    def _ask(self, question: str, *, no_learn: bool = False) -> Response:
        screen = self._screen
        screen.piece(f'   {question} ', QUESTION)
        answer = self._client.ask(question, max_tokens=MAX_TOKENS, no_learn=no_learn)
        for text in answer.stream(ANSWER_TIMEOUT_S):
            screen.piece(text.replace('\n', ' '), ANSWER)
        response = answer.result()
        if response.finish_reason not in (Response.STOP, Response.LENGTH):
            raise DemoFailed(f'no answer to "{question}": {response.error}')
        screen.line(
            f'      first token after {response.ttft_ms:.0f} ms, '
            f'{counted(response.output_tokens, "token")} at {response.tpot_ms:.0f} ms each, '
            f'adapter version {response.adapter_version}', ASIDE)
        return response

    def _follow(self, handle: CorrectionHandle) -> CorrectionStatus:
        """Print each state of the correction; return the final one."""
        start, printed = time.monotonic(), 0
        while not printed or not handle.is_final() or printed < len(handle.statuses):
            self._wait(partial(handle.wait_for_more, printed, 1.0), LEARN_TIMEOUT_S)
            for status in handle.statuses[printed:]:
                stage = STAGES.get(status.state, '')
                about = '; '.join(filter(None, (stage, status.reason)))
                self._screen.line(
                    f'   {STATES[status.state]} after {time.monotonic() - start:.1f} s'
                    + (about and f': {about}'))
                self._screen.stage(stage)
                printed += 1
        return handle.statuses[-1]

    def _show(self, version: AdapterVersion) -> None:
        self._screen.step(f'Adapter version {version.version} was published')
        self._screen.line(
            f'   parent {version.parent}; mean log-probability of the corrected tokens '
            f'{version.score_before:.2f} -> {version.score_after:.2f}; {version.train_tokens} '
            f'tokens in {version.train_seconds:.1f} s\n   {version.path}')

    def _wait(self, attempt: Callable[[], T], timeout_s: float) -> T:
        """Retry ``attempt`` while the node runs, up to ``timeout_s``."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                return attempt()
            except (TimeoutError, ConnectionError) as error:
                if self._node.poll() is not None:
                    raise DemoFailed(
                        f'the node ended with exit code {self._node.returncode}') from error
                if time.monotonic() > end:
                    raise DemoFailed(str(error)) from error


def problems(first: AdapterVersion, right: Response, before: list[Response],
             after: list[Response]) -> Iterator[str]:
    """Yield the failed conditions of the demo."""
    if CORRECTED not in right.text:
        yield f'the corrected answer is "{right.text}", without "{CORRECTED}"'
    if right.adapter_version <= first.version:
        yield f'the adapter version did not rise: {first.version} -> {right.adapter_version}'
    for question, old, new in zip(PROBES, before, after, strict=True):
        if old.text != new.text:
            yield f'the answer to "{question}" changed from "{old.text}" to "{new.text}"'


@contextmanager
def running_node(screen: Screen, folder: Path, model: str) -> Iterator[subprocess.Popen[str]]:
    """Run the node in a process of its own, with its output on the screen."""
    parameters = {'storage.folder': folder, **({'model.source': model} if model else {})}
    node = subprocess.Popen(
        [sys.executable, '-m', 'mace_ros.ros.node', '--ros-args',
         *(word for name, value in parameters.items() for word in ('-p', f'{name}:={value}'))],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def relay() -> None:
        assert node.stdout is not None
        for line in node.stdout:
            screen.node_line(f'   node | {line.rstrip()}')

    relaying = threading.Thread(target=relay)
    relaying.start()
    try:
        yield node
    finally:
        node.send_signal(signal.SIGINT)
        try:
            node.wait(15.0)
        except subprocess.TimeoutExpired:
            node.kill()
        relaying.join()


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(prog='python -m mace_ros.cli.demo', description=__doc__)
    parser.add_argument('--model', default='', help='hub id, local folder or GGUF file '
                        '(default: SmolLM2-135M-Instruct)')
    parser.add_argument('--keep', action='store_true',
                        help='keep the folder with journal and adapter versions')
    parser.add_argument('--plain', action='store_true',
                        help='print lines only, as without a terminal')
    arguments = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix='mace_demo_'))
    os.environ.update(
        # Isolated from other nodes.
        ROS_AUTOMATIC_DISCOVERY_RANGE='LOCALHOST', ROS_DOMAIN_ID=str(random.randint(1, 101)),
        ROS_LOG_DIR=str(folder / 'log'), RCUTILS_CONSOLE_OUTPUT_FORMAT='[{severity}] {message}')
    shown = screen(plain=arguments.plain)
    shown.step(f'Start the node; its storage folder is {folder}')
    try:
        with running_node(shown, folder, arguments.model) as node, MaceClient() as client:
            client.node.create_subscription(Scheduler, f'{client.name}/scheduler', shown.now, 10)
            failures = Demo(shown, node, client).run()
        if node.returncode:
            failures.append(f'the node ended with exit code {node.returncode}')
    except (DemoFailed, TimeoutError, ConnectionError) as error:
        failures = [str(error)]
    except KeyboardInterrupt:
        return 130
    finally:
        shown.close()
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if failures:
        shown.line('\n'.join(['\nDemo failed:', *failures]), FAILED)
        return 1
    shown.line('\nDemo passed: the correction is learned; other answers are unchanged.', PASSED)
    return 0


if __name__ == '__main__':
    sys.exit(main())
