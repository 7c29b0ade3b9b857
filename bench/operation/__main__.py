# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Run the benchmark of a node in operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from bench.common.load import LESSONS
from bench.common.options import Options
from bench.common.results import Check, check, paired, percentile, Ratio, Reported, Result, Table
from bench.common.running import Run, run_benchmark, Samples
import bench.operation
from bench.operation import http_checks
from bench.systems.interruptions import interruptions, LONG
from bench.systems.node import isolate, NodeProcess, PERIOD_S, ROOT, START_S
from bench.systems.openai_server import OpenAIServer
from mace_ros.api.settings import Settings

BURST = 200
LOAD = 8                # concurrent responses while the cost of watching is measured
RESPONSE_S = 400.0      # at most, for a response
SERVICE_S = 30.0        # at most, for a service call
WATCH_HZ = 10.0
DEFAULT_HZ = Settings().monitor.rate_hz
# The node computes with one thread; server and clients have the other cores. Its queue is short
# enough for 32 clients to fill.
HTTP_PARAMETERS = {'model.threads': 1, 'finetune.budget': 0.0, 'scheduler.max_queue': 8}
COMPUTE_SHARE = 0.25    # of the time: a thread that runs more than this is a compute thread


def options() -> Options:
    """Return the options."""
    result = Options('operation', bench.operation.__doc__, quick='two short pairs')
    result.parts(tuple(PARTS), '--parts', '--only')
    result.size('--pairs', 9, 2, 'pairs of blocks with and without a watching client; half as '
                'many beside slow readers')
    result.size('--seconds', 8.0, 2.0, 'length of a block')
    result.size('--interruptions', 200, 5,
                'answers that are cancelled as they are spoken, over the topic and over HTTP, each')
    result.size('--asked', 600, 4, 'questions over HTTP and over the topic, each')
    result.size('--bodies', 10_000, 200, 'fuzzed bodies')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, evaluate=evaluate,
                  prepare=lambda _: isolate())


def measure(run: Run) -> Samples:
    """Run the selected parts; return their samples, with the last ones of the other parts."""
    samples = {} if set(run.args.parts) == set(PARTS) else run.earlier('operation')
    for part in run.args.parts:
        run.say(part)
        begun = run.minutes
        samples |= PARTS[part](run)
        run.say(f'{part} took {run.minutes - begun:.1f} minutes')
    return samples


def evaluate(samples: Samples, run: Run) -> Result:
    """Return the results of the samples."""
    return Result('operation', samples, checks(samples) + http_checks.checks(samples),
                  reported(samples) + http_checks.reported(samples),
                  tables(samples) + http_checks.tables(samples))


# -- the parts -----------------------------------------------------------------------------


def measure_watched(run: Run) -> Samples:
    """Measure what a watching client costs."""
    # The node computes with one thread; the clients have the other cores.
    with running(run.folder / 'watched', {
            'model.threads': 1, 'finetune.budget': 0.0}) as (node, client):
        return {'blocks': watched_blocks(client, node.pid, run.args.pairs, run.args.seconds)}


def measure_interrupted(run: Run) -> Samples:
    """Measure how soon an interrupted answer ends."""
    with serving(run.folder / 'interrupted', {}) as (_, client, server):
        return {'barge_in': interruptions(client, server.port, run.args.interruptions)}


def measure_burst(run: Run) -> Samples:
    """Measure 200 queries in one second."""
    with running(run.folder / 'burst', {}) as (node, client):
        burst, begun, ended = run_burst(client)
        stamps = [t for t in node.stop() if begun - 1.0 <= t <= ended]
    burst['timer_late_ms'] = [
        (later - sooner - PERIOD_S) * 1e3 for sooner, later in pairwise(stamps)]
    return {'burst': burst}


def measure_http(run: Run) -> Samples:
    """Measure the latency that HTTP adds, and saturation."""
    from bench.operation import http

    with serving(run.folder / 'http', HTTP_PARAMETERS) as (_, client, server):
        first_tokens = http.first_tokens(client, server.port, run.args.asked)
        run.say('saturation')
        return {'first_tokens': first_tokens,
                'saturated': dict(http.saturate(server.port, 2 * run.args.seconds))}


def measure_slow_readers(run: Run) -> Samples:
    """Measure what slow readers cost the others."""
    from bench.operation.slow_readers import slow_readers

    with serving(run.folder / 'slow_readers', HTTP_PARAMETERS) as (_, client, server):
        return {'slow_readers': slow_readers(
            client, server.port, (run.args.pairs + 1) // 2, run.args.seconds)}


def measure_fuzzed(run: Run) -> Samples:
    """Send fuzzed bodies."""
    from bench.operation import http

    with serving(run.folder / 'fuzzed', {
            **HTTP_PARAMETERS, 'generation.max_tokens': 2}) as (node, _, server):
        fuzzed = http.fuzz(server, run.args.bodies)
        fuzzed['errors'] = node.error_lines
        print(*fuzzed['errors'], sep='\n', flush=True)
        return {'fuzzed': fuzzed}


@contextmanager
def running(folder: Path, parameters: dict[str, Any]) -> Iterator[tuple[NodeProcess, Any]]:
    """Start a node and, once it is ready, yield it with a client."""
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


@contextmanager
def serving(folder: Path,
            parameters: dict[str, Any]) -> Iterator[tuple[NodeProcess, Any, OpenAIServer]]:
    """Start a node and a server; yield them with a client once they are ready."""
    with running(folder, parameters) as (node, client):
        server = OpenAIServer(folder)
        try:
            server.wait_until_ready()
            yield node, client, server
        except BaseException:
            print(server.log, file=sys.stderr)
            raise
        finally:
            server.kill()


def run_burst(client: Any) -> tuple[dict[str, Any], float, float]:
    """
    Ask :data:`BURST` questions within a second while a thread reads a parameter repeatedly.

    Enough corrections are sent before that learning lasts until the end. Returns the sample,
    and begin and end of the burst.
    """
    from mace_ros.msg import Response

    for lesson in json.loads(LESSONS.read_text())['corrections']:
        client.correct(lesson['answer'], prompt=lesson['question'])
    with reading_parameter(client) as reads:
        begun = time.monotonic()
        queries = []
        for n in range(BURST):
            time.sleep(max(0.0, begun + n / BURST - time.monotonic()))
            queries.append(client.ask(f'Say {n}.', max_tokens=8, no_learn=True))
        asked_s = time.monotonic() - begun
        responses = [q.result(RESPONSE_S) for q in queries]
        ended = time.monotonic()
    served = sum(r.finish_reason in (Response.STOP, Response.LENGTH) for r in responses)
    rejected = sum(r.finish_reason == Response.REJECTED and bool(r.error) for r in responses)
    print(f'{served} of {BURST} queries served, {rejected} rejected with a reason', flush=True)
    return {'asked_s': asked_s, 'seconds': ended - begun, 'served': served,
            'rejected': rejected, 'parameter_ms': reads}, begun, ended


@contextmanager
def reading_parameter(client: Any) -> Iterator[list[float]]:
    """Read a parameter every 20 ms in a thread; the list gets the milliseconds of each read."""
    from rcl_interfaces.srv import GetParameters

    service = client.node.create_client(GetParameters, '/mace/get_parameters')
    if not service.wait_for_service(SERVICE_S):
        raise TimeoutError('the node has no parameter service')
    request = GetParameters.Request(names=['slo.ttft_ms'])
    reads: list[float] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            answered = threading.Event()
            called_at = time.monotonic()
            service.call_async(request).add_done_callback(
                lambda _, event=answered: event.set())
            if not answered.wait(SERVICE_S):
                raise TimeoutError('a parameter was not read')
            reads.append((time.monotonic() - called_at) * 1e3)
            time.sleep(0.02)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield reads
    finally:
        done.set()
        reader.join()
        client.node.destroy_client(service)


def watched_blocks(client: Any, pid: int, pairs: int, seconds: float) -> list[dict[str, Any]]:
    """
    Return rows of blocks with and without a client that watches the node.

    A row has the tokens per second, and the share of a core that the threads of the node take
    that do not compute.
    """
    blocks = []
    tokens_per_s(client, seconds)     # warm-up
    for pair in range(pairs):
        # The order alternates, so that a drift of the machine affects both alike.
        for watching in ((False, True) if pair % 2 else (True, False)):
            set_parameter(client, 'monitor.rate_hz', WATCH_HZ if watching else DEFAULT_HZ)
            monitor = start_monitor() if watching else None
            before, begun = thread_seconds(pid), time.monotonic()
            try:
                rate = tokens_per_s(client, seconds)
            finally:
                elapsed = time.monotonic() - begun
                after = thread_seconds(pid)
                if monitor is not None:
                    monitor.kill()
                    monitor.wait()
            shares = [(s - before.get(t, 0.0)) / elapsed for t, s in after.items()]
            blocks.append({'pair': pair, 'watching': watching, 'tokens_per_s': rate,
                           'beside': sum(share for share in shares if share < COMPUTE_SHARE)})
            print(f'{"watched" if watching else "alone"}: {rate:.1f} tokens/s', flush=True)
    return blocks


def thread_seconds(pid: int) -> dict[str, float]:
    """Return the CPU seconds of each thread of a process."""
    ticks = os.sysconf('SC_CLK_TCK')
    found = {}
    for stat in Path(f'/proc/{pid}/task').glob('*/stat'):
        with suppress(OSError):     # the thread has ended
            fields = stat.read_text().rpartition(')')[2].split()
            found[stat.parent.name] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def set_parameter(client: Any, name: str, value: float | int) -> None:
    """Set a parameter of the node."""
    from rcl_interfaces.srv import SetParameters
    from rclpy.parameter import Parameter

    service = client.node.create_client(SetParameters, '/mace/set_parameters')
    service.wait_for_service(SERVICE_S)
    answered = threading.Event()
    done = service.call_async(SetParameters.Request(parameters=[
        Parameter(name, value=value).to_parameter_msg()]))
    done.add_done_callback(lambda _: answered.set())
    if not answered.wait(SERVICE_S) or not all(r.successful for r in done.result().results):
        raise RuntimeError(f'{name} could not be set')
    client.node.destroy_client(service)


def start_monitor() -> subprocess.Popen[str]:
    """Start mace_monitor; return once it prints."""
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
    """Return the throughput of :data:`LOAD` long concurrent responses."""
    queries = [client.ask(LONG, max_tokens=2000, no_learn=True, ttft_slo_ms=6e5, tpot_slo_ms=6e5)
               for _ in range(LOAD)]
    for query in queries:
        next(query.stream(RESPONSE_S))
    time.sleep(0.5)
    begun, before = time.monotonic(), sum(len(q.chunks) for q in queries)
    time.sleep(seconds)
    elapsed, chunks = time.monotonic() - begun, sum(len(q.chunks) for q in queries) - before
    for query in queries:
        query.cancel()
    tokens = sum(q.result(RESPONSE_S).output_tokens for q in queries)
    # A chunk may have several tokens, as an emoji does.
    return chunks / elapsed * tokens / sum(len(q.chunks) for q in queries)


# -- checks ------------------------------------------------------------------------------


def checks(samples: dict[str, Any]) -> list[Check]:
    """Return the checks of the parts that were measured."""
    found = []
    if burst := samples.get('burst'):
        found += [
            check('responses to 200 queries in one second',
                  float(burst['served'] + burst['rejected']), f'>= {BURST}',
                  f'{burst["served"]} served, {burst["rejected"]} rejected with a reason; asked '
                  f'within {burst["asked_s"]:.2f} s, answered within {burst["seconds"]:.0f} s'),
            check('10 Hz timer meanwhile, p99 ms too late',
                  percentile([abs(x) for x in burst['timer_late_ms']], 99), '<= 100',
                  f'{len(burst["timer_late_ms"])} calls in the node itself'),
            check('parameter read meanwhile, p99 ms', percentile(burst['parameter_ms'], 99),
                  '<= 100', f'{len(burst["parameter_ms"])} reads by another process')]
    if samples.get('blocks'):
        ratio, costs = watching_ratio(samples), watching_costs(samples)
        found += [
            check('throughput with a client that watches at 10 Hz', ratio.median, '>= 0.99',
                  ratio.spread),
            check('time of the node for it, of one core', statistics.median(costs), '<= 0.01',
                  'threads that do not compute, with a watching client minus without; median of '
                  f'{len(costs)} pairs, largest {max(costs):.2g}')]
    return found


def watching_costs(samples: dict[str, Any]) -> list[float]:
    """Return the share of a core that watching adds to the node's other threads, per pair."""
    by = {(b['pair'], b['watching']): b['beside'] for b in samples['blocks']}
    return [beside - by[pair, False] for (pair, watching), beside in by.items() if watching]


def watching_ratio(samples: dict[str, Any]) -> Ratio:
    """Return the throughput with a watching client over the throughput without, per pair."""
    by = {watching: {b['pair']: b['tokens_per_s'] for b in samples['blocks']
                     if b['watching'] is watching} for watching in (True, False)}
    return paired(by[True], by[False])


def reported(samples: dict[str, Any]) -> list[Reported]:
    """Return numbers without a target that explain the checks."""
    found = []
    if burst := samples.get('burst'):
        late = [abs(x) for x in burst['timer_late_ms']]
        found += [
            Reported('10 Hz timer, most ms too late', max(late, default=None)),
            Reported('parameter read, median ms', statistics.median(burst['parameter_ms']))]
    if blocks := samples.get('blocks'):
        found.append(Reported('tokens per second, nobody watching', statistics.median(
            b['tokens_per_s'] for b in blocks if not b['watching'])))
    return found


def tables(samples: dict[str, Any]) -> list[Table]:
    """Return the table with a row for each pair of blocks."""
    by = {(b['pair'], b['watching']): b['tokens_per_s'] for b in samples.get('blocks', ())}
    return [Table('Tokens per second', ['pair', 'alone', 'watched at 10 Hz'],
                  [[str(p), by[p, False], by[p, True]] for p in sorted({p for p, _ in by})])
            ] if by else []


PARTS = {'watched': measure_watched, 'interrupted': measure_interrupted, 'burst': measure_burst,
         'http': measure_http, 'slow_readers': measure_slow_readers, 'fuzzed': measure_fuzzed}


if __name__ == '__main__':
    main()
