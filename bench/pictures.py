# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Draw the pictures of the documentation from the recorded results, into docs/pictures/.

``make docs`` and ``python -m bench.report --markdown`` draw them as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
import statistics
from typing import Any

from bench.common.figures import BLUE, figure, GREEN, GREY, ORANGE, RED
from bench.common.recording import FOLDER, read
from bench.edits.scoring import is_right
from bench.learning import drift_checks

PICTURES = Path(__file__).parents[1] / 'docs' / 'pictures'
Samples = Mapping[str, Any]

# Stages of a correction, by the states of its learning job.
STAGES = {
    'written to disk': ('waiting',),
    'scored': ('reading', 'preparing', 'choosing', 'scoring'),
    'trained': ('training', 'interpolating'),
    'judged by the gate': ('judging',),
    'saved and published': ('publishing', 'saving')}


def corrections(samples: Samples, path: Path) -> None:
    """Draw the seconds of each correction, and what is right and unchanged in the end."""
    edits = [e for e in samples['edits'] if (e['set'], e['system']) == ('wikibigedit', 'mace')]
    unrelated = [u for u in samples['unrelated']
                 if (u['set'], u['system']) == ('wikibigedit', 'mace')]
    seconds = [e['seconds'] for e in edits if e['seconds'] is not None]
    shares = {
        'answered as corrected': share(is_right(e['end'], e['target']) for e in edits),
        'paraphrases, never trained': share(
            is_right(e['end_rephrase'], e['target']) for e in edits if e['rephrase']),
        'near misses unchanged': share(
            e['end_near'] == e['near_before'] for e in edits if e['near_miss']),
        'unrelated answers unchanged': share(u['end'] == u['before'] for u in unrelated)}
    with figure(path, columns=2, size=(9.6, 3.0)) as (_, (left, right)):
        left.scatter(range(1, len(seconds) + 1), seconds, s=14, color=BLUE)
        median = statistics.median(seconds)
        left.axhline(median, color=GREY, linestyle='--')
        left.set(xlabel='correction, one after the other', ylim=(0, None), xlim=(0, None),
                 title=f'seconds until it takes effect, median {median:.1f}')
        bars = right.barh(list(shares), list(shares.values()), color=[BLUE, BLUE, GREEN, GREEN])
        right.bar_label(bars, [f'{100 * value:.0f}%' for value in shares.values()], padding=3)
        right.invert_yaxis()
        right.set(xlim=(0, 1.12), xticks=[], title=f'after all {len(edits)} corrections')
        right.spines['bottom'].set_visible(False)


def timeline(samples: Samples, path: Path) -> None:
    """Draw the stages of three corrections on a time axis; older samples have no stages."""
    edits = sorted((e for e in samples['edits'] if e['system'] == 'mace'
                    and e['set'] == 'wikibigedit' and e.get('stages')), key=lambda e: e['seconds'])
    if not edits:
        return
    shown = {f'the median of {len(edits)}': edits[len(edits) // 2],
             'slower than 95 %': edits[int(0.95 * len(edits))],
             'the first of a new robot': next(e for e in edits if e['first_of'] == 'new robot')}
    with figure(path, columns=1, size=(9.6, 2.2)) as (_, axes):
        left = dict.fromkeys(shown, 0.0)
        for (label, states), colour in zip(STAGES.items(), (GREY, ORANGE, BLUE, GREEN, RED),
                                           strict=True):
            seconds = {name: sum(e['stages'].get(state, 0.0) for state in states)
                       for name, e in shown.items()}
            axes.barh(list(shown), list(seconds.values()), left=list(left.values()), height=0.6,
                      label=label, color=colour)
            left = {name: left[name] + seconds[name] for name in shown}
        axes.invert_yaxis()
        axes.set(xlabel='seconds since the correction was sent', xlim=(0, None))
        axes.legend(ncols=len(STAGES), loc='lower center', bbox_to_anchor=(0.5, 1.0),
                    fontsize='small')


def latency(samples: Samples, path: Path) -> None:
    """Draw the distributions of both latencies, with and without learning."""
    systems = {'inference_only': ('no learning', GREY, '--'), 'mace': ('mace', BLUE, '-'),
               'continuous': ('continuous', ORANGE, '-'),
               'hf_peft_split': ('HF generate and PEFT', RED, '-')}
    with figure(path, columns=2, size=(9.6, 3.2)) as (_, axes):
        for each, column, title in zip(
                axes, ('ttft_ms', 'tpot_ms'),
                ('time to first token, ms', 'time per output token, ms'), strict=True):
            for system, (label, colour, line) in systems.items():
                cumulative(each, [r[column] for r in samples['requests']
                                  if r['system'] == system and r[column] is not None],
                           label=label, color=colour, linestyle=line)
            each.set(xlabel=title, ylabel='share of requests', ylim=(0, 1.02))
            logarithmic(each)
        axes[1].legend(loc='lower right', fontsize='small')


def device(samples: Samples, path: Path) -> None:
    """Draw what each iteration of a block ran: all of the block, and around an arrival."""
    from matplotlib.patches import Patch

    block = samples['iterations'][0]
    rows = [dict(zip(block['columns'], row, strict=True)) for row in block['rows']]
    kinds = {'prompts': ORANGE, 'decoding': BLUE, 'learning': GREEN}
    spans: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    last: tuple[str, ...] = ()
    now = first_prompt = 0.0
    for row in rows:
        work = (row['prefill_tokens'], row['decode_rows'],
                row['finetune_tokens'] or row['segments'])
        ran = tuple(kind for kind, some in zip(kinds, work, strict=True) if some)
        if 'prompts' in ran and not first_prompt and now > 5.0:
            first_prompt = now
        of_kind = spans.setdefault(ran, [])
        begin = of_kind.pop()[0] if ran == last else now
        now, last = now + row['wall_ms'] / 1e3, ran
        of_kind.append((begin, now - begin))
    with figure(path, columns=1, rows=2, size=(9.6, 2.6)) as (_, (whole, part)):
        for axes in (whole, part):
            for ran, bars in spans.items():
                for at, kind in enumerate(reversed(ran)):
                    axes.broken_barh(bars, (at / len(ran), 1 / len(ran)), color=kinds[kind],
                                     linewidth=0)
            axes.set(yticks=[], ylim=(0, 1))
            axes.spines['left'].set_visible(False)
        whole.set(xlim=(0, now))
        whole.set_title('a block with random arrivals; in two colours: both at once', loc='left')
        whole.legend([Patch(color=colour) for colour in kinds.values()], kinds,
                     loc='lower right', ncols=3, bbox_to_anchor=(1, 1), fontsize='small',
                     borderaxespad=0.0)
        part.set(xlim=(first_prompt - 0.4, first_prompt + 2.1), xlabel='seconds')
        part.set_title('around one arrival', loc='left')


def memory(samples: Samples, path: Path) -> None:
    """Draw the peaks of memory with all of it, and within a budget."""
    loads = list(dict.fromkeys(row['load'] for row in samples['budget']))
    with figure(path, columns=1, size=(7.2, 2.8)) as (_, axes):
        budget = 0.0
        for at, (limited, column, label, colour) in enumerate((
                (False, 'peak_alone_mb', 'all memory, answers', GREY),
                (False, 'peak_mb', 'all memory, answers and learning', ORANGE),
                (True, 'peak_alone_mb', 'budget, answers', BLUE),
                (True, 'peak_mb', 'budget, answers and learning', GREEN))):
            heights = []
            for load in loads:
                found = [r for r in samples['budget']
                         if r['load'] == load and r['limited'] == limited]
                heights.append(statistics.median(r[column] for r in found))
                if limited:
                    budget = statistics.median(r['budget_mb'] for r in found)
            axes.bar([i + 0.2 * at - 0.3 for i in range(len(loads))], heights, 0.18,
                     label=label, color=colour)
        axes.axhline(budget, color=RED, linestyle='--', label=f'budget, {budget:.0f} MB')
        axes.set(xticks=range(len(loads)), xticklabels=[f'16 requests, {x}' for x in loads],
                 ylabel='peak memory, MB', xlim=(-0.5, len(loads) + 0.5))
        axes.legend(fontsize='small', loc='upper right')


def alignment(samples: Samples, path: Path) -> None:
    """Draw the share of right answers over time, and over the device time of learning."""
    runs = drift_checks.by_system(samples)
    with figure(path, columns=2, size=(9.6, 3.2)) as (_, (left, right)):
        for system, colour in (('mace', BLUE), ('continuous', ORANGE)):
            rows = [r for r in samples['drift'] if r['system'] == system]
            seconds, shares = zip(*drift_checks.curve(rows), strict=True)
            left.plot([s / 60 for s in seconds], shares, color=colour, label=system)
            minutes, reached = runs[system]['learning_s'] / 60, runs[system]['alignment']
            right.scatter([minutes], [reached], s=60, color=colour)
            right.annotate(f'{system}, {reached:.0%}', (minutes, reached), xytext=(0, 9),
                           textcoords='offset points', ha='center')
        left.set(xlabel='minutes of the trace', ylim=(0, 1),
                 title=f'right of the latest {drift_checks.WINDOW} answers')
        left.legend(loc='lower right', fontsize='small')
        right.set(xlabel='minutes of device time for learning', ylim=(0, 1),
                  xlim=(0, 1.3 * max(run['learning_s'] for run in runs.values()) / 60),
                  title='right of all answers')


def simulation(samples: Samples, path: Path) -> None:
    """Draw the time to first token of the real engine and of its simulation."""
    with figure(path, columns=1, size=(6.0, 2.8)) as (_, axes):
        for rows, label, colour in ((samples['real'], 'real', GREY),
                                    (samples['simulated'], 'simulated', BLUE)):
            cumulative(axes, [x for row in rows if row['policy'] == 'mace'
                              for x in row['ttft_ms'] if x is not None],
                       label=label, color=colour)
        axes.set(xlabel='time to first token, ms', ylabel='share of requests', ylim=(0, 1.02))
        logarithmic(axes)
        axes.legend(fontsize='small', loc='lower right')


# Each picture, by the benchmark whose samples it shows.
DRAWN: Mapping[str, Sequence[Callable[[Samples, Path], None]]] = {
    'edits': [corrections, timeline], 'colocation': [latency, device], 'learning': [alignment],
    'memory': [memory], 'simulation': [simulation]}


def cumulative(axes: Any, values: Sequence[float], **style: Any) -> None:
    """Draw the cumulative distribution of values."""
    ordered = sorted(values)
    axes.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where='post',
              linewidth=1.8, **style)


def logarithmic(axes: Any) -> None:
    """Give an axis of milliseconds a logarithmic scale with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter('{x:g}')


def share(outcomes: Iterable[bool]) -> float:
    """Return the share of outcomes that are true."""
    return statistics.fmean(outcomes)


def draw_all(results: Iterable[Mapping[str, Any]]) -> None:
    """Draw all pictures whose results are recorded; needs matplotlib."""
    for result in results:
        for draw in DRAWN.get(result['bench'], ()):
            draw(result['samples'], PICTURES / f'{draw.__name__}.svg')


def main() -> None:
    """Draw all pictures."""
    argparse.ArgumentParser(prog='python -m bench.pictures', description=__doc__.strip(),
                            ).parse_args()
    draw_all(read(FOLDER))


if __name__ == '__main__':
    main()
