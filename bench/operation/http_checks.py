# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The checks of OpenAI's API over HTTP, from the samples of :mod:`bench.operation.http`."""

from __future__ import annotations

from collections import Counter
import statistics

from bench.common.results import Check, check, paired, percentile, Ratio, Reported, Table
from bench.operation.http import CLIENTS, OTHERS, READERS, Row


def checks(http: Row) -> list[Check]:
    """Return the checks."""
    times = [row for row in http['first_tokens'] if row['others']]
    saturated, ratio, fuzzed = http['saturated'], slow_ratio(http), http['fuzzed']
    fuzzed_count = sum(fuzzed['outcomes'].values())
    errors = sum(count for outcome, count in saturated.items() if outcome not in ('200', '429'))
    return [
        check('TTFT p50 over HTTP minus over the topic, ms', difference(times), '<= 5',
              f'{len(times)} answers each way in turn, beside {OTHERS} others: '
              f'{spread(times, "http_ms")} and {spread(times, "topic_ms")}'),
        check(f'errors of {CLIENTS} concurrent HTTP clients, other than 429', float(errors),
              '<= 0', counted(saturated)),
        check('text for others beside slow readers / quick ones', ratio.median, '>= 0.95',
              f'{READERS} streams beside as many that read a byte every 0.2 s; {ratio.spread}'),
        check('fuzzed bodies after which the server was at fault', float(
            fuzzed['faults'] + fuzzed['tracebacks'] + (not fuzzed['running'])), '<= 0',
            f'{fuzzed_count} bodies within {fuzzed["seconds"]:.0f} s: '
            f'{counted(fuzzed["outcomes"])}'),
        check('status of a chat after them', float(fuzzed['afterwards']), '200 to 200')]


def difference(rows: list[Row]) -> float:
    """Return the difference of the medians."""
    return (percentile((row['http_ms'] for row in rows), 50)
            - percentile((row['topic_ms'] for row in rows), 50))


def spread(rows: list[Row], name: str) -> str:
    """Return median and quartiles as text."""
    low, median, high = (percentile((row[name] for row in rows), p) for p in (25, 50, 75))
    return f'{name.partition("_")[0]} {median:.1f} ms ({low:.1f} to {high:.1f})'


def counted(outcomes: dict[str, int]) -> str:
    """Return how often each outcome occurred, as text."""
    return ', '.join(f'{count} x {outcome}' for outcome, count in Counter(outcomes).most_common())


def slow_ratio(http: Row) -> Ratio:
    """Return the rate of text beside slow readers over the rate beside quick ones, per pair."""
    by = {slow: {row['pair']: row['pieces_per_s'] for row in http['slow_readers']
                 if row['slow'] is slow} for slow in (True, False)}
    return paired(by[True], by[False])


def reported(http: Row) -> list[Reported]:
    """Return numbers without a target that explain the checks."""
    idle = [row for row in http['first_tokens'] if not row['others']]
    return [
        Reported('TTFT p50 over HTTP minus over the topic, ms, nothing else asked',
                 difference(idle), note=f'{spread(idle, "http_ms")} and '
                 f'{spread(idle, "topic_ms")}; {len(idle)} answers each way'),
        Reported('TTFT over HTTP minus over the topic, ms, median of the pairs',
                 statistics.median(row['http_ms'] - row['topic_ms']
                                   for row in http['first_tokens'] if row['others']))]


def tables(http: Row) -> list[Table]:
    """Return the table with a row for each pair of blocks."""
    by = {(row['pair'], row['slow']): row['pieces_per_s'] for row in http['slow_readers']}
    return [Table(f'Pieces of text per second for {READERS} clients',
                  ['pair', 'others read at once', 'others read slowly'],
                  [[str(p), by[p, False], by[p, True]] for p in sorted({p for p, _ in by})])]
