# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Speech recognition of WAV files by an optional package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import wave

Listen = Callable[[Path], str]

INSTALL = ('pip install faster-whisper   (better; downloads a model at its first use)\n'
       'pip install pocketsphinx     (English; includes its model)')


class SpeechError(Exception):
    """Speech can't be recognised; the message says what to do."""


def listener(name: str, model: str = '') -> Listen:
    """
    Return a function that turns a WAV file into text, by the recogniser of that name.

    ``auto`` is the first one installed. Both this and the function raise `SpeechError`.
    """
    for each in RECOGNISERS if name == 'auto' else [name]:
        try:
            return RECOGNISERS[each](model)
        except ImportError as error:
            if name != 'auto':
                raise SpeechError(f'{name} is not installed ({error})\n{INSTALL}') from error
    raise SpeechError(f'no speech recogniser is installed; type, or\n{INSTALL}')


def _faster_whisper(model: str) -> Listen:
    from faster_whisper import WhisperModel
    try:
        # On the CPU: the GPU belongs to the language model.
        whisper = WhisperModel(model or 'base', device='cpu', compute_type='int8')
    except Exception as error:    # network errors of many types
        raise SpeechError(
            f"faster-whisper's model {model or 'base'!r} can't be loaded ({error}); give the "
            'folder of one with --speech-model') from error

    def listen(file: Path) -> str:
        try:
            segments, _ = whisper.transcribe(str(file))
            return ' '.join(segment.text.strip() for segment in segments)
        except (OSError, ValueError) as error:
            raise SpeechError(f'{file}: {error}') from error

    return listen


def _pocketsphinx(model: str) -> Listen:
    from pocketsphinx import Decoder
    if model:
        raise SpeechError('pocketsphinx has its own model; omit --speech-model')

    def listen(file: Path) -> str:
        try:
            with wave.open(str(file), 'rb') as sound:
                if (sound.getnchannels(), sound.getsampwidth()) != (1, 2):
                    raise SpeechError(f'{file}: not 16 bits mono, which pocketsphinx requires')
                rate, samples = sound.getframerate(), sound.readframes(sound.getnframes())
        except (OSError, EOFError, wave.Error) as error:
            raise SpeechError(f'{file}: {error}') from error
        decoder = Decoder(samprate=rate, loglevel='FATAL')
        decoder.start_utt()
        decoder.process_raw(samples, full_utt=True)
        decoder.end_utt()
        hypothesis = decoder.hyp()
        return hypothesis.hypstr if hypothesis is not None else ''

    return listen


# In the order in which `auto` tries them.
RECOGNISERS: dict[str, Callable[[str], Listen]] = {
    'faster-whisper': _faster_whisper, 'pocketsphinx': _pocketsphinx}
