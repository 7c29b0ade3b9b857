# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Time to first token around publications.

Questions arrive at random times, half of them in the scope of what is learned, and every 20 s an
answer is corrected. The benchmark compares questions in the 10 s after a publication with those
that arrive later, while nothing is learned. All follow a system prompt, whose keys and values all
versions share. Results: bench/results/publication.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import json
import random
import time
from typing import Any

from bench.common.load import LESSONS, poisson, prose
from bench.common.options import Options, settings_from
from bench.common.results import Check, check, percentile, Reported, Result
from bench.common.running import Run, run_benchmark, Samples

TAUGHT = 4              # corrections in force at the beginning
AFTER_S = 10.0          # after a publication
SYSTEM_WORDS = 300      # of the system prompt
OUTPUT_TOKENS = 16
DRAIN_S = 60.0          # longest wait for the last answers

Row = dict[str, Any]


def options() -> Options:
    """Return the options."""
    result = Options('publication', __doc__, quick='two corrections')
    result.size('--corrections', 36, 2, 'corrections that are learned under load')
    result.add('--period', type=float, default=20.0,
               help='seconds between two of them (default: %(default)s)')
    result.add('--rate', type=float, default=0.4,
               help='questions per second (default: %(default)s)')
    result.add('--seed', type=int, default=0, help='seed of the arrivals (default: %(default)s)')
    result.threads()
    result.parameters()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, evaluate=evaluate)


def evaluate(samples: Samples, run: Run) -> Result:
    """Return the results of the samples."""
    return Result('publication', samples, checks(samples), reported(samples))


def measure(run: Run) -> Samples:
    """Teach, then serve the load; return the samples."""
    from bench.systems.interactive import InteractiveEngine

    args = run.args
    settings = settings_from(args.set).updated({
        'model.threads': args.threads,
        'generation.system': ' '.join(prose().split()[:SYSTEM_WORDS])})
    robot = InteractiveEngine(settings, run.folder, run.say, max_tokens=OUTPUT_TOKENS)
    try:
        load = Load(robot.engine, args)
        for lesson in load.lessons:
            lesson['query_id'] = robot.ask(lesson['question'], no_learn=False).query_id
        for lesson in load.lessons[:TAUGHT]:
            robot.teach(lesson['query_id'], lesson['answer'])
        run.say(f'{TAUGHT} corrections are in force; {len(load.arrivals)} questions follow')
        return load.serve()
    finally:
        robot.close()


class Load:
    """Questions and corrections that arrive at given times, and what became of them."""

    def __init__(self, engine: Any, args: Any) -> None:
        """Draw the arrivals."""
        self._engine, self._period = engine, args.period
        self._chance = random.Random(args.seed)
        known = json.loads(LESSONS.read_text())
        self.lessons: list[Row] = known['corrections'][:TAUGHT + args.corrections]
        self._facts = [question for question, _ in known['facts']]
        seconds = args.period * args.corrections
        self.arrivals = poisson(f'publication {args.seed}', int(seconds * args.rate), seconds)
        self._in_force = list(range(TAUGHT))        # of the lessons
        self._rows: dict[str, Row] = {}
        self._jobs: list[Row] = []
        self._turn_tokens = 0       # of prompts, before their last turn

    def serve(self) -> Samples:
        """Run iterations until all is answered and learned."""
        shared, began = self._engine.parts.kv_cache.shared_tokens, time.monotonic()
        left = list(self.arrivals)
        corrections = list(range(TAUGHT, len(self.lessons)))
        end = self.arrivals[-1] + DRAIN_S
        while (now := time.monotonic() - began) < end:
            while left and left[0] <= now:
                self._ask(left.pop(0))
            if corrections and len(self._jobs) * self._period <= now:
                self._correct(corrections.pop(0), now)
            iteration = self._engine.step()
            for event in iteration.events:
                self._note(event, time.monotonic() - began)
            if not left and not corrections and self._is_done():
                break
            if iteration.wake_at is None:
                time.sleep(0.001)
        return {
            'requests': list(self._rows.values()), 'jobs': self._jobs,
            'tokens_before_last_turn': self._turn_tokens,
            'shared_tokens': self._engine.parts.kv_cache.shared_tokens - shared}

    def _ask(self, at: float) -> None:
        from mace_ros.api.events import Query

        in_scope = len(self._rows) % 2 == 0
        if in_scope:
            lesson = self.lessons[self._chance.choice(self._in_force)]
            text = lesson[self._chance.choice(('question', 'paraphrase'))]
        else:
            text = self._chance.choice(self._facts)
        name = f'load-{len(self._rows)}'
        self._rows[name] = {'at': at, 'in_scope': in_scope}
        chat = self._engine.chat
        self._turn_tokens += chat.adapted_from(chat.prompt([
            {'role': 'system', 'content': self._engine.settings.generation.system},
            {'role': 'user', 'content': text}]))
        self._engine.submit(Query(text, id=name, max_tokens=OUTPUT_TOKENS, temperature=0.0,
                                  no_learn=True))

    def _correct(self, number: int, now: float) -> None:
        from mace_ros.api.events import Correction

        lesson = self.lessons[number]
        self._jobs.append({'lesson': number, 'sent': now, 'ended': None, 'state': ''})
        self._engine.correct(Correction(
            lesson['answer'], id=f'lesson-{number}', query_id=lesson['query_id']))

    def _note(self, event: Any, now: float) -> None:
        from bench.systems.interactive import ENDS
        from mace_ros.api.events import CorrectionState, CorrectionStatus, Response

        if isinstance(event, Response) and event.query_id in self._rows:
            self._rows[event.query_id] |= {
                'ttft_ms': event.ttft_ms, 'version': event.adapter_version,
                'prompt_tokens': event.prompt_tokens}
        elif isinstance(event, CorrectionStatus) and event.state in ENDS:
            job = next(j for j in self._jobs if f'lesson-{j["lesson"]}' == event.id)
            job |= {'ended': now, 'state': event.state.name}
            if event.state is CorrectionState.LEARNED:
                self._in_force.append(job['lesson'])

    def _is_done(self) -> bool:
        return (all('ttft_ms' in row for row in self._rows.values())
                and all(job['ended'] is not None for job in self._jobs))


def checks(samples: Samples) -> list[Check]:
    """Return the checks."""
    after, calm = (list(ttfts(samples, when)) for when in ('after', 'calm'))
    shared, tokens = samples['shared_tokens'], samples['tokens_before_last_turn']
    return [
        check(f'TTFT p95 in the {AFTER_S:g} s after a publication / before the next correction',
              percentile(after, 95) / percentile(calm, 95) if calm else None, '<= 1.05',
              f'{percentile(after, 95):.0f} ms of {len(after)} questions and '
              f'{percentile(calm, 95):.0f} ms of {len(calm)}'),
        check('prefix tokens shared across versions / prompt tokens before the last turn',
              shared / tokens if tokens else None, '>= 0.95', f'{shared} of {tokens}'),
        check('corrections learned under load', sum(
            job['state'] == 'LEARNED' for job in samples['jobs']) / len(samples['jobs']), '>= 1',
            f'of {len(samples["jobs"])}')]


def reported(samples: Samples) -> list[Reported]:
    """Return numbers without a target that explain the checks."""
    seconds = [job['ended'] - job['sent'] for job in samples['jobs'] if job['ended'] is not None]
    learning = list(ttfts(samples, 'learning'))
    return [
        Reported('TTFT p50 in those 10 s, ms', percentile(ttfts(samples, 'after'), 50)),
        Reported('TTFT p50 before the next correction, ms',
                 percentile(ttfts(samples, 'calm'), 50)),
        Reported('TTFT p95 while a correction is learned, ms', percentile(learning, 95),
                 note=f'{len(learning)} questions'),
        Reported('s from a correction to its version under load, median',
                 percentile(seconds, 50)),
        Reported('s from a correction to its version under load, p95', percentile(seconds, 95))]


def ttfts(samples: Samples, when: str) -> Iterator[float]:
    """Yield the TTFT of questions that arrive ``after`` a publication, ``learning`` or ``calm``."""
    for row in samples['requests']:
        if 'ttft_ms' in row and _moment(samples['jobs'], row['at']) == when:
            yield row['ttft_ms']


def _moment(jobs: Sequence[Row], at: float) -> str:
    for job in jobs:
        if job['ended'] is not None and job['ended'] < at <= job['ended'] + AFTER_S:
            return 'after'
    learning = any(job['sent'] <= at and (job['ended'] is None or at <= job['ended'])
                   for job in jobs)
    return 'learning' if learning else 'calm'


if __name__ == '__main__':
    main()
