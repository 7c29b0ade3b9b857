# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
What a robot sees of a node under stress, with a real node and real messages.

Two hundred queries in one second, while corrections wait to be learned: does each get its
response, and are other callbacks (a timer of 10 Hz, a parameter that is read) served in time
meanwhile? And a client that watches the node ten times a second: what does it cost? Results:
bench/results/operation.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from bench.learning import LESSONS
from bench.node import NodeProcess, own_domain, PERIOD_S, ROOT
from bench.report import summary
from bench.results import Check, check, paired, percentile, Recorder, Reported, Result, Table
from mace_ros.api.settings import Settings

BURST = 200
LOAD = 8                # answers at once while the cost of watching is measured
LONG = 'Repeat this: こんにちは 🤖'     # what the packaged model repeats without end
START_S, END_S = 250.0, 400.0
WATCH_HZ = 10.0
DEFAULT_HZ = Settings().monitor.rate_hz
COMPUTES = 0.25         # of the time: a thread that runs more than that computes


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    result = argparse.ArgumentParser(prog='python -m bench.operation', description=__doc__.strip())
    add = result.add_argument
    add('--quick', action='store_true', help='two short pairs: says that all runs, not how well')
    add('--pairs', type=int, help='blocks with and without a watching client (default: 9)')
    add('--seconds', type=float, help='length of a block (default: 8)')
    add('--results', type=Path, metavar='FOLDER', help='where to write the results')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    args.pairs = args.pairs or (2 if args.quick else 9)
    args.seconds = args.seconds or (2.0 if args.quick else 8.0)
    recorder = Recorder(vars(args), quick=args.quick)
    own_domain()
    samples: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix='mace-bench-') as folder:
        # One thread computes; who asks and who watches have the other cores.
        with running(Path(folder) / 'watched', {
                'model.threads': 1, 'finetune.budget': 0.0}) as (node, client):
            samples['blocks'] = watched(client, node.pid, args.pairs, args.seconds)
        with running(Path(folder) / 'burst', {}) as (node, client):
            samples['burst'] = burst(client)
            timer = node.stop()
    begin, end = samples['burst'].pop('from'), samples['burst'].pop('until')
    stamps = [t for t in timer if begin - 1.0 <= t <= end]
    samples['burst']['timer_late_ms'] = [
        (later - sooner - PERIOD_S) * 1e3 for sooner, later in pairwise(stamps)]
    result = Result('operation', samples, checks(samples), reported(samples), [table(samples)], [])
    path = recorder.write(result, args.results)
    print(summary(result))
    print(f'\n{path}')


@contextmanager
def running(folder: Path, parameters: dict[str, Any]) -> Iterator[tuple[NodeProcess, Any]]:
    """Start a node, and a client of it once it is ready."""
    from mace_ros.ros.client import MaceClient

    folder.mkdir()
    node = NodeProcess(folder, parameters)
    try:
        with MaceClient() as client:
            client.wait_until_ready(START_S)
            yield node, client
    except BaseException:
        print(node.log, file=sys.stderr)
        raise
    finally:
        node.kill()


def burst(client: Any) -> dict[str, Any]:
    """
    Ask so many questions within a second; read a parameter again and again meanwhile.

    Before, correct so much that learning has something to do until the end.
    """
    from mace_ros.msg import Response
    from rcl_interfaces.srv import GetParameters

    service = client.node.create_client(GetParameters, '/mace/get_parameters')
    if not service.wait_for_service(30.0):
        raise TimeoutError('the node has no parameter service')
    request = GetParameters.Request(names=['slo.ttft_ms'])
    reads: list[float] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            answered = threading.Event()
            asked = time.monotonic()
            service.call_async(request).add_done_callback(
                lambda _, event=answered: event.set())
            if not answered.wait(30.0):
                raise TimeoutError('a parameter was not read')
            reads.append((time.monotonic() - asked) * 1e3)
            time.sleep(0.02)

    for lesson in json.loads(LESSONS.read_text())['corrections']:
        client.correct(lesson['answer'], prompt=lesson['question'])
    reader = threading.Thread(target=read)
    begun = time.monotonic()
    reader.start()
    answers = []
    for n in range(BURST):
        time.sleep(max(0.0, begun + n / BURST - time.monotonic()))
        answers.append(client.ask(f'Say {n}.', max_tokens=8, no_learn=True))
    asked_s = time.monotonic() - begun
    responses = [a.result(END_S) for a in answers]
    ended = time.monotonic()
    done.set()
    reader.join()
    client.node.destroy_client(service)
    served = sum(r.finish_reason in (Response.STOP, Response.LENGTH) for r in responses)
    refused = sum(r.finish_reason == Response.REJECTED and bool(r.error) for r in responses)
    print(f'{served} of {BURST} queries served, {refused} rejected with a reason', flush=True)
    return {'from': begun, 'until': ended, 'asked_s': asked_s, 'seconds': ended - begun,
            'served': served, 'rejected': refused, 'parameter_ms': reads}


def watched(client: Any, pid: int, pairs: int, seconds: float) -> list[dict[str, Any]]:
    """
    Return what came of blocks, each with and without a client that watches.

    Tokens per second, and the share of time that the node's threads ran which don't compute.
    """
    blocks = []
    tokens_per_s(client, seconds)     # to warm up
    for pair in range(pairs):
        # Whoever comes first is another one each time: what drifts, drifts for both.
        for watching in ((False, True) if pair % 2 else (True, False)):
            set_parameter(client, 'monitor.rate_hz', WATCH_HZ if watching else DEFAULT_HZ)
            monitor = start_monitor() if watching else None
            before, begun = thread_seconds(pid), time.monotonic()
            try:
                rate = tokens_per_s(client, seconds)
            finally:
                spent = time.monotonic() - begun
                after = thread_seconds(pid)
                if monitor is not None:
                    monitor.kill()
                    monitor.wait()
            shares = [(s - before.get(t, 0.0)) / spent for t, s in after.items()]
            blocks.append({'pair': pair, 'watching': watching, 'tokens_per_s': rate,
                           'beside': sum(share for share in shares if share < COMPUTES)})
            print(f'{"watched" if watching else "alone"}: {rate:.1f} tokens/s', flush=True)
    return blocks


def thread_seconds(pid: int) -> dict[str, float]:
    """Return the seconds that each thread of a process has run."""
    ticks = os.sysconf('SC_CLK_TCK')
    found = {}
    for stat in Path(f'/proc/{pid}/task').glob('*/stat'):
        with suppress(OSError):     # it has ended
            fields = stat.read_text().rpartition(')')[2].split()
            found[stat.parent.name] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def set_parameter(client: Any, name: str, value: float) -> None:
    """Set a parameter of the node."""
    from rcl_interfaces.srv import SetParameters
    from rclpy.parameter import Parameter

    service = client.node.create_client(SetParameters, '/mace/set_parameters')
    service.wait_for_service(30.0)
    answered = threading.Event()
    done = service.call_async(SetParameters.Request(parameters=[
        Parameter(name, value=value).to_parameter_msg()]))
    done.add_done_callback(lambda _: answered.set())
    if not answered.wait(30.0) or not all(r.successful for r in done.result().results):
        raise RuntimeError(f'{name} could not be set')
    client.node.destroy_client(service)


def start_monitor() -> subprocess.Popen[str]:
    """Start the program that watches, and return once it does."""
    process = subprocess.Popen(
        [sys.executable, '-u', '-m', 'mace_ros.cli.monitor'], cwd=ROOT,
        stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        if not process.stdout.readline():
            raise RuntimeError('mace_monitor ended')
    threading.Thread(target=process.stdout.read, daemon=True).start()
    return process


def tokens_per_s(client: Any, seconds: float) -> float:
    """Return how fast the node writes several long answers at once."""
    answers = [client.ask(LONG, max_tokens=2000, no_learn=True, ttft_slo_ms=6e5, tpot_slo_ms=6e5)
               for _ in range(LOAD)]
    for answer in answers:
        next(answer.stream(END_S))
    time.sleep(0.5)
    begun, before = time.monotonic(), sum(len(a.chunks) for a in answers)
    time.sleep(seconds)
    spent, chunks = time.monotonic() - begun, sum(len(a.chunks) for a in answers) - before
    for answer in answers:
        answer.cancel()
    responses = [a.result(END_S) for a in answers]
    tokens = sum(r.output_tokens for r in responses)
    # An emoji has several tokens, and comes as one chunk.
    return chunks / spent * tokens / sum(len(a.chunks) for a in answers)


# -- what the samples say ----------------------------------------------------------------


def checks(samples: dict[str, Any]) -> list[Check]:
    """Return the checks."""
    burst_, ratio = samples['burst'], watching_ratio(samples)
    return [
        check('responses to 200 queries in one second',
              float(burst_['served'] + burst_['rejected']), f'>= {BURST}',
              f'{burst_["served"]} served, {burst_["rejected"]} rejected with a reason; asked '
              f'within {burst_["asked_s"]:.2f} s, answered within {burst_["seconds"]:.0f} s'),
        check('10 Hz timer meanwhile, p99 ms too late',
              percentile([abs(x) for x in burst_['timer_late_ms']], 99), '<= 100',
              f'{len(burst_["timer_late_ms"])} calls in the node itself'),
        check('parameter read meanwhile, p99 ms', percentile(burst_['parameter_ms'], 99),
              '<= 100', f'{len(burst_["parameter_ms"])} reads by another process'),
        check('throughput with a client that watches at 10 Hz', ratio.median, '>= 0.99',
              ratio.spread),
        check('time of the node for it, of one core', statistics.median(watching_costs(samples)),
              '<= 0.01', 'of the threads that do not compute, with and without; median of '
              f'{len(watching_costs(samples))} pairs, most {max(watching_costs(samples)):.2g}')]


def watching_costs(samples: dict[str, Any]) -> list[float]:
    """Return by how much longer, of each second, the node's other threads ran when watched."""
    by = {(b['pair'], b['watching']): b['beside'] for b in samples['blocks']}
    return [beside - by[pair, False] for (pair, watching), beside in by.items() if watching]


def watching_ratio(samples: dict[str, Any]) -> Any:
    """Return throughput with a watching client, divided by that without."""
    by = {watching: {b['pair']: b['tokens_per_s'] for b in samples['blocks']
                     if b['watching'] is watching} for watching in (True, False)}
    return paired(by[True], by[False])


def reported(samples: dict[str, Any]) -> list[Reported]:
    """Return the numbers that explain the others."""
    late = [abs(x) for x in samples['burst']['timer_late_ms']]
    reads = samples['burst']['parameter_ms']
    return [
        Reported('10 Hz timer, most ms too late', max(late, default=None)),
        Reported('parameter read, median ms', statistics.median(reads)),
        Reported('tokens per second, nobody watching', statistics.median(
            b['tokens_per_s'] for b in samples['blocks'] if not b['watching']))]


def table(samples: dict[str, Any]) -> Table:
    """Return a row for each pair of blocks."""
    by = {(b['pair'], b['watching']): b['tokens_per_s'] for b in samples['blocks']}
    return Table('Tokens per second', ['pair', 'alone', 'watched at 10 Hz'],
                 [[str(p), by[p, False], by[p, True]] for p in sorted({p for p, _ in by})])


if __name__ == '__main__':
    main()
