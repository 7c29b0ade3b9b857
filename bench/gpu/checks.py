# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Checks, numbers and tables of the benchmark of a GPU's limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
import statistics
from typing import Any

from bench.common.results import Check, check, percentile, Reported, Table
from bench.gpu.beside import LOADS
from bench.gpu.models import SHAPES, WEIGHTS
from bench.gpu.passes import STEP_TOKENS
from bench.systems.decode_contexts import ATTENTION

Samples = Mapping[str, Any]

# Relative, of values in bfloat16 that were summed up in another order. An engine accepts more
# (graph_check.MAX_ERROR), since trained weights have outliers, and random ones have none.
MAX_ERROR = 0.03
# By shape: targets of decode / floor and of HF generate / decode.
DECODE = {'1b': ('<= 2.0', '>= 10'), '8b': ('<= 1.5', '>= 8')}
CHECKED_LOAD = 0.5
SYSTEMS = ('inference_only', 'mace')


def checks(shapes: Sequence[str], samples: Samples) -> list[Check]:
    """Return the checks of the parts that were run."""
    found = []
    if samples['errors']:
        worst = max(samples['errors'], key=lambda e: e['error'])
        found.append(check('largest relative error of a fast path', worst['error'],
                           f'<= {MAX_ERROR}', f'{worst["shape"]}, {worst["path"]}'))
    if samples['passes']:
        for shape in shapes:
            found += pass_checks(shape, samples)
    found += context_checks(samples)
    if samples['beside']:
        found += beside_checks(samples)
    return found


def context_checks(samples: Samples) -> list[Check]:
    """Return the checks of decode passes over long contexts."""
    ratios, times = {}, {}
    for attention in ATTENTION:
        chosen = [c for c in samples['contexts'] if (
            c['shape'], c['rows'], c['context'], c['attention'])
            == ('1b bfloat16', 16, 4096, attention)]
        if chosen:
            ratios[attention] = statistics.median(c['ms'] / c['floor_ms'] for c in chosen)
            times[attention] = statistics.median(c['ms'] for c in chosen)
    if not times:
        return []
    used = next(iter(times))
    found = [check('1b: 16 rows of 4096 tokens / reading weights and KV', ratios[used], '<= 1.3',
                   used)]
    if used == 'paged':
        found.append(check('1b: 16 rows of 4096 tokens, paged attention / gathered keys',
                           times['paged'] / times['gathered'], '<= 0.8'))
    return found


def pass_checks(shape: str, samples: Samples) -> list[Check]:
    """Return the checks of one shape."""
    name, found = f'{shape} bfloat16', []
    decode = median_ms(samples, name, 'decode')
    if shape in DECODE:
        floor_target, generate_target = DECODE[shape]
        found += [
            check(f'{shape}: decode / reading the weights',
                  decode / median_ms(samples, name, 'floor'), floor_target),
            check(f'{shape}: HF generate with PEFT / decode, per token',
                  median_ms(samples, name, 'hf_generate') / decode, generate_target)]
    if shape == '8b':
        apart = decode + median_ms(samples, name, 'finetune forward')
        found += [
            check(f'{shape}: fused pass with {STEP_TOKENS} fine-tune tokens / apart',
                  median_ms(samples, name, 'fused') / apart, '<= 0.7'),
            check(f'{shape}: decode with bfloat16 / with int4',
                  decode / median_ms(samples, f'{shape} int4', 'decode'), '>= 2.0')]
    if shape == '1b':
        kinds = {s['kind'] for s in samples['segments'] if s['shape'] == name}
        longest, kind = max((median_segment_ms(samples, name, k), k) for k in kinds)
        found.append(check(f'{shape}: longest segment, ms', longest, '<= 1', kind))
    return found


def beside_checks(samples: Samples) -> list[Check]:
    """Return the checks of serving beside fine-tuning, at one of the loads."""
    learning = at_load(samples, 'mace', CHECKED_LOAD)
    load = f'load {CHECKED_LOAD:.0%}'
    found = [check('time that the device waits for the host, of three answers at once',
                   host_share(samples), '<= 0.05')]
    found += [check(f'{load}: {name} p95 beside fine-tuning / alone',
                    tail_ratio(samples, CHECKED_LOAD, column), '<= 1.05')
              for name, column in (('TTFT', 'ttft_ms'), ('TPOT', 'tpot_ms'))]
    found += [
        check(f'{load}: fine-tuning / the rate of undivided steps alone',
              kept(samples, CHECKED_LOAD), '>= 0.76'),
        check(f'{load}: fine-tuning / what the remaining device time could yield',
              share_of_rest(samples), '>= 0.76'),
        check(f'{load}: time that the device works',
              statistics.median(b['busy_s'] / b['wall_s'] for b in learning), '>= 0.95')]
    found += [check(f'{m["shape"]}: peak memory beside the weights / the budget',
                    used(m) / m['budget_bytes'], '<= 1') for m in samples['memory']]
    return found


def reported(shapes: Sequence[str], samples: Samples) -> list[Reported]:
    """Return decoding in comparison with reading the weights, and the other loads."""
    names = [f'{shape} {weights}' for shape in shapes for weights in WEIGHTS]
    found = [Reported(f'{name}: decode / reading the weights',
                      median_ms(samples, name, 'decode') / median_ms(samples, name, 'floor'))
             for name in names if any(p['shape'] == name for p in samples['passes'])]
    if samples['beside']:
        found += [Reported(f'load {load:.0%}: fine-tuning / the rate of undivided steps alone',
                           kept(samples, load)) for load in LOADS if load != CHECKED_LOAD]
    return found


# -- the numbers behind the checks -------------------------------------------------------


def median_ms(samples: Samples, shape: str, what: str) -> float:
    """Return the median milliseconds of a measurement."""
    return percentile([p['ms'] for p in samples['passes']
                       if (p['shape'], p['what']) == (shape, what)], 50)


def median_segment_ms(samples: Samples, shape: str, kind: str) -> float:
    """Return the median milliseconds of a kind of segment."""
    return percentile([s['ms'] for s in samples['segments']
                       if (s['shape'], s['kind']) == (shape, kind)], 50)


def largest_shape(samples: Samples) -> str:
    """Return the largest shape whose passes were measured; empty if there is none."""
    measured = {p['shape'].split()[0] for p in samples['passes']}
    return next((shape for shape in reversed(SHAPES) if shape in measured), '')


def host_share(samples: Samples) -> float:
    """Return the share of time that the device waits for the host, of requests at once."""
    return statistics.median(1.0 - b['busy_s'] / b['wall_s'] for b in samples['beside']
                             if b['system'] == 'busy')


def at_load(samples: Samples, system: str, load: float) -> list[dict[str, Any]]:
    """Return the blocks of a system at a load."""
    return [b for b in samples['beside'] if (b['system'], b['load']) == (system, load)]


def latencies(samples: Samples, system: str, load: float, column: str, percent: float) -> float:
    """Return a percentile of the latencies of all requests of a system at a load, in ms."""
    return percentile([t for b in at_load(samples, system, load) for t in b[column]], percent)


def tail_ratio(samples: Samples, load: float, column: str) -> float:
    """Return the 95th percentile of a latency beside fine-tuning over that without."""
    alone, beside = (latencies(samples, system, load, column, 95) for system in SYSTEMS)
    return beside / alone


def kept(samples: Samples, load: float) -> float:
    """Return the fine-tune rate at a load over the rate of undivided steps that run alone."""
    return statistics.median(b['finetune_tokens'] / b['wall_s'] * b['undivided_s'] / STEP_TOKENS
                             for b in at_load(samples, 'mace', load))


def share_of_rest(samples: Samples) -> float:
    """Return the fine-tune rate over the rate of undivided steps in all remaining time."""
    alone = at_load(samples, 'inference_only', CHECKED_LOAD)
    free = 1.0 - sum(b['busy_s'] for b in alone) / sum(b['wall_s'] for b in alone)
    return kept(samples, CHECKED_LOAD) / free


def used(memory: Mapping[str, float]) -> float:
    """Return the peak memory of an engine without its weights, in bytes; NaN if unknown."""
    peak = memory['peak_bytes']
    # A file of results has None for NaN.
    return math.nan if peak is None else peak - memory['weights_bytes']


# -- tables ------------------------------------------------------------------------------


def tables(samples: Samples) -> list[Table]:
    """Return the tables of the parts."""
    return [passes_table(samples), contexts_table(samples), loads_table(samples)]


def passes_table(samples: Samples) -> Table:
    """Return the table with a row for each measurement."""
    names = dict.fromkeys((p['shape'], p['what']) for p in samples['passes'])
    kinds = dict.fromkeys((s['shape'], s['kind']) for s in samples['segments'])
    rows: list[list[Any]] = [[*name, median_ms(samples, *name)] for name in names]
    rows += [[shape, f'segment {kind}', median_segment_ms(samples, shape, kind)]
             for shape, kind in kinds]
    return Table('On this device', ['shape', 'what', 'ms'], rows, 'Medians.')


def contexts_table(samples: Samples) -> Table:
    """Return the table of decode passes over long contexts."""
    found: dict[tuple[str, int, int, str], list[dict[str, Any]]] = {}
    for c in samples['contexts']:
        found.setdefault((c['shape'], c['rows'], c['context'], c['attention']), []).append(c)
    return Table(
        'Decode passes',
        ['shape', 'rows', 'context', 'attention', 'ms', 'reading weights and KV, ms'],
        [[*name, *(statistics.median(c[key] for c in rows) for key in ('ms', 'floor_ms'))]
         for name, rows in found.items()], 'Medians.')


def loads_table(samples: Samples) -> Table:
    """Return the table of serving at several loads, with and without fine-tuning."""
    rows = []
    for load in LOADS:
        for system in SYSTEMS:
            blocks = at_load(samples, system, load)
            if blocks:
                wall = sum(b['wall_s'] for b in blocks)
                rows.append([
                    f'{load:.0%}', system, 100.0 * sum(b['busy_s'] for b in blocks) / wall,
                    *(latencies(samples, system, load, column, percent) if load else None
                      for column in ('ttft_ms', 'tpot_ms') for percent in (50, 95)),
                    sum(b['finetune_tokens'] for b in blocks) / wall])
    return Table(
        'Serving beside fine-tuning',
        ['load', 'system', 'busy %', 'TTFT p50 ms', 'TTFT p95 ms', 'TPOT p50 ms', 'TPOT p95 ms',
         'fine-tune tokens/s'], rows,
        'A load is the device time of the requests, one at a time, over the time in which they '
        'arrive.')
