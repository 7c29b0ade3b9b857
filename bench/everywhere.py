# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Learning for every question, and what each protection of the other answers adds to it.

Under ``adapter.scope: everywhere``, robots learn the corrections of the parts one and forty of
:mod:`bench.learning`: first with all protections, then without each of them. Results:
bench/results/everywhere.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
import json
import statistics
from typing import Any
from unittest.mock import patch

from bench.common.load import LESSONS
from bench.common.options import Options, settings_from
from bench.common.results import Check, check, Result, Table
from bench.common.running import Run, run_benchmark, Samples
from bench.common.text import contains_phrase
from bench.learning import forty, one
from bench.learning.aims import EVERYWHERE

QUICK_FACTS = 8
ALL = 'with all protections'


def in_same_words(samples: Samples) -> float:
    """Return the share of all facts, in both parts, that are told in the same words."""
    facts = [*samples['facts'], *samples['forty_facts']]
    return _share(fact['before'] == fact['after'] for fact in facts)


def right_in_the_end(samples: Samples) -> float:
    """Return the share of the part forty's corrections that are right in the end."""
    return _share(row['in_the_end'].strip() == row['answer'] for row in samples['forty'])


def without_interpolation() -> AbstractContextManager[Any]:
    """Let jobs keep the weights of their last step."""
    def keep(*_: object) -> Iterator[None]:
        yield from ()

    return patch('mace_ros.learning.learning_job.interpolate', keep)


def without_guard() -> AbstractContextManager[Any]:
    """Let the gate guard no earlier correction."""
    return patch('mace_ros.learning.training_set.GUARDED', 0)


@dataclass(frozen=True)
class Kept:
    """Answers that should stay, and their share in the samples of a variant."""

    what: str
    share: Callable[[Samples], float]


# Few facts are lost in any run; many more are told in other words.
FACTS = Kept('facts told in the same words', in_same_words)
CORRECTIONS = Kept('corrections in a row that are right in the end', right_in_the_end)


@dataclass(frozen=True)
class Variant:
    """Parameters that differ, what differs in the code, and what the missing protection keeps."""

    values: Mapping[str, Any] = field(default_factory=dict)
    changed: Callable[[], AbstractContextManager[Any]] = nullcontext
    keeps: Kept = FACTS


VARIANTS: Mapping[str, Variant] = {
    ALL: Variant(),
    'without replay': Variant({'finetune.replay_samples': 0}),
    'without protected directions': Variant({'finetune.spared_directions': 0}),
    'without interpolation': Variant(changed=without_interpolation),
    'without guarded corrections': Variant(changed=without_guard, keeps=CORRECTIONS),
    'with adapters in all layers': Variant({'adapter.target_modules': 'all-linear'}),
}


def options() -> Options:
    """Return the options."""
    result = Options('everywhere', __doc__, quick='two variants, a few corrections')
    result.size('--corrections', 10, 2, 'corrections of each robot in the part one')
    result.size('--robots', 4, 1, 'robots of the part one, all without a version at first')
    result.size('--many', 40, 3, 'corrections of the part forty')
    result.add('--variants', nargs='+', choices=list(VARIANTS), default=list(VARIANTS),
               help='what to run (default: all); the last results of the other variants are kept '
               'if these had the same CPU and --set')
    result.parameters()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure,
                  evaluate=lambda samples, run: evaluate(samples))


def measure(run: Run) -> Samples:
    """Run the selected variants; return their samples, with the last ones of the others."""
    args = run.args
    conditions = {'cpu': run.recorder.cpu, 'set': args.set}
    lessons = json.loads(LESSONS.read_text())
    facts = QUICK_FACTS if args.quick else len(lessons['facts'])
    runs = [each for each in run.earlier('everywhere').get('runs', ())
            if each['variant'] in VARIANTS
            and all(each[name] == value for name, value in conditions.items())]
    for number, name in enumerate(args.variants):
        run.say(name)
        variant, folder = VARIANTS[name], run.folder / str(number)
        settings = settings_from(args.set).updated(
            {'adapter.scope': 'everywhere', **variant.values})
        with variant.changed():
            found = {**one.measure(settings, lessons, folder / 'one', robots=args.robots,
                                   count=args.corrections, facts=facts),
                     **forty.measure(settings, lessons, folder / 'forty', count=args.many,
                                     facts=facts)}
        runs = [*(each for each in runs if each['variant'] != name),
                {'variant': name, 'commit': run.recorder.commit, **conditions, **found}]
        # A variant takes long: its results are kept even if the next one fails.
        run.record(evaluate({'runs': runs}))
    return {'runs': runs}


def evaluate(samples: Samples) -> Result:
    """Return the results of all variants that have samples."""
    return Result('everywhere', samples, list(checks(samples)), tables=[table(samples)])


def checks(samples: Samples) -> Iterator[Check]:
    """Yield the checks: the targets with all protections, and that each of them keeps answers."""
    runs = {each['variant']: each for each in samples['runs']}
    if ALL not in runs:
        return
    yield from (*one.checks(runs[ALL], EVERYWHERE), *forty.checks(runs[ALL], EVERYWHERE))
    for name in (name for name in runs if name != ALL):
        kept = VARIANTS[name].keeps
        yield check(f'share of {kept.what} {ALL}, less that {name}',
                    kept.share(runs[ALL]) - kept.share(runs[name]), '>= 0.05')


def table(samples: Samples) -> Table:
    """Return the table with a row for each variant."""
    rows = []
    for each in sorted(samples['runs'], key=lambda run: list(VARIANTS).index(run['variant'])):
        taught, base_live = each['corrections'], [row['value'] for row in each['perplexity']]
        rows.append([
            each['variant'], statistics.median(row['seconds'] for row in taught),
            _share(row['after'].strip() == row['answer'] for row in taught),
            _share(contains_phrase(row['after_paraphrase'], row['key']) for row in taught),
            _share(contains_phrase(row['after'], row['key']) for row in each['facts']),
            in_same_words(each), right_in_the_end(each),
            _share(contains_phrase(row['after'], row['key']) for row in each['forty_facts']),
            base_live[1] / base_live[0], each['steps'], each['commit'], each['cpu']])
    return Table(
        'Learning for every question', ['', 'median s', 'right', 'paraphrases', 'facts',
                                        'same words', 'of forty', 'facts then', 'perplexity',
                                        'steps', 'commit', 'cpu'], rows,
        'shares of answers; facts: still right; same words: of all facts, in both parts; '
        'perplexity: of chat text, after forty corrections, over that of the base model; steps: '
        'of the part one')


def _share(found: Iterator[bool]) -> float:
    return statistics.fmean(found)


if __name__ == '__main__':
    main()
