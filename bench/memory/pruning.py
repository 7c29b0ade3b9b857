# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What sharing and pruning the KV cache does to answers: how soon, how fast, how good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
from pathlib import Path
import random
from typing import Any

import torch

from bench.learning import Robot
from bench.load import conversations, prose
from mace_ros.api.events import FinishReason, Query, Response
from mace_ros.api.settings import Settings
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.memory.pruning import blocks_to_drop
from mace_ros.model.lora import BASE_SLOT
from mace_ros.model.spans import Span

Say = Callable[[str], None]

TURNS = (
    'Good morning. What can you do for me today?',
    'I would like to have breakfast in the garden. Is that a good idea?',
    'Then tell me what I need to carry outside.',
    'And how do I keep the coffee warm while we sit there?',
    'Thank you. What should we do after breakfast?')

NAMES = ('Anna', 'Boris', 'Chiara', 'Dmitri', 'Elif', 'Farid', 'Greta', 'Hugo')

# What stands somewhere in a long prompt, and a question about it.
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


class Server(Robot):
    """An engine without learning, whose answers may go on beyond their end."""

    def __init__(self, folder: Path, threads: int, **values: Any) -> None:
        """Load the model on the CPU."""
        super().__init__(Settings().updated({
            'model.device': 'cpu', 'model.threads': threads, 'finetune.budget': 0.0,
            **{name.replace('__', '.'): value for name, value in values.items()}}), folder)
        self.engine.chat.end_tokens = frozenset()

    def set(self, name: str, value: float | bool) -> None:
        """Change a parameter."""
        self.engine.update(self.engine.settings.updated({name: value}))
        self.engine.step()

    def answer(self, query: Query, watch: Callable[[], None] = lambda: None) -> Response:
        """Return the whole answer; ``watch`` is called at each piece of it."""
        def ended(event: Any) -> bool:
            if isinstance(event, Response) and event.query_id == query.id:
                return True
            watch()
            return False

        self.engine.submit(query)
        event: Response = self.until(ended)
        if event.finish_reason is not FinishReason.LENGTH:
            raise AssertionError(f'{query.id} ended with {event.finish_reason.name}')
        return event

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens that were computed so far."""
        return self.engine.status().statistics.prefill_tokens

    def text_of(self, tokens: int, seed: str, tokenizer: Callable[[str], Any]) -> str:
        """Return chat text, from a random place, of about so many tokens and not fewer."""
        words = prose().split()
        start = random.Random(seed).randrange(len(words))
        words = words[start:] + words[:start]
        low, high = 1, len(words)
        while low < high:
            middle = (low + high) // 2
            if len(tokenizer(' '.join(words[:middle]))['input_ids']) < tokens:
                low = middle + 1
            else:
                high = middle
        return ' '.join(words[:low])


# -- sharing -----------------------------------------------------------------------------


def sharing(folder: Path, *, repeats: int, count: int, threads: int, system_tokens: int,
            max_tokens: int, say: Say) -> list[dict[str, Any]]:
    """
    Lead the same conversations with sharing on and off, by turns; return a row for each turn.

    In each repeat ``count`` conversations of five turns follow each other, all with one
    system prompt, which with sharing on is computed by the first of them.
    """
    server = Server(folder, threads)
    system = server.text_of(system_tokens, 'system', server.engine.chat.tokenizer)
    rows: list[dict[str, Any]] = []
    server.ask(TURNS[0])     # warms up
    for repeat in range(repeats):
        for shares in (True, False) if repeat % 2 == 0 else (False, True):
            server.set('memory.prefix_sharing', False)     # forgets
            server.set('memory.prefix_sharing', shares)
            for number in range(count):
                name = f'{repeat}/{shares}/{number}'
                who = f'This is {NAMES[number % len(NAMES)]}. '
                for turn, text in enumerate(TURNS):
                    before = server.prefill_tokens
                    found = server.answer(Query(
                        who + text, id=f'{name}/{turn}', conversation_id=name, system=system,
                        max_tokens=max_tokens, temperature=0.0))
                    rows.append({
                        'repeat': repeat, 'sharing': shares, 'conversation': number, 'turn': turn,
                        'prompt_tokens': found.prompt_tokens,
                        'prefill_tokens': server.prefill_tokens - before,
                        'ttft_ms': found.ttft_ms, 'text': found.text})
            chosen = [r for r in rows if (r['repeat'], r['sharing']) == (repeat, shares)]
            say(f'{repeat + 1} of {repeats}, sharing {shares}: '
                f'{sum(r["prefill_tokens"] for r in chosen)} prompt tokens computed')
    server.engine.close()
    return rows


# -- pruning -----------------------------------------------------------------------------


def pruning(folder: Path, *, fraction: float, more: Sequence[float], contexts: int, tokens: int,
            max_tokens: int, continued: int, threads: int,
            say: Say) -> dict[str, list[dict[str, Any]]]:
    """
    Answer questions about long prompts with and without pruning, by turns.

    Returns rows of answers, and of the loss of the ``continued`` tokens after long texts, that
    one with ``more`` fractions, too.
    """
    # Each prompt is computed as a whole, so that its end has all its queries.
    server = Server(folder, threads, memory__prefix_sharing=False)
    engine, answers = server.engine, []
    encode = engine.chat.tokenizer
    server.ask(TURNS[0])
    for context in range(contexts):
        fact, question, key = FACTS[context % len(FACTS)]
        around = server.text_of(tokens - 80, f'context {context}', encode).split('. ')
        place = random.Random(context).randrange(len(around) // 8, len(around) * 3 // 4)
        system = '. '.join([*around[:place], fact.rstrip('.'), *around[place:]])
        for kept in (0.0, fraction) if context % 2 == 0 else (fraction, 0.0):
            server.set('memory.kv_prune', kept)
            held: list[int] = []
            found = server.answer(
                Query(question, id=f'{context}/{kept}', system=system, max_tokens=max_tokens,
                      temperature=0.0),
                lambda seen=held: seen.append(engine._pool.held_blocks))  # type: ignore[misc]
            ids = encode(found.text, add_special_tokens=False)['input_ids']
            cache = engine.model.attention.cache
            assert cache is not None
            block_mb = cache.nbytes / cache.keys[0].shape[0] * BLOCK_TOKENS / 1e6
            answers.append({
                'context': context, 'pruned': kept, 'prompt_tokens': found.prompt_tokens,
                'ttft_ms': found.ttft_ms, 'tpot_ms': found.tpot_ms, 'kv_mb': max(held) * block_mb,
                'knows': key.lower() in found.text.lower(), 'text': found.text, 'ids': ids})
            say(f'{context + 1} of {contexts}, pruned {kept:g}: {found.tpot_ms:.1f} ms per token')
    rows = _losses(server, (fraction, *more), contexts, tokens, continued, say)
    engine.close()
    return {'answers': answers, 'continued': rows}


@torch.no_grad()
def _losses(server: Server, fractions: Sequence[float], contexts: int, tokens: int, continued: int,
            say: Say) -> list[dict[str, Any]]:
    """Return the loss of what follows long texts, token by token as an answer is decoded."""
    model, pool = server.engine.model, server.engine._pool
    chunk = server.engine.settings.scheduler.max_batch_tokens
    rows = []
    for context in range(contexts):
        ids = _long_text(server, context, tokens + continued)
        noted = torch.zeros(tokens, device=model.device)
        blocks = pool.allocate(len(ids))
        for start in range(0, tokens, chunk):
            end = min(start + chunk, tokens)
            model.run([Span(ids[start:end], start, blocks, BASE_SLOT, False, attention=noted)])
        attention = [float(x.sum()) for x in noted.cpu().split(BLOCK_TOKENS)]
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
    """Return so many tokens of the chat text's conversations, in random order."""
    dice, ids = random.Random(seed), list[int]()
    while len(ids) < tokens:
        shuffled = conversations()
        dice.shuffle(shuffled)
        ids += server.engine.chat.tokenizer.apply_chat_template(
            [m for c in shuffled for m in c], return_dict=False)
    return ids[:tokens]
