# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A node under load for a long time: queries, corrections, cancellations, parameter changes.

    .venv/bin/python test/soak.py --minutes 30

It ends with 1 if memory grew, a queue grew, a query had no response, or anything failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import os
from pathlib import Path
import random
import statistics
import sys
import tempfile
import time

from graph import ENVIRONMENT
import mace_ros.msg as msg
from mace_ros.msg import CorrectionStatus, Response
from ros_graph import NodeProcess, Recorder, set_parameters

from mace_ros.ros.client import Answer, Learning, MaceClient

LOAD = 0.7              # share of what the node can answer
WARM_UP = 0.25          # share of the time after which memory is to be flat
RSS_GROWTH = 1.02
CHANGES = (
    {'finetune.budget': 0.5}, {'finetune.budget': 1.0}, {'scheduler.max_requests': 4},
    {'scheduler.max_requests': 16}, {'slo.ttft_ms': 300.0}, {'slo.ttft_ms': 500.0},
    {'generation.temperature': 0.5}, {'generation.temperature': 0.0})


class Soak:
    """One run, with a client that does everything."""

    def __init__(self, node: NodeProcess, client: MaceClient, seconds: float) -> None:
        self._node, self._client, self._seconds = node, client, seconds
        self._random = random.Random(4)
        self._answers: list[Answer] = []
        self._learning: list[Learning] = []
        self._asked = 0
        self.ended: list[Response] = []
        self.memory: list[tuple[float, int]] = []     # share of the time, resident bytes

    def run(self) -> Iterator[str]:
        """Yield what is not as it should be."""
        interval_s = self._capacity_s() / LOAD
        print(f'{1 / interval_s:.1f} queries per second', flush=True)
        start = due = printed = time.monotonic()
        changed = corrected = start
        with Recorder(self._client, scheduler=msg.Scheduler) as recorder:
            while (now := time.monotonic()) < start + self._seconds:
                if now >= due:
                    due += self._random.expovariate(1 / interval_s)
                    self._ask()
                if now > changed + 2.0:
                    changed = now
                    set_parameters(self._client, self._random.choice(CHANGES))
                    self.memory.append(((now - start) / self._seconds, self._node.memory()))
                if now > corrected + 5.0:
                    corrected = now
                    self._correct()
                if now > printed + 60.0:
                    printed = now
                    print(f'{(now - start) / 60:.0f} min: {self._node.memory() / 1e6:.0f} MB, '
                          f'{len(self.ended)} responses', flush=True)
                self._collect()
                time.sleep(max(0.0, min(due - time.monotonic(), 0.02)))
        yield from self._judge(recorder.of(msg.Scheduler))

    def _capacity_s(self) -> float:
        """Return the time of a query when many are answered together."""
        start = time.monotonic()
        for answer in [self._client.ask('Warm up.', max_tokens=16) for _ in range(32)]:
            answer.result(60.0)
        return (time.monotonic() - start) / 32

    def _ask(self) -> None:
        self._asked += 1
        answer = self._client.ask(
            f'Question {self._random.randrange(200)}?', max_tokens=self._random.choice((4, 16, 32)),
            conversation_id=self._random.choice(('', '', 'a', 'b')))
        self._answers.append(answer)
        if self._random.random() < 0.05:
            answer.cancel()

    def _correct(self) -> None:
        self._learning.append(self._client.correct(
            f'Answer {self._random.randrange(1000)}.',
            prompt=f'Question {self._random.randrange(20)}?'))

    def _collect(self) -> None:
        self.ended += [a.response for a in self._answers if a.is_complete()]
        self._answers = [a for a in self._answers if not a.is_complete()]

    def _judge(self, samples: list[msg.Scheduler]) -> Iterator[str]:
        end = time.monotonic() + 60.0
        while self._answers and time.monotonic() < end:
            self._collect()
            time.sleep(0.05)
        if self._answers or len(self.ended) != self._asked:
            yield f'{len(self.ended)} responses to {self._asked} queries'
        reasons = {r.error for r in self.ended if r.finish_reason == Response.ERROR}
        if reasons:
            yield f'answers broke off: {reasons}'
        refused = [s for one in self._learning for s in one.statuses
                   if s.state == CorrectionStatus.REJECTED]
        if refused or any(not one.statuses for one in self._learning):
            yield 'corrections were not accepted'
        if 'Traceback' in self._node.log:
            yield 'an exception was not handled'
        warm = [memory for share, memory in self.memory if share >= WARM_UP]
        half = len(warm) // 2
        grown = statistics.median(warm[half:]) / statistics.median(warm[:half])
        if grown > RSS_GROWTH:
            yield f'resident memory grew by {grown - 1:.1%}'
        queues = [s.queue_depth for s in samples]
        if statistics.fmean(queues[-len(queues) // 4:]) > 10:
            yield f'the queue is {queues[-1]} long'
        served = [r for r in self.ended if r.finish_reason in (Response.STOP, Response.LENGTH)]
        print(f'{len(self.ended)} responses, {len(served)} served, SLO attainment '
              f'{sum(r.slo_met for r in served) / len(served):.1%}; '
              f'{len(self._learning)} corrections; memory {grown - 1:+.2%}, '
              f'{warm[0] / 1e6:.0f} to {warm[-1] / 1e6:.0f} MB', flush=True)


def main() -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--minutes', type=float, default=30.0)
    parser.add_argument('--model', default='', help='the default is SmolLM2-135M-Instruct')
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        node = NodeProcess(Path(folder), **(
            {'model.source': arguments.model} if arguments.model else {}))
        node.start()
        try:
            with MaceClient() as client:
                client.wait_until_ready(250.0)
                problems = list(Soak(node, client, arguments.minutes * 60).run())
        finally:
            node.kill()
    print('\n'.join(problems) or 'passed')
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
