# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Requests and their arrival times: the same for all systems that are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import math
from pathlib import Path
import random
from typing import Any

CHAT_TEXT = Path(__file__).parents[1] / 'chat.txt'
LESSONS = Path(__file__).parents[1] / 'lessons.json'

# Maps a text to the token ids of its prompt, chat template included.
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Arrival:
    """A request that arrives ``at`` seconds after the start of its block."""

    at: float
    text: str
    ids: tuple[int, ...]    # of the whole prompt
    max_tokens: int = 0     # of the response; 0: the block's default


@dataclass(frozen=True)
class Slo:
    """Latency objectives of a request, in milliseconds."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True)
class RequestTimes:
    """
    Times of one request, in seconds of ``time.monotonic``.

    ``started`` is its first pass; ``first`` and ``last`` are when the caller received the
    first and last of its ``tokens``.
    """

    arrival: float
    started: float
    first: float
    last: float
    tokens: int


def poisson(seed: str, count: int, seconds: float) -> list[float]:
    """
    Return ``count`` sorted arrival times of a Poisson process in ``seconds``.

    Given their number, Poisson arrivals are independent and uniform: all blocks have the
    same load and differ only in their bursts.
    """
    rng = random.Random(seed)
    return sorted(rng.uniform(0.0, seconds) for _ in range(count))


def conversations(path: Path = CHAT_TEXT) -> list[list[dict[str, str]]]:
    """Return the conversations of a chat text, as messages with role and content."""
    found: list[list[dict[str, str]]] = []
    for part in path.read_text().split('\n\n'):
        lines = [line.partition(': ') for line in part.splitlines() if not line.startswith('#')]
        if lines:
            found.append([{'role': role, 'content': content} for role, _, content in lines])
    return found


def prose(path: Path = CHAT_TEXT) -> str:
    """Return the contents of all messages of a chat text, joined."""
    return ' '.join(m['content'] for c in conversations(path) for m in c)


def prompts(encode: Encode, seed: str, count: int, tokens: int) -> list[tuple[str, Sequence[int]]]:
    """
    Return texts and the ids of their prompts, which are exactly ``tokens`` long.

    The texts are cut out of the chat text at random positions. Raises ``ValueError`` if the
    chat template alone is too long.
    """
    words, rng = prose().split(), random.Random(seed)
    found: list[tuple[str, Sequence[int]]] = []
    if len(encode(words[0])) > tokens:
        raise ValueError(f'prompts of {tokens} tokens: the chat template is longer')
    while len(found) < count:
        start = rng.randrange(len(words))
        for end in range(start + 1, start + 1 + tokens):
            text = ' '.join(words[start:end])
            ids = encode(text)
            if len(ids) >= tokens:
                if len(ids) == tokens:    # otherwise the last word is too long: try elsewhere
                    found.append((text, ids))
                break
    return found


def arrivals(encode: Encode, seed: str, *, count: int, seconds: float,
             tokens: int) -> list[Arrival]:
    """Return the requests of a block, with prompts of ``tokens`` tokens."""
    times = poisson(seed, count, seconds)
    return [Arrival(at, text, tuple(ids)) for at, (text, ids) in zip(
        times, prompts(encode, seed, count, tokens), strict=True)]


def training_sequences(ids: Sequence[int], tokens: int) -> list[tuple[int, ...]]:
    """Cut ``ids`` into sequences of exactly ``tokens``; the remainder is left out."""
    return [tuple(ids[i:i + tokens]) for i in range(0, len(ids) - tokens + 1, tokens)]


def request_row(system: str, block: int, begun: float, times: RequestTimes,
                slo: Slo) -> dict[str, Any]:
    """Return the sample of one request; ``begun`` is the start of its block."""
    ttft = (times.first - times.arrival) * 1e3
    tpot = math.nan
    if times.tokens > 1:
        tpot = (times.last - times.first) / (times.tokens - 1) * 1e3
    return {
        'system': system, 'block': block, 'arrival_s': times.arrival - begun,
        'queue_ms': (times.started - times.arrival) * 1e3, 'ttft_ms': ttft, 'tpot_ms': tpot,
        'output_tokens': times.tokens,
        'slo_met': ttft <= slo.ttft_ms and not tpot > slo.tpot_ms}


def block_row(system: str, block: int, *, wall_s: float, busy_s: float, finetune_tokens: int = 0,
              finetune_steps: int = 0) -> dict[str, Any]:
    """Return the sample of one system in one block."""
    return {
        'system': system, 'block': block, 'wall_s': wall_s, 'busy_s': busy_s,
        'finetune_tokens': finetune_tokens, 'finetune_steps': finetune_steps}
