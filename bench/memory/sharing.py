# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Prefix sharing: the tokens that it saves and the shorter time to the first token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.memory.server import Server, WARM_UP
from mace_ros.api.events import Query

TURNS = (
    WARM_UP,
    'I would like to have breakfast in the garden. Is that a good idea?',
    'Then tell me what I need to carry outside.',
    'And how do I keep the coffee warm while we sit there?',
    'Thank you. What should we do after breakfast?')

NAMES = ('Anna', 'Boris', 'Chiara', 'Dmitri', 'Elif', 'Farid', 'Greta', 'Hugo')


def sharing(folder: Path, *, repeats: int, count: int, threads: int, system_tokens: int,
            max_tokens: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """
    Run the same conversations with sharing on and off, interleaved; return a row per turn.

    Each repeat has ``count`` conversations of five turns, one after the other, with one system
    prompt. With sharing on, only the first conversation computes the system prompt.
    """
    server = Server(folder, threads)
    system = server.text_of(system_tokens, 'system')
    rows: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for shares in (True, False) if repeat % 2 == 0 else (False, True):
            server.set('memory.prefix_sharing', False)     # clears the cache
            server.set('memory.prefix_sharing', shares)
            for number in range(count):
                rows += _conversation(server, system, repeat, shares, number, max_tokens)
            chosen = [r for r in rows if (r['repeat'], r['sharing']) == (repeat, shares)]
            say(f'{repeat + 1} of {repeats}, sharing {shares}: '
                f'{sum(r["prefill_tokens"] for r in chosen)} prompt tokens computed')
    server.close()
    return rows


def _conversation(server: Server, system: str, repeat: int, shares: bool, number: int,
                  max_tokens: int) -> list[dict[str, Any]]:
    """Run one conversation; return a row per turn."""
    name = f'{repeat}/{shares}/{number}'
    introduction = f'This is {NAMES[number % len(NAMES)]}. '
    rows = []
    for turn, text in enumerate(TURNS):
        before = server.prefill_tokens
        response = server.answer(Query(
            introduction + text, id=f'{name}/{turn}', conversation_id=name, system=system,
            max_tokens=max_tokens, temperature=0.0))
        rows.append({
            'repeat': repeat, 'sharing': shares, 'conversation': number, 'turn': turn,
            'prompt_tokens': response.prompt_tokens,
            'prefill_tokens': server.prefill_tokens - before,
            'ttft_ms': response.ttft_ms, 'text': response.text})
    return rows
