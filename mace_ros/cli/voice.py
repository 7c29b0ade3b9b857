# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A voice assistant: ask, read the answer, and correct it with "no, ...".

Input is typed, or spoken in WAV files. It uses :class:`MaceClient` as a robot's own assistant
would: one conversation, streamed answers that end when the person speaks, and corrections learned
during the conversation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
import os
from pathlib import Path
import re
import sys
import threading
from typing import Any
import uuid

from mace_ros.cli.common import (
    cancelled_on_leaving,
    length,
    parse,
    parser,
    run,
    STATES,
    wait_until_ready,
)
from mace_ros.cli.speech import listener, RECOGNISERS, SpeechError
from mace_ros.cli.utterances import Utterances
from mace_ros.msg import CorrectionStatus, Response
from mace_ros.ros.client import AnswerHandle, CorrectionHandle, MaceClient

# The second form is for recognisers that write no punctuation.
CORRECTION = re.compile(r'no(?:[,;:!.]\s*|\s+the answer is\s+)(?P<right>\S.*)', re.I | re.S)
HELP = 'ask something; "no, ..." corrects the last answer, also while it is given; Ctrl-D ends'


class Assistant:
    """
    One conversation with the robot.

    ``speaking`` says whether the person has begun to speak: then the answer that is given ends.
    """

    def __init__(self, client: MaceClient, *, profile: str, conversation: str, max_tokens: int,
                 timeout_s: float, speaking: Callable[[], bool] = lambda: False) -> None:
        """``conversation`` is its id; if empty, every query stands alone."""
        self._client, self._timeout_s, self._speaking = client, timeout_s, speaking
        self._fields: dict[str, Any] = {
            'profile': profile, 'conversation_id': conversation, 'max_tokens': max_tokens}
        self._last: Response | None = None
        self._corrections: list[threading.Thread] = []

    def on_utterance(self, said: str) -> None:
        """Answer, or correct the last answer."""
        correction = CORRECTION.fullmatch(said)
        if correction and self._last is not None:
            self._correct(correction['right'])
        else:
            self._answer(said)

    def wait(self) -> None:
        """Wait until each correction has its final state."""
        for thread in self._corrections:
            thread.join()

    def _answer(self, said: str) -> None:
        answer = self._client.ask(said, **self._fields)
        try:
            self._say(answer)
        except KeyboardInterrupt:    # ends the answer only
            print(flush=True)
        response = answer.result(self._timeout_s)
        if response.finish_reason in (Response.REJECTED, Response.ERROR):
            note(f'no answer: {response.error}')
        elif response.output_tokens:    # else the person spoke before the robot said a word
            self._last = response

    def _say(self, answer: AnswerHandle) -> None:
        """Print an answer as it arrives, until the person speaks."""
        with cancelled_on_leaving(answer, self._timeout_s):
            for text in answer.stream(self._timeout_s, until=self._speaking):
                print(text, end='', flush=True)
            print(flush=True)
        if not answer.is_complete():
            answer.cancel()

    def _correct(self, right: str) -> None:
        assert self._last is not None
        handle = self._client.correct(
            right, query_id=self._last.query_id, profile=self._fields['profile'],
            source='mace_voice')
        thread = threading.Thread(target=self._follow, args=(right, handle), daemon=True)
        thread.start()
        self._corrections.append(thread)

    def _follow(self, right: str, handle: CorrectionHandle) -> None:
        """Report the states of a correction, during the conversation."""
        try:
            for status in handle.follow(self._timeout_s):
                text = f'"{right}" is {STATES[status.state]} {status.reason}'.rstrip()
                if status.state == CorrectionStatus.LEARNED:
                    text += f' in adapter version {status.adapter_version}'
                note(text)
        except TimeoutError as error:
            note(f'"{right}": {error}; learning continues')
        except ConnectionError as error:
            note(f'"{right}": {error}')


def note(text: str) -> None:
    """Print a note about the conversation to stderr."""
    print(f'[{text}]', file=sys.stderr, flush=True)


def typed(prompt: str) -> Iterator[str]:
    """Yield what is typed, a line each, until Ctrl-D."""
    for line in _lines(prompt):
        if said := line.strip():
            yield said


def _lines(prompt: str) -> Iterator[str]:
    if not sys.stdin.isatty():
        # Not sys.stdin: the interpreter can't end while another thread reads that.
        with open(os.dup(sys.stdin.fileno()), encoding=sys.stdin.encoding) as lines:
            yield from lines
        return
    note(HELP)
    with suppress(EOFError):
        while True:
            yield input(prompt)


def spoken(files: list[Path], recogniser: str, model: str) -> Iterator[str]:
    """Yield the text of each file; raises `SpeechError`."""
    listen = listener(recogniser, model)
    for file in files:
        said = listen(file)
        note(f'{file.name}: {said or "no speech recognised"}')
        if said:
            yield said


def talk(said: Iterator[str], barge_in: bool, make_assistant: Callable[..., Assistant],
         timeout_s: float, client: MaceClient) -> int:
    """Hold the conversation; return the exit code."""
    wait_until_ready(client, timeout_s)
    utterances = Utterances(said, ahead=barge_in)
    assistant = make_assistant(client, speaking=utterances.waiting)
    try:
        for utterance in utterances:
            assistant.on_utterance(utterance)
    except SpeechError as error:
        print(f'mace_voice: {error}', file=sys.stderr)
        return 1
    assistant.wait()
    return 0


def main() -> int:
    """Run the program; return the exit code."""
    arguments = parser('mace_voice', 'Talk with the robot: ' + HELP + '.')
    arguments.add_argument('--wav', type=Path, nargs='+', default=[], metavar='FILE',
                           help='recorded speech instead of typing (a correction: "no, ..." or '
                                '"no the answer is ...")')
    arguments.add_argument('--recogniser', choices=('auto', *RECOGNISERS), default='auto',
                           help='speech recogniser (default: the first one installed)')
    arguments.add_argument('--speech-model', default='', metavar='MODEL',
                           help="model of the recogniser (default: faster-whisper's base)")
    arguments.add_argument('--barge-in', action=argparse.BooleanOptionalAction, default=None,
                           help='end an answer when the person speaks (default: if typed at a '
                                'terminal)')
    arguments.add_argument('--conversation', metavar='ID', default=str(uuid.uuid4()),
                           help='conversation to continue; empty: each query stands alone '
                                '(default: a new conversation)')
    arguments.add_argument('--profile', default='', help='profile whose adapter answers and learns')
    arguments.add_argument('--max-tokens', type=length, default=-1, metavar='N',
                           help='maximum length of an answer')
    given = parse(arguments)
    barge_in = (sys.stdin.isatty() and not given.wav if given.barge_in is None
                else given.barge_in)
    # Without a prompt where the person may type while an answer is printed.
    utterances = (spoken(given.wav, given.recogniser, given.speech_model) if given.wav
                  else typed('' if barge_in else '> '))
    make_assistant = partial(Assistant, profile=given.profile, conversation=given.conversation,
                             max_tokens=given.max_tokens, timeout_s=given.timeout)
    return run(partial(talk, utterances, barge_in, make_assistant, given.timeout), given.node)


if __name__ == '__main__':
    sys.exit(main())
