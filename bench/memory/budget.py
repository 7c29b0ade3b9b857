# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The same requests with all memory and within a small budget, each in its own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from itertools import product, takewhile
import math
from pathlib import Path
import random
import time
from typing import Any

import torch

from bench.learning.drift_trace import question_pairs
from bench.memory.checks import CORPUS
from bench.memory.resident import AnonymousPeak, resident_mb, settle
from bench.systems.interactive import ENDS, InteractiveEngine
from bench.systems.peers.worker import Worker
from mace_ros.api.events import Correction, CorrectionState, CorrectionStatus, Query, Response
from mace_ros.api.settings import Settings

# Questions with short and long answers; the longest possible answer is the same for all.
MIXED = (
    'Why does bread rise?', 'What is your name?', 'Tell me a long story about a lighthouse.',
    'What is the capital of France?', 'How do I make pancakes for four people?',
    'Say good morning.', 'Write a long letter to my sister about our garden.',
    'What is the difference between a frog and a toad?', 'What do bees eat?',
    'Explain in detail how a robot finds its way through a flat.', 'Where is Lisbon?',
    'Why is the sky blue?', 'Name three fruits.', 'Tell me a long story about a cat.',
    'What did people do before there were fridges?', 'Is it safe to mix vinegar and bleach?')
MIXED_LOAD = 'long and short'
LESSON = ('Where is your charging station?', 'My charging station is next to the kitchen door.')


class BudgetedEngine(InteractiveEngine):
    """Answers many questions together, first alone and then while it learns a correction."""

    def __init__(self, storage: str, threads: int, max_tokens: int, budget_mb: float) -> None:
        """Load; a budget of 0 allows all memory."""
        super().__init__(Settings().updated({
            'model.device': 'cpu', 'model.threads': threads, 'memory.budget_mb': budget_mb,
            'generation.max_tokens': max_tokens, 'slo.ttft_ms': 60000.0, 'slo.tpot_ms': 60000.0,
            'finetune.max_steps': 12}), Path(storage))
        self._learned = False
        self._lengths: dict[str, int] = {}      # tokens of each response
        cache = self.engine.model.kv_cache
        assert cache is not None
        cache.drop_from(0)     # blocks that the calibration used
        settle()
        # Memory that the budget does not cover.
        self._before = resident_mb('RssAnon') - self.engine.lora.nbytes / 1e6

    def fitting_budget_mb(self, questions: Sequence[str], max_tokens: int, share: float) -> float:
        """Return the budget with room for a share of the longest possible responses."""
        longest = sum(map(len, self._prompts(questions))) + max_tokens * len(questions)
        blocks = math.ceil(longest * share / self.engine.model.block_tokens)
        return self.engine.parts.memory.budget.planned(blocks) / 1e6

    def run(self, questions: Sequence[str], small_mb: float) -> dict[str, float]:
        """
        Answer the questions, then again beside a correction; return times and memory.

        ``least_s`` and ``least_small_s`` are lower bounds of the time, at the measured speed of
        passes, with all memory and with a budget of ``small_mb``.
        """
        sampler, began = AnonymousPeak(), time.monotonic()
        try:
            tokens = self._answer('alone', questions)
            seconds = time.monotonic() - began
            alone = sampler.peak
            least_s, least_small_s = self._least_s(questions, small_mb)
            self.engine.correct(Correction(LESSON[1], id='lesson', prompt=LESSON[0]))
            self._answer('learning', questions, 'lesson')
        finally:
            peak = sampler.end()
        status = self.engine.status()
        self.close()
        return {'requests': 2 * len(questions), 'tokens': tokens, 'seconds': seconds,
                'most_tokens': len(questions) * self.engine.settings.generation.max_tokens,
                'least_s': least_s, 'least_small_s': least_small_s,
                'budget_mb': status.budget_mb, 'peak_mb': peak - self._before,
                'peak_alone_mb': alone - self._before, 'preemptions': status.preemptions,
                'learned': float(self._learned)}

    def _prompts(self, questions: Sequence[str]) -> list[list[int]]:
        return [self.engine.chat.prompt([{'role': 'user', 'content': q}]) for q in questions]

    def _least_s(self, questions: Sequence[str], budget_mb: float) -> tuple[float, float]:
        """Return the least seconds of all decode passes, with all memory and in a budget."""
        engine, prompts = self.engine, self._prompts(questions)
        lengths = [self._lengths[f'alone/{i}'] for i in range(len(questions))]
        contexts = [len(p) + n / 2 for p, n in zip(prompts, lengths, strict=True)]
        context = sum(c * n for c, n in zip(contexts, lengths, strict=True)) / sum(lengths)
        small = copy(self.engine.parts.memory.budget)
        small.learning, small.total = 0.0, budget_mb * 1e6
        passes = least_passes(prompts, lengths, small.kv_capacity, engine.model.block_tokens)

        def seconds(rows: float) -> float:
            """Return the time of a pass, interpolated between whole numbers of rows."""
            times = [engine.scheduler.cost.pass_s(n, round(n * context))
                     for n in (math.floor(rows), math.ceil(rows))]
            return times[0] + (times[1] - times[0]) * (rows % 1)

        return (math.fsum(seconds(sum(n > i for n in lengths)) for i in range(max(lengths))),
                passes * seconds(sum(lengths) / passes))

    def _answer(self, name: str, questions: Sequence[str], lesson: str = '') -> int:
        """
        Ask all questions at once; return the tokens of the responses.

        Waits for the correction with the id ``lesson`` as well. Raises ``AssertionError`` if a
        question is not answered.
        """
        open_ids, tokens = {f'{name}/{i}' for i in range(len(questions))}, 0
        if lesson:
            open_ids.add(lesson)

        def all_ended(event: Any) -> bool:
            nonlocal tokens
            if isinstance(event, Response):
                if event.error:
                    raise AssertionError(f'{event.query_id}: {event.error}')
                tokens += event.output_tokens
                self._lengths[event.query_id] = event.output_tokens
                open_ids.discard(event.query_id)
            elif isinstance(event, CorrectionStatus) and event.state in ENDS:
                self._learned = event.state is CorrectionState.LEARNED
                open_ids.discard(event.id)
            return not open_ids

        for i, text in enumerate(questions):
            self.engine.submit(Query(text, id=f'{name}/{i}', temperature=0.0, no_learn=True))
        self.wait_for(all_ended)
        return tokens


def least_passes(prompts: Sequence[Sequence[int]], lengths: Sequence[int], blocks: int,
                 block_tokens: int) -> float:
    """
    Return a lower bound of the passes that decode responses of these lengths.

    A pass that decodes a token of a response holds the blocks of all tokens before it, apart
    from those that all prompts share. The best schedule knows all lengths, never preempts, and
    uses all ``blocks`` in every pass.
    """
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    shared = sum(1 for _ in alike) // block_tokens
    held = sum(-(-(len(prompt) + token) // block_tokens) - shared
               for prompt, length in zip(prompts, lengths, strict=True)
               for token in range(length))
    return max(held / (blocks - shared), max(lengths))


def loads(count: int) -> dict[str, list[str]]:
    """Return ``count`` questions of each load: of a public corpus, and :data:`MIXED`."""
    topics = question_pairs(lambda answer: 0).values()
    corpus = [question for found in topics for question, _ in found]
    return {CORPUS: random.Random('budget').sample(corpus, count),
            MIXED_LOAD: list(MIXED[:count])}


def budgets(folder: Path, *, repeats: int, count: int, max_tokens: int, share: float,
            threads: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run each load without and with a budget, interleaved; return a row for each run."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    budget = 0.0
    for repeat, (load, questions), limited in product(
            range(repeats), loads(count).items(), (False, True)):
        worker = Worker(
            BudgetedEngine, storage=str(folder / f'{repeat} {load} {limited}'), threads=threads,
            max_tokens=max_tokens, budget_mb=budget if limited else 0.0).ready()
        try:
            if not limited:
                budget = worker.call('fitting_budget_mb', questions, max_tokens, share)
            row = worker.call('run', questions, budget)
        finally:
            worker.close()
        rows.append({'repeat': repeat, 'load': load, 'limited': limited, **row})
        say(f'{repeat + 1} of {repeats}, {load}, budget {row["budget_mb"]:.0f} MB: '
            f'{row["tokens"] / row["seconds"]:.1f} tokens/s, peak {row["peak_mb"]:.0f} MB, '
            f'{row["preemptions"]:.0f} preemptions')
    return rows
