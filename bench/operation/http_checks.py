# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The checks of barge-in and of OpenAI's API over HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
import random
import statistics
from typing import Any

from bench.common.results import Check, check, paired, percentile, Ratio, Reported, Table
from bench.operation.http import CANCEL_S, CLIENTS, OTHERS, Row
from bench.operation.slow_readers import BUFFERED_KB, READERS
from bench.systems import interruptions

RESAMPLES = 1000        # of the bootstrap
WAYS = {'topic': 'from cancel to the last chunk', 'http': 'from disconnect to the response'}

Samples = Mapping[str, Any]


def checks(samples: Samples) -> list[Check]:
    """Return the checks of the parts that were measured."""
    found = []
    for way, name in WAYS.items() if 'barge_in' in samples else ():
        ended = ended_ms(samples, way)
        found += [
            check(f'{name}, p99 ms', percentile(ended, 99), '<= 150',
                  f'{len(ended)} interrupted answers beside {interruptions.OTHERS} others; '
                  f'{learned(samples, way):.0%} of them while corrections were learned'),
            check(f'{name}, median in iterations', percentile(in_iterations(samples, way), 50),
                  '<= 1', 'over the time per token of the same answer')]
    if 'first_tokens' in samples:
        times = [row for row in samples['first_tokens'] if row['others']]
        found.append(check(
            'TTFT p50 over HTTP minus over the topic, ms', difference(times), '<= 5',
            f'{len(times)} answers each way in turn, beside {OTHERS} others: {spread(times)}'))
    if 'saturated' in samples:
        saturated = samples['saturated']
        found.append(check(
            f'errors of {CLIENTS} concurrent HTTP clients, other than 429',
            float(sum(n for outcome, n in saturated.items() if outcome not in ('200', '429'))),
            '<= 0', counted(saturated)))
    if 'slow_readers' in samples:
        found += slow_checks(samples)
    if 'fuzzed' in samples:
        fuzzed = samples['fuzzed']
        found += [
            check('fuzzed bodies after which the server was at fault', float(
                fuzzed['faults'] + fuzzed['tracebacks'] + (not fuzzed['running'])), '<= 0',
                f'{sum(fuzzed["outcomes"].values())} bodies within {fuzzed["seconds"]:.0f} s: '
                f'{counted(fuzzed["outcomes"])}'),
            check('fuzzed bodies without a reply in time',
                  float(fuzzed['outcomes'].get('cancelled', 0)), '<= 10',
                  f'{CANCEL_S:g} s, after which the client disconnects'),
            check('errors that the node logged meanwhile', float(len(fuzzed['errors'])), '<= 0'),
            check('status of a chat after them', float(fuzzed['afterwards']), '200 to 200')]
    return found


def slow_checks(samples: Samples) -> list[Check]:
    """Return the checks of slow readers."""
    unread = min(kb for row in samples['slow_readers'] if row['slow'] for kb in row['unread_kb'])
    beside = f'beside {READERS} streams that read a byte every 0.2 s, over beside quick ones'
    pieces, first = slow_ratio(samples, 'piece_ms'), slow_ratio(samples, 'ttft_ms')
    return [
        check('time per token of others, slow readers / quick ones', pieces.median, '<= 1.05',
              f'{READERS} streams, {beside}; {pieces.spread}'),
        check('TTFT p50 of others, slow readers / quick ones', first.median, '<= 1.1',
              f'{beside}; {first.spread}'),
        check('KB that a slow reader left unread, least', unread, f'>= {BUFFERED_KB}',
              'more than the buffers on the way hold')]


def slow_ratio(samples: Samples, name: str) -> Ratio:
    """Return a median time beside slow readers over the one beside quick ones, per pair."""
    def median(value: Any) -> float:
        return statistics.median(value) if isinstance(value, list) else value

    by = {slow: {row['pair']: median(row[name]) for row in samples['slow_readers']
                 if row['slow'] is slow} for slow in (True, False)}
    return paired(by[True], by[False])


def ended_ms(samples: Samples, way: str) -> list[float]:
    """Return the milliseconds from the interruption to the end of each answer."""
    name = 'silent_ms' if way == 'topic' else 'released_ms'
    return [row[name] for row in rows_of(samples, way)]


def in_iterations(samples: Samples, way: str) -> list[float]:
    """Return the same in iterations, for answers of which more than one token was written."""
    return [ended / row['tpot_ms'] for ended, row in zip(
        ended_ms(samples, way), rows_of(samples, way), strict=True) if row['tpot_ms']]


def rows_of(samples: Samples, way: str) -> list[Row]:
    """Return the samples of one way to interrupt an answer."""
    return [row for row in samples['barge_in'] if row['way'] == way]


def learned(samples: Samples, way: str) -> float:
    """Return the share of interruptions during which corrections were being learned."""
    return statistics.mean(row['learned'] for row in rows_of(samples, way))


def difference(rows: list[Row]) -> float:
    """Return the difference of the medians."""
    return (percentile((row['http_ms'] for row in rows), 50)
            - percentile((row['topic_ms'] for row in rows), 50))


def interval(rows: list[Row]) -> str:
    """Return the 95 % bootstrap interval of the difference of the medians, as text."""
    chance = random.Random(1)
    found = [difference(chance.choices(rows, k=len(rows))) for _ in range(RESAMPLES)]
    return f'{percentile(found, 2.5):.1f} to {percentile(found, 97.5):.1f} ms'


def spread(rows: list[Row]) -> str:
    """Return the medians and quartiles of both ways, and how sure their difference is, as text."""
    parts = []
    for way in ('http', 'topic'):
        low, median, high = (percentile((row[f'{way}_ms'] for row in rows), p)
                             for p in (25, 50, 75))
        parts.append(f'{way} {median:.1f} ms ({low:.1f} to {high:.1f})')
    return f'{" and ".join(parts)}; 95 % interval of the difference {interval(rows)}'


def counted(outcomes: dict[str, int]) -> str:
    """Return how often each outcome occurred, as text."""
    return ', '.join(f'{count} x {outcome}' for outcome, count in Counter(outcomes).most_common())


def reported(samples: Samples) -> list[Reported]:
    """Return numbers without a target that explain the checks."""
    found = []
    for way, name in WAYS.items() if 'barge_in' in samples else ():
        iteration = [row['tpot_ms'] for row in rows_of(samples, way)]
        found += [
            Reported(f'{name}, median ms', percentile(ended_ms(samples, way), 50),
                     'within an iteration',
                     f'an iteration takes {percentile(iteration, 50):.0f} ms (median; p99 '
                     f'{percentile(iteration, 99):.0f} ms)'),
            Reported(f'{name}, p99 in iterations', percentile(in_iterations(samples, way), 99),
                     note='the cancellation waits for the end of an iteration, and its way to the '
                     'node and back is counted as well')]
    if 'first_tokens' in samples:
        idle, busy = ([row for row in samples['first_tokens'] if bool(row['others']) is others]
                      for others in (False, True))
        found += [
            Reported('TTFT p50 over HTTP minus over the topic, ms, nothing else asked',
                     difference(idle), '<= 5', f'{spread(idle)}; {len(idle)} answers each way'),
            Reported('TTFT over HTTP minus over the topic, ms, median of the pairs',
                     statistics.median(row['http_ms'] - row['topic_ms'] for row in busy))]
    if 'fuzzed' in samples:
        slowest = samples['fuzzed']['slowest'][0]
        found.append(Reported('slowest fuzzed body, seconds', slowest[0],
                              note=f'{slowest[1]}, {slowest[3]} bytes: {slowest[4][:80]}'))
    return found


def tables(samples: Samples) -> list[Table]:
    """Return the table with a row for each pair of blocks."""
    by = {(row['pair'], row['slow']): row for row in samples.get('slow_readers', ())}
    if not by:
        return []
    return [Table(
        'Others beside slow readers', [
            'pair', *(f'{name}, {way}' for name in ('ms per piece of text', 'TTFT p50, ms')
                      for way in ('read at once', 'read slowly')), 'KB unread'],
        [[str(pair), *(by[pair, slow]['piece_ms'] for slow in (False, True)),
          *(statistics.median(by[pair, slow]['ttft_ms']) for slow in (False, True)),
          min(by[pair, True]['unread_kb'])] for pair in sorted({pair for pair, _ in by})])]
