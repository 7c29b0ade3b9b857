# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Checks, numbers and tables of the memory benchmark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
import math
import statistics
from typing import Any

from bench.common.results import Check, check, paired, percentile, Ratio, Reported, Table

Rows = Sequence[Mapping[str, Any]]

# The load of questions from a public corpus.
CORPUS = 'chatterbot-corpus'


def checks(samples: Mapping[str, Any]) -> list[Check]:
    """Return the checks."""
    return [*_sharing_checks(samples.get('sharing', [])),
            *_budget_checks(samples.get('budget', [])),
            *_training_checks(samples.get('training', [])),
            *_pruning_checks(samples.get('pruning', {}))]


def reported(samples: Mapping[str, Any]) -> list[Reported]:
    """Return the numbers without a target."""
    return [*_sharing_reported(samples.get('sharing', [])),
            *_budget_reported(samples.get('budget', [])),
            *_training_reported(samples.get('training', [])),
            *_pruning_reported(samples.get('pruning', {}))]


def tables(samples: Mapping[str, Any]) -> list[Table]:
    """Return a table for each part."""
    made: dict[str, Callable[[Any], Table]] = {
        'sharing': _sharing_table, 'budget': _budget_table, 'training': _training_table,
        'pruning': _pruning_table}
    return [make(samples[part]) for part, make in made.items() if part in samples]


def _where(rows: Rows, **columns: Any) -> list[Mapping[str, Any]]:
    return [r for r in rows if all(r.get(c) == v for c, v in columns.items())]


def _median(rows: Rows, column: str) -> float | None:
    return statistics.median([r[column] for r in rows]) if rows else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


# -- sharing -----------------------------------------------------------------------------


def _sharing_checks(rows: Rows) -> list[Check]:
    def sums(shares: bool) -> dict[int, float]:
        found: defaultdict[int, float] = defaultdict(float)
        for row in _where(rows, sharing=shares):
            found[row['repeat']] += row['prefill_tokens']
        return found

    def waits(shares: bool) -> dict[int, float]:
        return {repeat: percentile(
            [r['ttft_ms'] for r in _where(rows, sharing=shares, repeat=repeat)], 50)
            for repeat in {r['repeat'] for r in rows}}

    computed, waited = paired(sums(True), sums(False)), paired(waits(True), waits(False))
    return [
        check('prompt tokens computed, sharing on / off', computed.median, '<= 0.3',
              computed.spread),
        check('TTFT p50, sharing on / off', waited.median, '<= 0.65', waited.spread)]


def _sharing_reported(rows: Rows) -> list[Reported]:
    texts: defaultdict[tuple[Any, ...], set[str]] = defaultdict(set)
    for row in rows:
        texts[row['repeat'], row['conversation'], row['turn']].add(row['text'])
    if not texts:
        return []
    # One different word may change all later responses of a conversation.
    return [Reported('answers that are the same with sharing on and off',
                     statistics.fmean(len(found) == 1 for found in texts.values()),
                     note='int8 weights: batches of another size round differently')]


def _sharing_table(rows: Rows) -> Table:
    made = [[turn + 1, *(value for shares in (False, True) for value in (
        _median(_where(rows, turn=turn, sharing=shares), 'prefill_tokens'),
        _median(_where(rows, turn=turn, sharing=shares), 'ttft_ms')))]
            for turn in sorted({r['turn'] for r in rows})]
    return Table(
        'Prefix sharing: five turns after one system prompt',
        ['turn', 'tokens computed, off', 'TTFT ms, off', 'tokens computed, on', 'TTFT ms, on'],
        made, 'Medians over all conversations, including the first of each repeat, which computes '
        'the system prompt.')


# -- one budget --------------------------------------------------------------------------


def _of_loads(rows: Rows) -> dict[str, Rows]:
    # Older results have no loads.
    loads = dict.fromkeys(r['load'] for r in rows if 'load' in r)
    return {load: _where(rows, load=load) for load in loads}


def _speed(rows: Rows) -> Ratio:
    """Return tokens per second within the budget over tokens per second with all memory."""
    limited, unlimited = (
        {r['repeat']: r['tokens'] / r['seconds'] for r in _where(rows, limited=x)}
        for x in (True, False))
    return paired(limited, unlimited)


def _budget_checks(rows: Rows) -> list[Check]:
    of_corpus = _speed(_of_loads(rows).get(CORPUS, []))
    peak = max((r['peak_mb'] / r['budget_mb'] for r in _where(rows, limited=True)), default=None)
    return [
        check('tokens/s, budget for 25 % of the worst-case length / all memory',
              of_corpus.median, '>= 0.8', f'all requests answered; {of_corpus.spread}'),
        check('peak memory / budget', peak, '<= 1.03',
              'highest of all runs, serving alone and then beside learning; private memory of '
              'the process without the base model')]


def _budget_reported(rows: Rows) -> list[Reported]:
    result = []
    for load, of_load in _of_loads(rows).items():
        unlimited = _where(of_load, limited=False)
        speed, best = _speed(of_load), paired(
            {r['repeat']: r['least_s'] for r in unlimited},
            {r['repeat']: r['least_small_s'] for r in unlimited})
        result += [
            Reported(f'answers, of the longest that they may be, {load}', statistics.fmean(
                r['tokens'] / r['most_tokens'] for r in unlimited)),
            Reported(f'tokens/s within the budget / all memory, {load}', speed.median,
                     note=speed.spread),
            Reported(f'the most that the budget allows of it, {load}', best.median,
                     note='all blocks in use in every pass, nothing computed twice, passes as fast '
                     f'as with all memory; {best.spread}')]
    limited = _where(rows, limited=True)
    if limited:
        result.append(Reported('corrections learned within the budget, of one each',
                               statistics.fmean(r['learned'] for r in limited)))
    return result


def _budget_table(rows: Rows) -> Table:
    def of(load: str, limited: bool) -> list[Any]:
        chosen = _where(rows, load=load, limited=limited)
        speed = statistics.median([r['tokens'] / r['seconds'] for r in chosen])
        return [load, 'for 25 %' if limited else 'all there is', _median(chosen, 'budget_mb'),
                speed, _median(chosen, 'peak_alone_mb'), _median(chosen, 'peak_mb'),
                _median(chosen, 'preemptions'), f'{sum(r["learned"] for r in chosen):.0f} of '
                f'{len(chosen)}']

    return Table(
        f'One budget: {rows[0]["requests"] // 2} requests at once, then again beside a correction',
        ['questions', 'budget', 'MB', 'tokens/s', 'peak MB, alone', 'peak MB, learning',
         'preemptions', 'learned'],
        [of(load, limited) for load in _of_loads(rows) for limited in (False, True)],
        'Medians. Tokens per second while nothing is learned.')


# -- a training step ---------------------------------------------------------------------


ALWAYS, AUTO, PEFT = 'mace_ros, always', 'mace_ros, auto', 'peft'


def _added(rows: Rows, system: str, precision: str) -> float | None:
    return _median(_where(rows, system=system, precision=precision), 'added_mb')


def _precisions(rows: Rows) -> Iterable[str]:
    return dict.fromkeys(r['precision'] for r in rows)


def _training_checks(rows: Rows) -> list[Check]:
    found = []
    for precision in _precisions(rows) or ('float32',):
        ours, theirs = (_added(rows, s, precision) for s in (ALWAYS, PEFT))
        found.append(check(
            f'memory that a training step adds, recompute always {precision} / PEFT '
            f'{_peer(precision)}', _ratio(ours, theirs), '<= 0.25',
            f'{ours:.0f} of {theirs:.0f} MB, medians' if rows else ''))
    errors = [r['gradient_error'] for r in rows
              if r['system'] != PEFT and 'gradient_error' in r]
    return [*found, check(
        'its gradients, largest relative error against PEFT, float32',
        max(errors, default=None), '<= 0.0001', 'over all tensors; recompute always and auto')]


def _training_reported(rows: Rows) -> list[Reported]:
    return [Reported(f'memory that a training step adds, recompute auto {p} / PEFT {_peer(p)}',
                     _ratio(_added(rows, AUTO, p), _added(rows, PEFT, p)))
            for p in _precisions(rows)]


def _training_table(rows: Rows) -> Table:
    names = dict.fromkeys((r['system'], r['precision']) for r in rows)
    return Table(
        f'One training step over {rows[0]["tokens"]} tokens',
        ['system', 'weights', 'adds MB', 'seconds'],
        [[system, _peer(precision) if system == PEFT else precision,
          *(_median(_where(rows, system=system, precision=precision), c)
            for c in ('added_mb', 'seconds'))] for system, precision in names],
        'Medians. Peak of resident memory in a new process minus resident memory before the '
        'step; gradients and optimizer state included for both systems.')


def _peer(precision: str) -> str:
    return 'float32' if precision == 'float32' else 'in the type that ours computes in'


# -- pruning -----------------------------------------------------------------------------


def _per_context(rows: Rows, column: str, pruned: bool) -> dict[int, float]:
    return {r['context']: r[column] for r in rows if bool(r['pruned']) == pruned}


def _both(rows: Rows) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the answer without pruning and the one with pruning of each context."""
    found: defaultdict[int, dict[bool, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row['context']][bool(row['pruned'])] = row
    return [(pair[False], pair[True]) for pair in found.values()]


def _perplexity_ratio(rows: Rows, pruned: float) -> float | None:
    """Return the factor by which pruning raises the perplexity of the following tokens."""
    above, below = ([r['loss'] for r in _where(rows, pruned=p)] for p in (pruned, 0.0))
    if not above:
        return None
    return math.exp(statistics.fmean(above) - statistics.fmean(below))


def _pruning_checks(samples: Mapping[str, Rows]) -> list[Check]:
    answers, continued = samples.get('answers', []), samples.get('continued', [])
    times = paired(*(_per_context(answers, 'tpot_ms', pruned) for pruned in (True, False)))
    memory = paired(*(_per_context(answers, 'kv_mb', pruned) for pruned in (True, False)))
    return [
        check('KV memory of an answer, half pruned / off', memory.median, '<= 0.55',
              memory.spread),
        check('time per output token, half pruned / off', times.median, '<= 1', times.spread),
        check('perplexity of what follows, half pruned / off', _perplexity_ratio(continued, 0.5),
              '<= 1.05', f'{sum(r["tokens"] for r in _where(continued, pruned=0.5))} tokens after '
              f'{len({r["context"] for r in continued})} contexts' if continued else '')]


def _pruning_reported(samples: Mapping[str, Rows]) -> list[Reported]:
    pairs = _both(samples.get('answers', []))
    if not pairs:
        return []

    def same(off: Mapping[str, Any], on: Mapping[str, Any]) -> float:
        both = list(zip(off['ids'], on['ids'], strict=False))
        return sum(1 for _ in takewhile(lambda x: x[0] == x[1], both)) / max(len(off['ids']), 1)

    longer = max(pairs[0][0]['prompt_tokens'], pairs[0][1]['prompt_tokens'])
    return [
        Reported('perplexity of what follows, three quarters pruned / off',
                 _perplexity_ratio(samples['continued'], 0.75)),
        Reported('answers that are the same, half pruned and off',
                 statistics.fmean(off['text'] == on['text'] for off, on in pairs),
                 note=f'{len(pairs)} answers after prompts of about {longer} tokens'),
        Reported('part of an answer before the first other token',
                 statistics.fmean(same(off, on) for off, on in pairs)),
        Reported('answers that give the fact asked for, off',
                 statistics.fmean(off['knows'] for off, _ in pairs)),
        Reported('answers that give the fact asked for, half pruned',
                 statistics.fmean(on['knows'] for _, on in pairs))]


def _pruning_table(samples: Mapping[str, Rows]) -> Table:
    rows = []
    for pruned in sorted({r['pruned'] for r in samples['continued']}):
        chosen = _where(samples['answers'], pruned=pruned)
        losses = [r['loss'] for r in _where(samples['continued'], pruned=pruned)]
        rows.append([pruned, *(_median(chosen, c) for c in ('ttft_ms', 'tpot_ms', 'kv_mb')),
                     f'{sum(r["knows"] for r in chosen)} of {len(chosen)}' if chosen else None,
                     math.exp(statistics.fmean(losses))])
    return Table('KV pruning of long prompts',
                 ['memory.kv_prune', 'TTFT ms', 'ms per token', 'KV MB', 'facts given',
                  'perplexity of what follows'], rows,
                 'Medians. At three quarters only the perplexity is measured.')
