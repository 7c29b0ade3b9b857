# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A voice assistant: ask, read the answer, and correct it with "no, ...".

Input is typed, or spoken in WAV files. It uses :class:`MaceClient` as a robot's own assistant
would: one conversation, streamed answers, and corrections learned during the conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
import re
import sys
import threading
from typing import Any
import uuid

from mace_ros.cli.common import parse, parser, print_stream, run, STATES
from mace_ros.cli.speech import listener, RECOGNISERS, SpeechError
from mace_ros.msg import CorrectionStatus, Response
from mace_ros.ros.client import CorrectionHandle, MaceClient

# The second form is for recognisers that write no punctuation.
CORRECTION = re.compile(r'no(?:[,;:!.]\s*|\s+the answer is\s+)(?P<right>\S.*)', re.I | re.S)
HELP = 'ask something; "no, ..." corrects the last answer; Ctrl-D ends'


class Assistant:
    """One conversation with the robot."""

    def __init__(self, client: MaceClient, *, profile: str, conversation: str, max_tokens: int,
                 timeout_s: float) -> None:
        """``conversation`` is its id; if empty, every query stands alone."""
        self._client, self._timeout_s = client, timeout_s
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
            print_stream(answer, self._timeout_s)
        except KeyboardInterrupt:    # ends the answer only
            print(flush=True)
        response = answer.result(self._timeout_s)
        if response.finish_reason in (Response.REJECTED, Response.ERROR):
            note(f'no answer: {response.error}')
        else:
            self._last = response

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


def typed() -> Iterator[str]:
    """Yield typed lines, until Ctrl-D."""
    interactive = sys.stdin.isatty()
    if interactive:
        note(HELP)
    while True:
        try:
            said = input('> ' if interactive else '').strip()
        except EOFError:
            return
        if said:
            yield said


def spoken(files: list[Path], recogniser: str, model: str) -> Iterator[str]:
    """Yield the text of each file; raises `SpeechError`."""
    listen = listener(recogniser, model)
    for file in files:
        said = listen(file)
        note(f'{file.name}: {said or "no speech recognised"}')
        if said:
            yield said


def talk(utterances: Iterator[str], make_assistant: Callable[[MaceClient], Assistant],
         timeout_s: float, client: MaceClient) -> int:
    """Hold the conversation; return the exit code."""
    client.wait_until_ready(timeout_s)
    assistant = make_assistant(client)
    try:
        for said in utterances:
            assistant.on_utterance(said)
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
    arguments.add_argument('--conversation', metavar='ID', default=str(uuid.uuid4()),
                           help='conversation to continue; empty: each query stands alone '
                                '(default: a new conversation)')
    arguments.add_argument('--profile', default='', help='profile whose adapter answers and learns')
    arguments.add_argument('--max-tokens', type=int, default=-1, metavar='N',
                           help='maximum length of an answer')
    given = parse(arguments)
    utterances = (spoken(given.wav, given.recogniser, given.speech_model) if given.wav
                  else typed())
    make_assistant = partial(Assistant, profile=given.profile, conversation=given.conversation,
                             max_tokens=given.max_tokens, timeout_s=given.timeout)
    return run(partial(talk, utterances, make_assistant, given.timeout), given.node)


if __name__ == '__main__':
    sys.exit(main())
