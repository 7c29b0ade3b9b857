# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The same loads with plenty of memory and within a small budget, in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from itertools import product, takewhile
import math
from pathlib import Path
import random
import threading
import time
from typing import Any

import torch

from bench.drift import pairs
from bench.learning import Robot
from bench.memory_checks import CORPUS
from bench.memory_training import resident_mb, settle
from bench.peers.worker import Worker
from mace_ros.api.events import Correction, CorrectionState, CorrectionStatus, Query, Response
from mace_ros.api.settings import Settings

SAMPLE_S = 0.004     # between two looks at the memory in use
ENDS = (CorrectionState.LEARNED, CorrectionState.FAILED, CorrectionState.REJECTED)

# Questions that want short and long answers; what they may come to is the same for all.
MIXED = (
    'Why does bread rise?', 'What is your name?', 'Tell me a long story about a lighthouse.',
    'What is the capital of France?', 'How do I make pancakes for four people?',
    'Say good morning.', 'Write a long letter to my sister about our garden.',
    'What is the difference between a frog and a toad?', 'What do bees eat?',
    'Explain in detail how a robot finds its way through a flat.', 'Where is Lisbon?',
    'Why is the sky blue?', 'Name three fruits.', 'Tell me a long story about a cat.',
    'What did people do before there were fridges?', 'Is it safe to mix vinegar and bleach?')
OURS = 'long and short'
LESSON = ('Where is your charging station?', 'My charging station is next to the kitchen door.')


class AnonymousPeak:
    """
    The largest private memory of this process while it is watched, in MB.

    Not what is resident: that counts pages of files, such as libraries and weights, which
    the system takes back when it needs them.
    """

    def __init__(self) -> None:
        """Begin to watch."""
        self.peak = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.peak = max(self.peak, resident_mb('RssAnon'))

    def end(self) -> float:
        """Stop watching; return the peak."""
        self._stop.set()
        self._thread.join()
        return self.peak


class BudgetedRobot(Robot):
    """Answers many questions at once, first alone and then while it learns a correction."""

    def __init__(self, storage: str, threads: int, max_tokens: int, budget_mb: float) -> None:
        """Load; a budget of 0 is all that there is."""
        super().__init__(Settings().updated({
            'model.device': 'cpu', 'model.threads': threads, 'memory.budget_mb': budget_mb,
            'generation.max_tokens': max_tokens, 'slo.ttft_ms': 60000.0, 'slo.tpot_ms': 60000.0,
            'finetune.max_steps': 12}), Path(storage))
        self._learned = False
        self._lengths: dict[str, int] = {}      # tokens of each answer
        engine = self.engine
        cache = engine.model.attention.cache
        assert cache is not None
        cache.drop_from(0)     # calibration has left something
        settle()
        # What was there before the engine allocated anything that the budget is for.
        self._before = resident_mb('RssAnon') - engine.bank.nbytes / 1e6

    def fitting_budget_mb(self, questions: Sequence[str], max_tokens: int, share: float) -> float:
        """Return the budget in which a share of what the answers may come to has room."""
        longest = sum(map(len, self._prompts(questions))) + max_tokens * len(questions)
        blocks = math.ceil(longest * share / self.engine.model.block_tokens)
        return self.engine._memory.budget.planned(blocks) / 1e6

    def run(self, questions: Sequence[str], small_mb: float) -> dict[str, float]:
        """
        Answer questions, and again beside a correction; return what it took.

        And what the answers would have taken at least, as fast as these passes were, with all
        memory and with a budget of ``small_mb``.
        """
        watched, began = AnonymousPeak(), time.monotonic()
        try:
            tokens = self._answer('alone', questions)
            seconds = time.monotonic() - began
            alone = watched.peak
            least_s, least_small_s = self._least_s(questions, small_mb)
            self.engine.correct(Correction(LESSON[1], id='lesson', prompt=LESSON[0]))
            self._answer('learning', questions, 'lesson')
        finally:
            peak = watched.end()
        status = self.engine.status()
        self.engine.close()
        return {'requests': 2 * len(questions), 'tokens': tokens, 'seconds': seconds,
                'most_tokens': len(questions) * self.engine.settings.generation.max_tokens,
                'least_s': least_s, 'least_small_s': least_small_s,
                'budget_mb': status.budget_mb, 'peak_mb': peak - self._before,
                'peak_alone_mb': alone - self._before, 'preemptions': status.preemptions,
                'learned': float(self._learned)}

    def _prompts(self, questions: Sequence[str]) -> list[list[int]]:
        return [self.engine.chat.prompt([{'role': 'user', 'content': q}]) for q in questions]

    def _least_s(self, questions: Sequence[str], budget_mb: float) -> tuple[float, float]:
        """Return the least seconds for the answers' decode rows, in all memory and in a budget."""
        engine, prompts = self.engine, self._prompts(questions)
        lengths = [self._lengths[f'alone/{i}'] for i in range(len(questions))]
        contexts = [len(p) + n / 2 for p, n in zip(prompts, lengths, strict=True)]
        context = sum(c * n for c, n in zip(contexts, lengths, strict=True)) / sum(lengths)
        small = copy(engine._memory.budget)
        small.learning, small.total = 0.0, budget_mb * 1e6
        passes = least_passes(prompts, lengths, small.kv_capacity, engine.model.block_tokens)

        def seconds(rows: float) -> float:
            """Return the time of a pass; of parts of a row, between those of whole ones."""
            times = [engine.scheduler.cost.pass_s(n, round(n * context))
                     for n in (math.floor(rows), math.ceil(rows))]
            return times[0] + (times[1] - times[0]) * (rows % 1)

        return (math.fsum(seconds(sum(n > i for n in lengths)) for i in range(max(lengths))),
                passes * seconds(sum(lengths) / passes))

    def _answer(self, name: str, questions: Sequence[str], lesson: str = '') -> int:
        """
        Ask all at once; return the tokens of the answers, all of which must come.

        If a correction is named, wait for its end, too.
        """
        left, tokens = {f'{name}/{i}' for i in range(len(questions))}, 0
        if lesson:
            left.add(lesson)

        def all_ended(event: Any) -> bool:
            nonlocal tokens
            if isinstance(event, Response):
                if event.error:
                    raise AssertionError(f'{event.query_id}: {event.error}')
                tokens += event.output_tokens
                self._lengths[event.query_id] = event.output_tokens
                left.discard(event.query_id)
            elif isinstance(event, CorrectionStatus) and event.state in ENDS:
                self._learned = event.state is CorrectionState.LEARNED
                left.discard(event.id)
            return not left

        for i, text in enumerate(questions):
            self.engine.submit(Query(text, id=f'{name}/{i}', temperature=0.0, no_learn=True))
        self.until(all_ended)
        return tokens


def least_passes(prompts: Sequence[Sequence[int]], lengths: Sequence[int], blocks: int,
                 block_tokens: int) -> float:
    """
    Return in how many passes answers of these lengths can be given at least.

    Each pass that decodes a token of an answer holds the blocks of all before it, apart from
    those that all prompts share; who knew every length, and never gave up a block before its
    time, could at best have all ``blocks`` in use in every pass.
    """
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    shared = sum(1 for _ in alike) // block_tokens
    held = sum(-(-(len(prompt) + token) // block_tokens) - shared
               for prompt, length in zip(prompts, lengths, strict=True)
               for token in range(length))
    return max(held / (blocks - shared), max(lengths))


def loads(count: int) -> dict[str, list[str]]:
    """Return so many questions of each load: of a public corpus, of all topics; and ours."""
    topics = pairs(lambda answer: 0).values()
    dice = random.Random('budget')
    corpus = [question for found in topics for question, _ in found]
    return {CORPUS: dice.sample(corpus, count), OURS: list(MIXED[:count])}


def budgets(folder: Path, *, repeats: int, count: int, max_tokens: int, share: float,
            threads: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run each load without and with a budget, by turns; return a row for each run."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    budget = 0.0
    for repeat, (load, questions), limited in product(
            range(repeats), loads(count).items(), (False, True)):
        worker = Worker(
            BudgetedRobot, storage=str(folder / f'{repeat} {load} {limited}'), threads=threads,
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
