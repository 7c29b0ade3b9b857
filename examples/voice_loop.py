# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Speak with the robot: Whisper listens, espeak-ng speaks.

An utterance that begins with "no," corrects the last answer: "No, your name is Rover." teaches
"Your name is Rover.". Needs `pip install faster-whisper sounddevice`, a microphone, and
espeak-ng. `ros2 run mace_ros voice` does the same for text that another recogniser writes to its
input, and lets the speaker interrupt.
"""

import argparse
import re
import subprocess

from faster_whisper import WhisperModel
import numpy as np
import sounddevice

from mace_ros.ros.client import MaceClient

RATE, BLOCK_S = 16000, 0.1
LOUD = 0.02             # root mean square of speech
SILENCE_BLOCKS = 8      # that end an utterance


def utterance() -> np.ndarray:
    """Record from the first loud block until the silence after it; return mono samples."""
    blocks: list[np.ndarray] = []
    silent = 0
    with sounddevice.InputStream(samplerate=RATE, channels=1, dtype='float32') as stream:
        while silent < SILENCE_BLOCKS:
            block = stream.read(int(RATE * BLOCK_S))[0][:, 0]
            loud = float(np.sqrt(np.mean(block ** 2))) > LOUD
            if blocks or loud:
                blocks.append(block)
                silent = 0 if loud else silent + 1
    return np.concatenate(blocks)


def correction(text: str) -> str:
    """Return what "No, ..." teaches, '' for anything else."""
    found = re.match(r'no[,.!]?\s+(.+)', text, re.IGNORECASE)
    return found[1][0].upper() + found[1][1:] if found else ''


def main() -> None:
    """Listen, answer and learn until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--whisper', default='base.en', help='model (default: %(default)s)')
    given = parser.parse_args()
    whisper = WhisperModel(given.whisper)
    with MaceClient() as client:
        client.wait_until_ready()
        last = None
        while True:
            segments, _ = whisper.transcribe(utterance())
            text = ' '.join(segment.text.strip() for segment in segments)
            if not text:
                continue
            print(f'> {text}')
            if last is not None and (corrected := correction(text)):
                client.correct(corrected, query_id=last.id)
                said = 'Thank you. I will remember that.'
            else:
                last = client.ask(text, conversation_id='voice')
                said = last.result(60.0).text
            print(said)
            subprocess.run(['espeak-ng', said], check=False)


if __name__ == '__main__':
    main()
