# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A node under load for a long time: queries, corrections, cancellations, parameter changes.

Queries arrive at random times, at 0.7 of the rate that the node reaches when queries always
wait. After the warm-up, memory and queue must not grow; every query must get its response and
every correction its acknowledgement, without errors. Results: bench/results/soak.json.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
import json
import math
import random
import statistics
import sys
import time
from typing import Any

from bench.common.load import LESSONS
from bench.common.options import Options
from bench.common.results import Check, check, percentile, Reported, Result, Table
from bench.common.running import Run, run_benchmark, Samples
from bench.systems.node import isolate, NodeProcess, START_S
from mace_ros.api.settings import PARAMETERS

LOAD = 0.7              # share of the node's throughput
WARM_UP = 0.25          # share of the time after which memory must be flat
RESPONSE_S = 120.0      # at most, for a response
SERVICE_S = 30.0        # at most, until the parameter service is available
CANCELLED = 0.05        # share of queries
CONTRADICTED = 0.1      # share of corrections with the answer to another question
CALIBRATION_IN_FLIGHT = 16      # queries while the throughput is measured ...
CALIBRATION_QUERIES = 512       # ... over this many; the first half is a warm-up
FILL_WORDS = 500        # words of a question that fills the KV cache
SAMPLE_S, CORRECTION_S, REPORT_S = 2.0, 20.0, 60.0      # between samples and so on
WINDOWS = 8             # after the warm-up; the least memory of each counts
CHANGES: tuple[dict[str, Any], ...] = (
    {'finetune.budget': 0.5}, {'finetune.budget': 1.0}, {'scheduler.max_requests': 12},
    {'scheduler.max_requests': 16}, {'slo.ttft_ms': 400.0}, {'slo.ttft_ms': 500.0},
    {'generation.temperature': 0.5}, {'generation.temperature': 0.0})


def options() -> Options:
    """Return the options."""
    result = Options('soak', __doc__, quick='one minute')
    result.size('--minutes', 30.0, 1.0, 'length of the run')
    result.add('--model', default='', help='model.source (default: the packaged model)')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, evaluate=evaluate,
                  prepare=lambda _: isolate())


def measure(run: Run) -> Samples:
    """Run the node under load; return the samples."""
    from mace_ros.ros.client import MaceClient

    args = run.args
    node = NodeProcess(run.folder, {'model.source': args.model} if args.model else {})
    try:
        with MaceClient() as client:
            client.wait_until_ready(START_S)
            samples = Soak(node, client, args.minutes * 60.0).run()
    except BaseException:
        print(node.log, file=sys.stderr)
        raise
    finally:
        node.kill()
    samples['log'] = dict(node.errors)
    return samples


def evaluate(samples: Samples, run: Run) -> Result:
    """Return the results of the samples."""
    return Result('soak', samples, checks(samples), reported(samples), [table(samples)])


class Soak:
    """A client that asks, cancels, corrects and changes parameters, and the samples."""

    def __init__(self, node: NodeProcess, client: Any, seconds: float) -> None:
        """Prepare a run of ``seconds``; :meth:`run` starts it."""
        from rcl_interfaces.srv import SetParameters

        self._node, self._client, self._seconds = node, client, seconds
        self._random = random.Random(4)
        self._lessons = json.loads(LESSONS.read_text())['corrections']
        self._queries: list[Any] = []           # without a response
        self._responses: list[Any] = []
        self._corrections: list[Any] = []
        self._asked = self._cancelled = 0
        self._changed = self._changes_answered = self._refused = 0
        self._queue_depth, self._planned_mb, self._learning_share = 0, 0.0, 0.0
        self._samples: list[dict[str, float]] = []
        self._parameters = client.node.create_client(SetParameters, '/mace/set_parameters')

    def run(self) -> dict[str, Any]:
        """Run the load; return the samples."""
        from mace_ros.msg import Scheduler

        if not self._parameters.wait_for_service(SERVICE_S):
            raise TimeoutError('the node has no parameter service')
        self._client.node.create_subscription(Scheduler, '/mace/scheduler', self._observe, 100)
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
                    'unanswered': len(self._queries)})
            if now > corrected + CORRECTION_S:
                corrected = now
                self._correct()
            if now > printed + REPORT_S:
                printed = now
                print(f'{(now - start) / 60:.0f} min: {self._samples[-1]["memory_mb"]:.0f} MB, '
                      f'{len(self._responses)} responses, queue {self._queue_depth}', flush=True)
            time.sleep(max(0.0, min(due - time.monotonic(), 0.02)))
        end = time.monotonic() + RESPONSE_S
        while self._queries and time.monotonic() < end:
            self._collect()
            time.sleep(0.05)
        return self._summary(1 / interval_s)

    def _summary(self, rate: float) -> dict[str, Any]:
        from mace_ros.msg import CorrectionStatus, Response

        served = [r for r in self._responses if r.finish_reason in (Response.STOP, Response.LENGTH)]
        states = Counter(s.state for correction in self._corrections
                         for s in correction.statuses)
        return {
            'rate': rate, 'asked': self._asked, 'cancelled': self._cancelled,
            'changes': self._changed,
            'changes_refused': self._refused + self._changed - self._changes_answered,
            'responses': len(self._responses), 'served': len(served),
            'broken': sorted({r.error for r in self._responses
                              if r.finish_reason == Response.ERROR}),
            'slo_met': sum(r.slo_met for r in served),
            'ttft_ms': [r.ttft_ms for r in served], 'tpot_ms': [r.tpot_ms for r in served],
            'corrections': len(self._corrections),
            'acknowledged': states[CorrectionStatus.ACCEPTED],
            'learned': states[CorrectionStatus.LEARNED],
            'superseded': states[CorrectionStatus.SUPERSEDED],
            'failed': states[CorrectionStatus.FAILED], 'over_time': self._samples}

    def _fill_cache(self) -> None:
        """
        Send prompts with as many tokens as the KV cache holds.

        The prefix cache grows until the KV cache is full; with 16,384 tokens that takes 700
        short responses and must not count as growth.
        """
        left = int(PARAMETERS['memory.kv_cache_tokens'].default)
        while left > 0:
            text = ' '.join(str(self._random.randrange(1000)) for _ in range(FILL_WORDS))
            left -= self._client.ask(text, max_tokens=1).result(RESPONSE_S).prompt_tokens

    def _request_s(self) -> float:
        """Return the seconds per query while :data:`CALIBRATION_IN_FLIGHT` are in flight."""
        queries: deque[Any] = deque()
        for i in range(CALIBRATION_QUERIES):
            if i == CALIBRATION_QUERIES // 2:    # warm caches, long conversations
                start = time.monotonic()
            if len(queries) == CALIBRATION_IN_FLIGHT:
                queries.popleft().result(RESPONSE_S)
            queries.append(self._client.ask(**self._question()))
        return (time.monotonic() - start) / (CALIBRATION_QUERIES - CALIBRATION_QUERIES // 2)

    def _question(self) -> dict[str, Any]:
        return {'text': f'Question {self._random.randrange(200)}?',
                'max_tokens': self._random.choice((4, 16, 32)),
                'conversation_id': self._random.choice(('', '', 'a', 'b'))}

    def _ask(self) -> None:
        self._asked += 1
        query = self._client.ask(**self._question())
        self._queries.append(query)
        if self._random.random() < CANCELLED:
            self._cancelled += 1
            query.cancel()

    def _correct(self) -> None:
        """Send one of forty lessons, sometimes with the answer of another one."""
        lesson, other = self._random.choice(self._lessons), self._random.choice(self._lessons)
        wrong = self._random.random() < CONTRADICTED
        self._corrections.append(self._client.correct(
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
        self._changes_answered += 1
        self._refused += sum(not result.successful for result in done.result().results)

    def _collect(self) -> None:
        complete = [q for q in self._queries if q.is_complete()]
        self._responses += [q.response for q in complete]
        self._queries = [q for q in self._queries if q not in complete]

    def _observe(self, message: Any) -> None:
        self._queue_depth = message.queue_depth
        self._planned_mb = message.memory_planned_mb
        self._learning_share = message.learning_share


# -- checks ------------------------------------------------------------------------------


def rise(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return start and rise of the line that fits values over time."""
    if len(points) < 2:
        return math.nan, math.nan
    times, values = zip(*points, strict=True)
    slope, start = statistics.linear_regression(times, values)
    return start + slope * times[0], slope * (times[-1] - times[0])


def growth(points: Sequence[tuple[float, float]]) -> float:
    """Return the relative growth of a value over time, by the fitted line."""
    start, rises = rise(points)
    return rises / start


def after_warm_up(rows: Sequence[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """Return time and value of each sample after the warm-up."""
    return [(r['at_s'], r[name]) for r in rows if r['at_s'] >= WARM_UP * rows[-1]['at_s']]


def floor(rows: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """
    Return time and value of the least resident memory in each window after the warm-up.

    Fine-tune steps and responses hold memory temporarily. Only memory that remains after them
    would fill up a robot.
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
              f'least value of each of {WINDOWS} windows; fitted over the last '
              f'{(1 - WARM_UP) * minutes:.0f} of {minutes:.0f} minutes'),
        check('growth of the queue after the warm-up, in requests', rise(
            after_warm_up(rows, 'queue_depth'))[1], '<= 5',
            'fitted; one percent more arrivals than the node can serve would add '
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
    """Return numbers without a target that explain the checks."""
    rows = samples['over_time']
    quarter = rows[-max(len(rows) // 4, 1):]
    return [
        Reported('queue in the last quarter, mean', statistics.fmean(
            r['queue_depth'] for r in quarter),
                 note=f'most {max(r["queue_depth"] for r in rows):g}'),
        Reported('SLO attainment', samples['slo_met'] / samples['served'],
                 note=f'of {samples["served"]} responses, at {LOAD} load'),
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
    """Return the table with a row for each tenth of the time."""
    rows = samples['over_time']
    step = max(len(rows) // 10, 1)
    return Table('Over time', ['minutes', 'memory, MB', 'waiting', 'unanswered'],
                 [[r['at_s'] / 60, r['memory_mb'], r['queue_depth'], r['unanswered']]
                  for r in rows[::step]], 'Every tenth of the samples.')


if __name__ == '__main__':
    main()
