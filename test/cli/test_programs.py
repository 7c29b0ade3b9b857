# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The programs ask, correct, monitor and voice, each in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import io
from pathlib import Path
import signal
import subprocess
import sys
import threading
import wave

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from mace_ros.msg import Latency, Response, Scheduler
import pytest
from rich.console import Console
from support.ros_graph import ANSWER_S, eventually, Recorder, ROOT

from mace_ros.cli.common import seconds
from mace_ros.cli.dashboard import Dashboard
from mace_ros.cli.speech import listener, RECOGNISERS, SpeechError
from mace_ros.cli.voice import CORRECTION
from mace_ros.ros.client import MaceClient


def program(name: str, *arguments: str, typed: str = '') -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-m', f'mace_ros.cli.{name}', *arguments], cwd=ROOT,
        input=typed, capture_output=True, text=True, timeout=100)


def at_once(*commands: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    """Run programs that are independent: most of their time is the middleware's discovery."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(lambda command: program(*command), commands))


def test_ctrl_c_cancels_the_answer(client: MaceClient) -> None:
    # The first test, since corrections of others may let the answer end early.
    with Recorder(client, latency=Latency) as recorder:
        asking = subprocess.Popen(
            [sys.executable, '-m', 'mace_ros.cli.ask', 'Sing.', '--id', 'song',
             '--max-tokens', '4000'],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert asking.stdout is not None
        assert asking.stdout.read(1)      # the answer has begun
        asking.send_signal(signal.SIGINT)
        _, errors = asking.communicate(timeout=100)

        assert asking.returncode == 130
        # A program that waits for longer than two seconds says so.
        assert set(errors.splitlines()) <= {b'waiting until /mace is ready'}
        # The program ends only once the node has cancelled the query.
        [ended] = eventually(lambda: recorder.of(Latency, query_id='song'), ANSWER_S)
    assert ended.finish_reason == Response.CANCELLED


def test_ask_correct_and_ask_again(client: MaceClient) -> None:
    asked = program('ask', 'What is your colour?', '--id', 'colour', '--max-tokens', '3',
                    '--no-learn')
    assert asked.returncode == 0, asked.stderr
    assert 'query colour: adapter version' in asked.stderr

    corrected = program('correct', 'Orange.', '--id', 'colour')
    assert corrected.returncode == 0, corrected.stderr
    assert corrected.stdout.split()[:3] == ['ACCEPTED', 'TRAINING', 'LEARNED'], corrected
    version = int(corrected.stdout.split()[-1])
    assert client.wait_for_version(version, timeout_s=ANSWER_S).version == version

    again = program('ask', 'What is your colour?', '--max-tokens', '8', '--node', 'mace')
    assert again.stdout == 'Orange.\n'


def test_no_wait_returns_once_the_correction_is_accepted(client: MaceClient) -> None:
    about = ('--prompt', 'Left or right?', '--no-wait')
    corrected, equal, heavy = at_once(
        ('correct', 'Left.', *about, '--weight', '2', '--source', 'a driver'),
        ('correct', 'Left.', *about, '--rejected', 'Left.'),
        ('correct', 'Left.', *about, '--weight', '1e40'))

    assert (corrected.returncode, corrected.stdout) == (0, 'ACCEPTED\n')
    assert (equal.returncode, 'equal to the rejected' in equal.stdout) == (1, True)
    assert (heavy.returncode, "invalid weight value: '1e40'" in heavy.stderr) == (2, True)


def test_rejections_have_a_reason_and_exit_code_1(client: MaceClient) -> None:
    asked, corrected = at_once(('ask', ''), ('correct', 'Yes.', '--id', 'never asked'))
    assert (asked.returncode, asked.stdout.strip()) == (1, '')
    assert 'text: empty' in asked.stderr

    assert corrected.returncode == 1
    assert corrected.stdout.startswith('REJECTED query_id: no answer to')


@pytest.mark.parametrize(('arguments', 'message'), [
    (['ask', 'Hi', '--max-tokens', '0'], "invalid length value: '0'"),
    (['correct', ' ', '--id', 'q'], 'the corrected text is empty')])
def test_wrong_arguments_are_named(arguments: list[str], message: str) -> None:
    done = program(*arguments)

    assert (done.returncode, done.stdout) == (2, '')
    assert message in done.stderr


@pytest.mark.parametrize(('node', 'code', 'message'), [
    ('/unknown', 1, '/unknown: the node is not ready after 1.0 s'), ('/a b', 2, 'a b')])
def test_an_unreachable_or_invalid_node_is_named(
        client: MaceClient, node: str, code: int, message: str) -> None:
    asked = program('ask', 'Hi', '--node', node, '--timeout', '1')

    assert (asked.returncode, asked.stdout) == (code, '')
    assert message in asked.stderr
    assert 'Traceback' not in asked.stderr


TOPICS = ('query', 'correction', 'cancel', 'response_chunk', 'response', 'correction_status',
          'adapter_version')


def test_ros_arguments_set_the_namespace_and_remap(client: MaceClient) -> None:
    """As launch and ``ros2 run`` append them."""
    elsewhere = ('--ros-args', '-r', '__node:=asker', '-r', '__ns:=/robot2')
    rules = [x for topic in TOPICS for x in ('-r', f'/robot2/mace/{topic}:=/mace/{topic}')]
    alone, remapped, own = at_once(
        ('ask', 'Hi', '--timeout', '5', *elsewhere),
        ('ask', 'Hi', '--max-tokens', '2', '--no-learn', *elsewhere, *rules),
        ('monitor', '--count', '1', '--node', '/mace', *elsewhere))
    assert (alone.returncode, alone.stdout) == (1, '')
    assert alone.stderr.startswith(
        'waiting until /robot2/mace is ready\n/robot2/mace: the node is not ready')
    assert remapped.returncode == 0, remapped.stderr
    assert 'first token after' in remapped.stderr
    assert own.returncode == 0, own.stderr


@pytest.mark.parametrize('name', ['ask', 'correct', 'monitor', 'voice'])
def test_wrong_ros_arguments_are_named(name: str) -> None:
    required = ['text'] if name in ('ask', 'correct') else []
    wrong = program(name, *required, '--ros-args', '-r', 'no rule')

    assert (wrong.returncode, wrong.stdout) == (2, '')
    assert "no rule" in wrong.stderr
    assert 'Traceback' not in wrong.stderr


@pytest.mark.parametrize(('text', 'waits'), [('2.5', 2.5), ('inf', threading.TIMEOUT_MAX)])
def test_a_timeout_is_bounded_by_the_longest_wait_of_python(text: str, waits: float) -> None:
    assert seconds(text) == waits


@pytest.mark.parametrize('text', ['nan', '-1', 'soon'])
def test_an_invalid_timeout_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        seconds(text)


def test_monitor_prints_lines_without_a_terminal(client: MaceClient) -> None:
    done = program('monitor', '--count', '2')
    heading, *lines = done.stdout.splitlines()

    assert done.returncode == 0, done.stderr
    assert [len(line.split()) for line in lines] == [len(heading.split())] * 2
    assert lines[-1].split()[-1] == str(client.version().version)


def test_voice_answers_and_corrects(client: MaceClient) -> None:
    done = program('voice', '--conversation', '', '--max-tokens', '6',
                     typed='Who are you?\nNo, Rover.\nAnd where?\n')
    answers = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert '["Rover." is ACCEPTED]' in done.stderr
    assert '["Rover." is LEARNED' in done.stderr.splitlines()[-1]
    assert len(answers) >= 2

    assert program('voice', '--conversation', '', typed='Who are you?\n').stdout == 'Rover.\n'


def test_voice_ends_an_answer_when_the_person_speaks(client: MaceClient) -> None:
    """What is spoken into an answer corrects that answer."""
    with Recorder(client, latency=Latency) as recorder, subprocess.Popen(
            [sys.executable, '-m', 'mace_ros.cli.voice', '--barge-in', '--conversation', '',
             '--max-tokens', '3900'], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as talking:
        talking.stdin.write('What shall I sing?\n')
        assert talking.stdout.read(1)       # the answer has begun
        talking.stdin.write('No, a lullaby.\n')
        assert talking.stdout.readline().endswith('\n')
        _, notes = talking.communicate(timeout=200)
        assert talking.returncode == 0, notes
        eventually(lambda: recorder.of(Latency, finish_reason=Response.CANCELLED), ANSWER_S)
    assert '["a lullaby." is ACCEPTED]' in notes
    assert '["a lullaby." is LEARNED' in notes.splitlines()[-1]
    again = program('voice', '--conversation', '', typed='What shall I sing?\n')
    assert again.stdout == 'a lullaby.\n'


def test_the_end_of_the_input_does_not_end_the_last_answer(client: MaceClient) -> None:
    done = program('voice', '--barge-in', '--max-tokens', '40', typed='Count.\n')
    alone = program('ask', 'Count.', '--max-tokens', '40')
    assert (done.returncode, done.stdout) == (0, alone.stdout)


def test_voice_names_recognisers_or_the_unreadable_file(client: MaceClient, tmp_path: Path) -> None:
    done = program('voice', '--wav', str(tmp_path / 'nothing.wav'))

    assert done.returncode == 1
    assert 'pip install' in done.stderr or 'nothing.wav' in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(('said', 'right'), [
    ('No, my name is Rover.', 'my name is Rover.'), ('no: 42', '42'),
    ('no the answer is paris', 'paris'), ('No one knows.', None), ('Nothing', None), ('No,', None)])
def test_no_followed_by_the_right_answer_is_a_correction(said: str, right: str | None) -> None:
    found = CORRECTION.fullmatch(said)

    assert (found and found['right']) == right


def test_a_missing_recogniser_is_reported_with_how_to_install_it(
        monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ('faster_whisper', 'pocketsphinx'):
        monkeypatch.setitem(sys.modules, module, None)

    for name in ('auto', *RECOGNISERS):
        with pytest.raises(SpeechError, match='pip install faster-whisper'):
            listener(name)


def test_pocketsphinx_accepts_only_16_bits_mono(tmp_path: Path) -> None:
    pytest.importorskip('pocketsphinx')
    listen = listener('pocketsphinx')
    for channels, file in ((1, tmp_path / 'mono.wav'), (2, tmp_path / 'stereo.wav')):
        with wave.open(str(file), 'wb') as sound:
            sound.setparams((channels, 2, 16000, 0, 'NONE', ''))
            sound.writeframes(bytes(16000 * channels))

    assert isinstance(listen(tmp_path / 'mono.wav'), str)
    with pytest.raises(SpeechError, match='not 16 bits mono'):
        listen(tmp_path / 'stereo.wav')
    with pytest.raises(SpeechError, match='RIFF'):
        listen(Path(__file__))


def test_the_page_shows_its_own_node_only() -> None:
    now = 0.0
    page = Dashboard('/robot1/mace', clock=lambda: now)
    assert 'waiting for the node' in shown(page)
    page.on_message(Scheduler(
        live_version=7, serving_share=0.25, learning_share=0.5, busy_share=0.75,
        slo_attainment=float('nan'), corrections_waiting=2, freshness_s=9.0,
        drift=Scheduler.DRIFT_DRIFTING, drift_level=0.375, finetune_budget=0.625))
    page.on_message(Latency(query_id='q1', finish_reason=Response.CANCELLED, ttft_ms=123.0))
    page.on_message(DiagnosticArray(status=[
        DiagnosticStatus(level=DiagnosticStatus.WARN, name='robot1/mace: device', message='hot'),
        DiagnosticStatus(level=DiagnosticStatus.OK, name='robot2/mace: device', message='cool')]))

    text = shown(page)
    for part in ('adapter version 7', '25%', '50%', 'WARN', 'hot', 'q1', 'CANCELLED', '123',
                 '2 corrections wait', 'queries drift', '38%', '62%'):
        assert part in text
    assert 'cool' not in text
    assert 'no messages' not in text
    now = 60.0
    assert 'no messages from the node' in shown(page)


def shown(page: Dashboard) -> str:
    """Return the page as text."""
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(page.page())
    return console.export_text()
