# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A node under load for a long time: queries, corrections, cancellations, parameter changes.

Queries come at random times, at 0.7 of the rate at which the node answers them when many
wait. Memory must not grow once it is warm, nor the queue, every query gets its response,
every correction is acknowledged, and nothing fails. Results: bench/results/soak.json.
"""

from __future__ import annotations

import argparse
from collections import Counter, deque
from collections.abc import Sequence
import json
import math
from pathlib import Path
import random
import statistics
import sys
import tempfile
import time
from typing import Any

from bench.learning import LESSONS
from bench.node import NodeProcess, own_domain
from bench.report import summary
from bench.results import Check, check, percentile, Recorder, Reported, Result, Table
from mace_ros.api.settings import PARAMETERS

LOAD = 0.7              # share of what the node can answer
WARM_UP = 0.25          # share of the time after which memory is to be flat
START_S, ANSWER_S = 250.0, 120.0
CONTRADICTED = 0.1      # share of corrections with the answer to another question
AT_ONCE = 16            # queries that are under way while the node's rate is found out ...
CALIBRATED_OVER = 512   # ... over so many, half of them to warm up
FILLS_WITH = 500        # words of a question that fills the KV cache
SAMPLE_S, CORRECTION_S, REPORT_S = 2.0, 20.0, 60.0
WINDOWS = 8             # after the warm-up, in each of which the least memory counts
CHANGES: tuple[dict[str, Any], ...] = (
    {'finetune.budget': 0.5}, {'finetune.budget': 1.0}, {'scheduler.max_requests': 12},
    {'scheduler.max_requests': 16}, {'slo.ttft_ms': 400.0}, {'slo.ttft_ms': 500.0},
    {'generation.temperature': 0.5}, {'generation.temperature': 0.0})


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    result = argparse.ArgumentParser(prog='python -m bench.soak', description=__doc__.strip())
    add = result.add_argument
    add('--quick', action='store_true', help='one minute: says that all runs, not how well')
    add('--minutes', type=float, help='how long (default: 30; quick: 1)')
    add('--model', default='', help='model.source (default: the packaged model)')
    add('--results', type=Path, metavar='FOLDER', help='where to write the results')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    args.minutes = args.minutes or (1.0 if args.quick else 30.0)
    recorder = Recorder(vars(args), quick=args.quick)
    own_domain()
    with tempfile.TemporaryDirectory(prefix='mace-bench-') as folder:
        node = NodeProcess(Path(folder), {'model.source': args.model} if args.model else {})
        try:
            from mace_ros.ros.client import MaceClient

            with MaceClient() as client:
                client.wait_until_ready(START_S)
                samples = Soak(node, client, args.minutes * 60.0).run()
        except BaseException:
            print(node.log, file=sys.stderr)
            raise
        finally:
            node.kill()
        samples['log'] = dict(Counter(
            level for line in node.log.splitlines() for level in ('ERROR', 'FATAL', 'Traceback')
            if level in line))
    result = Result('soak', samples, checks(samples), reported(samples), [table(samples)], [])
    path = recorder.write(result, args.results)
    print(summary(result))
    print(f'\n{path}')


class Soak:
    """One run, with a client that does everything."""

    def __init__(self, node: NodeProcess, client: Any, seconds: float) -> None:
        """Run for so many seconds, once :meth:`run` is called."""
        from rcl_interfaces.srv import SetParameters

        self._node, self._client, self._seconds = node, client, seconds
        self._random = random.Random(4)
        self._lessons = json.loads(LESSONS.read_text())['corrections']
        self._answers: list[Any] = []
        self._learning: list[Any] = []
        self._asked = self._cancelled = self._changed = self._made = self._refused = 0
        self._ended: list[Any] = []
        self._queue_depth, self._planned_mb, self._learning_share = 0, 0.0, 0.0
        self._samples: list[dict[str, float]] = []
        self._parameters = client.node.create_client(SetParameters, '/mace/set_parameters')

    def run(self) -> dict[str, Any]:
        """Return what was measured."""
        from mace_ros.msg import Scheduler

        if not self._parameters.wait_for_service(30.0):
            raise TimeoutError('the node has no parameter service')
        self._client.node.create_subscription(Scheduler, '/mace/scheduler', self._watch, 100)
        self._fill_cache()
        interval_s = self._request_s() / LOAD
        print(f'{1 / interval_s:.2f} queries per second', flush=True)
        start = due = time.monotonic()
        sampled = printed = start
        corrected = -math.inf
        while (now := time.monotonic()) < start + self._seconds:
            if now >= due:
                due += self._random.expovariate(1 / interval_s)
                self._ask()
            if now > sampled + SAMPLE_S:
                sampled = now
                self._change()
                self._collect()
                self._samples.append({
                    'at_s': now - start, 'memory_mb': self._node.memory_mb(),
                    'planned_mb': self._planned_mb, 'queue_depth': self._queue_depth,
                    'learning_share': self._learning_share,
                    'unanswered': len(self._answers)})
            if now > corrected + CORRECTION_S:
                corrected = now
                self._correct()
            if now > printed + REPORT_S:
                printed = now
                print(f'{(now - start) / 60:.0f} min: {self._samples[-1]["memory_mb"]:.0f} MB, '
                      f'{len(self._ended)} responses, queue {self._queue_depth}', flush=True)
            time.sleep(max(0.0, min(due - time.monotonic(), 0.02)))
        end = time.monotonic() + ANSWER_S
        while self._answers and time.monotonic() < end:
            self._collect()
            time.sleep(0.05)
        return self._summary(1 / interval_s)

    def _summary(self, rate: float) -> dict[str, Any]:
        from mace_ros.msg import CorrectionStatus, Response

        served = [r for r in self._ended if r.finish_reason in (Response.STOP, Response.LENGTH)]
        states = Counter(s.state for one in self._learning for s in one.statuses)
        return {
            'rate': rate, 'asked': self._asked, 'cancelled': self._cancelled,
            'changes': self._changed, 'changes_refused': self._refused + self._changed - self._made,
            'responses': len(self._ended), 'served': len(served),
            'broken': sorted({r.error for r in self._ended
                              if r.finish_reason == Response.ERROR}),
            'slo_met': sum(r.slo_met for r in served),
            'ttft_ms': [r.ttft_ms for r in served], 'tpot_ms': [r.tpot_ms for r in served],
            'corrections': len(self._learning),
            'acknowledged': states[CorrectionStatus.ACCEPTED],
            'learned': states[CorrectionStatus.LEARNED],
            'superseded': states[CorrectionStatus.SUPERSEDED],
            'failed': states[CorrectionStatus.FAILED], 'over_time': self._samples}

    def _fill_cache(self) -> None:
        """
        Let the node read as many tokens as its KV cache keeps.

        It keeps what may be of use again until the room is needed: of a cache of 16,384 tokens,
        what 700 short answers leave behind, which is no growth without end.
        """
        left = PARAMETERS['memory.kv_cache_tokens'].default
        while left > 0:
            text = ' '.join(str(self._random.randrange(1000)) for _ in range(FILLS_WITH))
            left -= self._client.ask(text, max_tokens=1).result(ANSWER_S).prompt_tokens

    def _request_s(self) -> float:
        """Return the time of a query when many are answered together, one after the other asked."""
        answers: deque[Any] = deque()
        for i in range(CALIBRATED_OVER):
            if i == CALIBRATED_OVER // 2:    # until then caches are cold, and conversations short
                start = time.monotonic()
            if len(answers) == AT_ONCE:
                answers.popleft().result(ANSWER_S)
            answers.append(self._client.ask(**self._question()))
        return (time.monotonic() - start) / (CALIBRATED_OVER - CALIBRATED_OVER // 2)

    def _question(self) -> dict[str, Any]:
        return {'text': f'Question {self._random.randrange(200)}?',
                'max_tokens': self._random.choice((4, 16, 32)),
                'conversation_id': self._random.choice(('', '', 'a', 'b'))}

    def _ask(self) -> None:
        self._asked += 1
        answer = self._client.ask(**self._question())
        self._answers.append(answer)
        if self._random.random() < 0.05:
            self._cancelled += 1
            answer.cancel()

    def _correct(self) -> None:
        """Teach one of forty lessons; now and then what contradicts it."""
        lesson, other = self._random.choice(self._lessons), self._random.choice(self._lessons)
        wrong = self._random.random() < CONTRADICTED
        self._learning.append(self._client.correct(
            (other if wrong else lesson)['answer'], prompt=lesson['question']))

    def _change(self) -> None:
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        self._changed += 1
        self._parameters.call_async(SetParameters.Request(parameters=[
            Parameter(name, value=value).to_parameter_msg()
            for name, value in self._random.choice(CHANGES).items()],
        )).add_done_callback(self._count_refusals)

    def _count_refusals(self, done: Any) -> None:
        self._made += 1
        self._refused += sum(not result.successful for result in done.result().results)

    def _collect(self) -> None:
        complete = [a for a in self._answers if a.is_complete()]
        self._ended += [a.response for a in complete]
        self._answers = [a for a in self._answers if a not in complete]

    def _watch(self, message: Any) -> None:
        self._queue_depth = message.queue_depth
        self._planned_mb = message.memory_planned_mb
        self._learning_share = message.learning_share


# -- what the samples say ----------------------------------------------------------------


def rise(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return where the line through values over time that fits best begins, and its rise."""
    if len(points) < 2:
        return math.nan, math.nan
    times, values = zip(*points, strict=True)
    slope, start = statistics.linear_regression(times, values)
    return start + slope * times[0], slope * (times[-1] - times[0])


def growth(points: Sequence[tuple[float, float]]) -> float:
    """Return by which share a value grows over time."""
    start, rises = rise(points)
    return rises / start


def after_warm_up(rows: Sequence[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """Return a value in each sample after the warm-up, with its time."""
    return [(r['at_s'], r[name]) for r in rows if r['at_s'] >= WARM_UP * rows[-1]['at_s']]


def floor(rows: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """
    Return the least resident memory in each window after the warm-up, with its time.

    What a step of learning or many answers hold for a while comes and goes; what stays when
    they have gone is what would fill a robot's memory in the end.
    """
    points = after_warm_up(rows, 'memory_mb')
    each = max(len(points) // WINDOWS, 1)
    return [min(points[i:i + each], key=lambda point: point[1])
            for i in range(0, len(points) - each + 1, each)]


def checks(samples: dict[str, Any]) -> list[Check]:
    """Return the checks."""
    rows = samples['over_time']
    failures = sum(samples['log'].values())
    minutes = rows[-1]['at_s'] / 60
    return [
        check('growth of resident memory after the warm-up', growth(floor(rows)), '<= 0.02',
              f'of the least in each of {WINDOWS} windows; fitted over the last '
              f'{(1 - WARM_UP) * minutes:.0f} of {minutes:.0f} minutes'),
        check('growth of the queue after the warm-up, in requests', rise(
            after_warm_up(rows, 'queue_depth'))[1], '<= 5',
            'fitted; one percent more than can be answered would be '
            f'{0.01 * samples["rate"] * (1 - WARM_UP) * rows[-1]["at_s"]:.0f}'),
        check('responses per query', samples['responses'] / samples['asked'], '1 to 1',
              f'{samples["asked"]} queries at {samples["rate"]:.2f} per second, '
              f'{samples["cancelled"]} cancelled'),
        check('corrections acknowledged', samples['acknowledged'] / max(samples['corrections'], 1),
              '1 to 1', f'{samples["corrections"]} corrections'),
        check('parameter changes refused', float(samples['changes_refused']), '<= 0',
              f'of {samples["changes"]}'),
        check('errors in the log, and answers that broke off',
              float(failures + len(samples['broken'])), '<= 0',
              '; '.join(samples['broken']) or f'{samples["changes"]} parameter changes')]


def reported(samples: dict[str, Any]) -> list[Reported]:
    """Return the numbers that explain the others."""
    rows = samples['over_time']
    quarter = rows[-max(len(rows) // 4, 1):]
    return [
        Reported('queue in the last quarter, mean', statistics.fmean(
            r['queue_depth'] for r in quarter),
                 note=f'most {max(r["queue_depth"] for r in rows):g}'),
        Reported('SLO attainment', samples['slo_met'] / samples['served'],
                 note=f'of {samples["served"]} answers, at {LOAD} load'),
        Reported('TTFT, p95 ms', percentile(samples['ttft_ms'], 95)),
        Reported('TPOT, p95 ms', percentile(samples['tpot_ms'], 95)),
        Reported('growth of resident memory, fitted through all samples',
                 growth(after_warm_up(rows, 'memory_mb'))),
        Reported('memory at the end, MB', rows[-1]['memory_mb']),
        Reported('share of the time that went into learning', statistics.fmean(
            r['learning_share'] for r in rows)),
        Reported('corrections learned', float(samples['learned']),
                 note=f'{samples["superseded"]} superseded, {samples["failed"]} failed')]


def table(samples: dict[str, Any]) -> Table:
    """Return a row for each tenth of the time."""
    rows = samples['over_time']
    step = max(len(rows) // 10, 1)
    return Table('Over time', ['minutes', 'memory, MB', 'waiting', 'unanswered'],
                 [[r['at_s'] / 60, r['memory_mb'], r['queue_depth'], r['unanswered']]
                  for r in rows[::step]], 'A sample every now and then.')


if __name__ == '__main__':
    main()
