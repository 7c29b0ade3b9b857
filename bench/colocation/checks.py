# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Checks, numbers and the table of the colocation benchmark."""

from __future__ import annotations

from collections.abc import Mapping
import math
from statistics import median
from typing import Any

from bench.common.results import Check, check, paired, percentile, Ratio, Reported, Table

Samples = Mapping[str, Any]

SPLIT = 'hf_peft_split'

# The systems and their descriptions.
SYSTEMS = {
    'mace': 'mace_ros, learning in the time that serving does not need',
    'inference_only': 'mace_ros without learning',
    'continuous': 'mace_ros, undivided steps alternate with inference, half of the time each',
    'periodic': 'mace_ros, retraining of 8 steps every 20 s while serving stops',
    'static_split': 'mace_ros, half of the time for learning',
    SPLIT: 'HF generate and PEFT training, each in a process with half of the threads',
    'hf_generate': 'HF generate alone',
    'hf_continuous_batching': 'continuous batching of transformers alone',
    'llama_cpp': 'llama.cpp alone',
}
OURS = ('mace', 'inference_only', 'continuous', 'periodic', 'static_split')


def checks(samples: Samples) -> list[Check]:
    """Return the checks, each computed from ``samples``."""
    def ratio(what: str, above: str, below: str, target: str) -> Check:
        column, percent = what.split()
        found = latency_ratio(samples, above, below, f'{column.lower()}_ms', float(percent[1:]))
        return check(f'{what}, {above} / {below}', found.median, target, found.spread)

    waits = [r['wait_ms'] for r in samples['waits'] if r['system'] == 'mace']
    errors = prediction_errors(samples)
    busy_alone = _shares(samples, 'inference_only')
    busy = _shares(samples, 'mace')
    of_idle = of_idle_time(samples, 'engine')
    against_split = paired(finetune_rates(samples, 'mace'), finetune_rates(samples, SPLIT))
    return [
        ratio('TTFT p95', 'mace', 'inference_only', '<= 1.15'),
        ratio('TTFT p95', 'mace', 'continuous', '<= 0.37'),
        ratio('TPOT p95', 'mace', 'inference_only', '<= 1.15'),
        ratio('TPOT p95', 'mace', 'continuous', '<= 0.7'),
        check('fine-tune tokens/s of mace / what the idle time of inference_only could yield',
              of_idle.median, '>= 0.8', of_idle.spread),
        check('device busy, mace', busy.median, '>= 0.95', busy.spread),
        ratio('TTFT p95', 'mace', SPLIT, '<= 0.2'),
        ratio('TPOT p50', 'mace', SPLIT, '<= 0.6'),
        check(f'fine-tune tokens/s, mace / {SPLIT}', against_split.median, '>= 0.8',
              against_split.spread),
        check('wait of an arriving query for fine-tuning, mace, p99 ms', percentile(waits, 99),
              '<= 60', f'{len(waits)} queries, longest {max(waits, default=math.nan):.3g} ms'),
        check('plan() with 64 requests in flight, made again at once, p99 us of CPU time',
              percentile(samples['replans'], 99), '<= 200',
              f"{len(samples['replans'])} plans, median {percentile(samples['replans'], 50):.3g}"),
        check('scheduler and executor / iteration time, mace', overhead(samples), '<= 0.02',
              f'{len(iterations(samples))} iterations: all but passes, segments and sampling'),
        check('cost model, median relative error', percentile(errors, 50), '<= 0.1',
              f'{len(errors)} iterations of mace, predicted before the cost model saw them'),
        check('cost model, p95 relative error', percentile(errors, 95), '<= 0.3',
              'same iterations'),
        check('busy share of inference_only', busy_alone.median, '0.3 to 0.5', busy_alone.spread),
        check('requests per system, ours', float(_fewest_requests(samples)), '>= 60'),
        check('interleaved blocks', float(len(_blocks(samples, 'mace'))), '>= 5'),
    ]


def reported(samples: Samples) -> list[Reported]:
    """Return numbers without a target that explain the checks."""
    rows = [
        Reported('arrivals per second', samples['rate'], '', 'the same for all systems'),
        Reported('undivided fine-tune steps, tokens/s', _median(undivided(samples, 'engine')), '',
                 'steps of the engine, forward alone, layer graphs kept, uninterrupted'),
        Reported('undivided steps of PEFT, tokens/s', _median(undivided(samples, 'peft')), '',
                 'all threads, nothing else runs')]
    of_peft = of_idle_time(samples, 'peft')
    rows.append(Reported(
        'fine-tune tokens/s of mace / what the idle time could yield with steps of PEFT',
        of_peft.median, '', of_peft.spread))
    plans = saturated_plans(samples, 'plan_cpu_us')
    rows.append(Reported(
        'plan() with 64 requests in flight, after a pass has used the caches, p99 us of CPU time',
        percentile(plans, 99), '', f'{len(plans)} plans, median {percentile(plans, 50):.3g}'))
    against = paired(finetune_rates(samples, 'mace'), finetune_rates(samples, 'continuous'))
    rows.append(Reported('fine-tune tokens/s, mace / continuous', against.median, '',
                         against.spread))
    for kind, chosen in (('passes', lambda i: not i['segments']),
                         ('segments alone', lambda i: not i['decode_rows']
                          and not i['prefill_tokens'] and not i['finetune_tokens'])):
        errors = [_error(i) for i in iterations(samples) if chosen(i)]
        rows.append(Reported(f'cost model, median relative error of {kind}',
                             percentile(errors, 50), '', f'{len(errors)} iterations'))
    return rows


def table(samples: Samples) -> Table:
    """Return the table with a row for each system."""
    rows = []
    for system in SYSTEMS:
        requests = [r for r in samples['requests'] if r['system'] == system]
        if not requests:
            continue
        blocks = _blocks(samples, system)
        wall = sum(b['wall_s'] for b in blocks)
        rows.append([
            system, len(blocks), len(requests),
            *(percentile([r[c] for r in requests], p) for c in ('ttft_ms', 'tpot_ms')
              for p in (50, 95)),
            100.0 * sum(r['slo_met'] for r in requests) / len(requests),
            100.0 * sum(b['busy_s'] for b in blocks) / wall,
            sum(b['finetune_tokens'] for b in blocks) / wall])
    names = '; '.join(f'{n}: {SYSTEMS[n]}' for n in [row[0] for row in rows])
    return Table(
        'All systems under the same arrivals',
        ['system', 'blocks', 'requests', 'TTFT p50 ms', 'TTFT p95 ms', 'TPOT p50 ms',
         'TPOT p95 ms', 'in time %', 'busy %', 'fine-tune tokens/s'],
        rows, f'Percentiles over all requests. {names}.')


# -- the numbers behind the checks -------------------------------------------------------


def latency_ratio(samples: Samples, above: str, below: str, column: str,
                  percent: float) -> Ratio:
    """Return the ratio of a latency percentile of two systems, per block."""
    def each(system: str) -> dict[int, float]:
        latencies: dict[int, list[float]] = {}
        for row in samples['requests']:
            if row['system'] == system:
                latencies.setdefault(row['block'], []).append(row[column])
        return {block: percentile(values, percent) for block, values in latencies.items()}
    return paired(each(above), each(below))


def finetune_rates(samples: Samples, system: str) -> dict[int, float]:
    """Return the fine-tune tokens per second of each block."""
    return {b['block']: b['finetune_tokens'] / b['wall_s'] for b in _blocks(samples, system)}


def undivided(samples: Samples, whose: str) -> dict[int, float]:
    """Return the tokens per second of undivided steps, measured before each block."""
    seconds: dict[int, list[float]] = {}
    for row in samples['undivided']:
        if row['whose'] == whose:
            seconds.setdefault(row['block'], []).append(row['seconds'] / row['tokens'])
    return {block: 1.0 / median(each) for block, each in seconds.items()}


def of_idle_time(samples: Samples, whose: str) -> Ratio:
    """
    Return the fine-tune rate of mace over the rate that the idle time allows, per block.

    The latter is the share of time that ``inference_only`` leaves the device idle, times the
    rate of undivided steps that run alone on the device.
    """
    rates = undivided(samples, whose)
    possible = {b['block']: (1.0 - b['busy_s'] / b['wall_s']) * rates[b['block']]
                for b in _blocks(samples, 'inference_only') if b['block'] in rates}
    return paired(finetune_rates(samples, 'mace'), possible)


def iterations(samples: Samples) -> list[dict[str, float]]:
    """Return the iterations of mace as mappings of column names to values."""
    return [dict(zip(part['columns'], row, strict=True)) for part in samples['iterations']
            for row in part['rows']]


def overhead(samples: Samples) -> float | None:
    """Return the share of iteration time outside of passes, segments and sampling."""
    rows = iterations(samples)
    wall = sum(r['wall_ms'] for r in rows)
    return 1.0 - sum(r['work_ms'] for r in rows) / wall if wall else None


def prediction_errors(samples: Samples) -> list[float]:
    """Return the relative error of the predicted time of each iteration."""
    return [_error(row) for row in iterations(samples)]


def saturated_plans(samples: Samples, column: str) -> list[float]:
    """Return a time of each ``plan()`` with at least 64 requests in flight."""
    rows = [dict(zip(part['columns'], row, strict=True))
            for part in samples['crowd'] for row in part['rows']]
    return [row[column] for row in rows if row['in_flight'] >= 64]


def _error(row: Mapping[str, float]) -> float:
    return abs(row['predicted_ms'] - row['measured_ms']) / row['measured_ms']


def _blocks(samples: Samples, system: str) -> list[dict[str, Any]]:
    return [b for b in samples['blocks'] if b['system'] == system]


def _shares(samples: Samples, system: str) -> Ratio:
    return Ratio(tuple(b['busy_s'] / b['wall_s'] for b in _blocks(samples, system)))


def _fewest_requests(samples: Samples) -> int:
    """Return the number of requests of the policy of mace_ros that has the fewest."""
    return min(sum(r['system'] == s for r in samples['requests']) for s in OURS)


def _median(values: Mapping[int, float]) -> float | None:
    return median(values.values()) if values else None
