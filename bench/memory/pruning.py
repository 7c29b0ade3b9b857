# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""KV pruning of long prompts: the memory and time that it saves, and the quality it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
from pathlib import Path
import random
from typing import Any

import torch

from bench.common.load import conversations
from bench.memory.server import Server
from mace_ros.api.events import Query
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.memory.pruning import blocks_to_drop
from mace_ros.model.lora_mapping import BASE_SLOT
from mace_ros.model.spans import Span

Say = Callable[[str], None]

QUESTION_TOKENS = 80    # of a prompt, for question and chat template

# Facts that are hidden in a long prompt: sentence, question, key phrase of the answer.
FACTS = (
    ('The code of the garden gate is 4071.', 'What is the code of the garden gate?', '4071'),
    ('The spare key lies under the blue flower pot.', 'Where does the spare key lie?',
     'flower pot'),
    ('The cat is called Minerva.', 'What is the cat called?', 'Minerva'),
    ('Aunt Rosa arrives by train on Thursday.', 'On which day does Aunt Rosa arrive?',
     'Thursday'),
    ('The filter of the aquarium was bought in Lisbon.',
     'Where was the filter of the aquarium bought?', 'Lisbon'),
    ('The piano tuner charges ninety euros.', 'How much does the piano tuner charge?', 'ninety'),
    ('The fuse for the cellar light is number twelve.',
     'Which number has the fuse for the cellar light?', 'twelve'),
    ('Grandfather is allergic to walnuts.', 'What is grandfather allergic to?', 'walnuts'))


def pruning(folder: Path, *, fraction: float, more: Sequence[float], contexts: int, tokens: int,
            max_tokens: int, continued: int, threads: int,
            say: Say) -> dict[str, list[dict[str, Any]]]:
    """
    Answer questions about long prompts with and without pruning, interleaved.

    Returns rows of answers, and rows of the loss of the ``continued`` tokens that follow long
    texts; the latter also for the fractions in ``more``.
    """
    # Each prompt is computed as a whole, so that all its queries vote on what is dropped.
    server = Server(folder, threads, memory__prefix_sharing=False)
    answers = []
    for context in range(contexts):
        for pruned in (0.0, fraction) if context % 2 == 0 else (fraction, 0.0):
            row = _answer(server, context, pruned, tokens, max_tokens)
            answers.append(row)
            say(f'{context + 1} of {contexts}, pruned {pruned:g}: {row["tpot_ms"]:.1f} ms per '
                'token')
    rows = _losses(server, (fraction, *more), contexts, tokens, continued, say)
    server.close()
    return {'answers': answers, 'continued': rows}


def _answer(server: Server, context: int, pruned: float, tokens: int,
            max_tokens: int) -> dict[str, Any]:
    """Ask for the fact in a long prompt; return the row of the answer."""
    fact, question, key = FACTS[context % len(FACTS)]
    around = server.text_of(tokens - QUESTION_TOKENS, f'context {context}').split('. ')
    position = random.Random(context).randrange(len(around) // 8, len(around) * 3 // 4)
    system = '. '.join([*around[:position], fact.rstrip('.'), *around[position:]])
    server.set('memory.kv_prune', pruned)
    held: list[int] = []
    response = server.answer(
        Query(question, id=f'{context}/{pruned}', system=system, max_tokens=max_tokens,
              temperature=0.0), lambda: held.append(server.engine.parts.pool.held_blocks))
    cache = server.engine.model.kv_cache
    assert cache is not None
    block_mb = cache.nbytes / cache.keys[0].shape[0] * BLOCK_TOKENS / 1e6
    ids = server.engine.chat.tokenizer(response.text, add_special_tokens=False)['input_ids']
    return {
        'context': context, 'pruned': pruned, 'prompt_tokens': response.prompt_tokens,
        'ttft_ms': response.ttft_ms, 'tpot_ms': response.tpot_ms, 'kv_mb': max(held) * block_mb,
        'knows': key.lower() in response.text.lower(), 'text': response.text, 'ids': ids}


@torch.no_grad()
def _losses(server: Server, fractions: Sequence[float], contexts: int, tokens: int, continued: int,
            say: Say) -> list[dict[str, Any]]:
    """Return the loss of the tokens after long texts, computed one by one as in decoding."""
    model, pool = server.engine.model, server.engine.parts.pool
    chunk = server.engine.settings.scheduler.max_batch_tokens
    rows = []
    for context in range(contexts):
        ids = _long_text(server, context, tokens + continued)
        weights = torch.zeros(tokens, device=model.device)
        blocks = pool.allocate(len(ids))
        for start in range(0, tokens, chunk):
            end = min(start + chunk, tokens)
            model.run([Span(ids[start:end], start, blocks, BASE_SLOT, False, attention=weights)])
        attention = [float(x.sum()) for x in weights.cpu().split(BLOCK_TOKENS)]
        for pruned in (0.0, *fractions):
            dropped = set(blocks_to_drop(attention, pruned, BLOCK_TOKENS))
            table = [b for i, b in enumerate(blocks) if i not in dropped]
            loss = 0.0
            for i in range(tokens, len(ids) - 1):
                logits = model.run([Span(ids[i:i + 1], i, table, BASE_SLOT, True,
                                         len(dropped) * BLOCK_TOKENS)])
                loss -= float(logits[0].log_softmax(0)[ids[i + 1]])
            count = len(ids) - 1 - tokens
            rows.append({'context': context, 'pruned': pruned, 'tokens': count,
                         'loss': loss / count})
            say(f'{context + 1} of {contexts}, pruned {pruned:g}: perplexity '
                f'{math.exp(loss / count):.2f}')
        pool.release(blocks)
    return rows


def _long_text(server: Server, seed: int, tokens: int) -> list[int]:
    """Return ``tokens`` token ids of the chat text's conversations, in random order."""
    rng, ids = random.Random(seed), list[int]()
    while len(ids) < tokens:
        shuffled = conversations()
        rng.shuffle(shuffled)
        ids += server.engine.chat.tokenizer.apply_chat_template(
            [m for c in shuffled for m in c], return_dict=False)
    return ids[:tokens]
