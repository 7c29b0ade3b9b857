# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Run the benchmark of knowledge editing."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common.figures import can_draw
from bench.common.options import Options, settings_from
from bench.common.results import Result
from bench.common.running import Run, run_benchmark, Samples
import bench.edits
from bench.edits.checks import checks, reported, tables
from bench.edits.earlier import commit_of, earlier_robot
from bench.edits.edit_set import EditSet, read_edits
from bench.edits.scope_plot import draw
from bench.edits.systems import EARLIER, MACE, opened, SYSTEMS
from bench.edits.unrelated import Unrelated, unrelated_questions

FACTS, CHAT = 40, 60
QUICK_FACTS, QUICK_CHAT = 2, 2


def options() -> Options:
    """Return the options."""
    result = Options('edits', bench.edits.__doc__, quick='a few edits of each set')
    result.add('--data', nargs='+', required=True, metavar='FILE',
               help='edit sets, as JSON')
    result.add('--modes', nargs='+', choices=list(MODES), default=[m for m in MODES if m != 'long'],
               help='parts to run (default: all but long); the samples of other parts and systems '
               'are taken from the last results if these had the same edits, seed and --set')
    result.add('--systems', nargs='*', choices=list(SYSTEMS), default=list(SYSTEMS),
               help='systems of the mode sequential (default: all; no name: none but that of '
               '--earlier); the other modes run mace')
    result.size('--corrections', 100, 3, 'edits of each set')
    result.add('--offset', type=int, default=0, help='edits of each file that are left out first')
    result.add('--seed', type=int, default=0, help='seed of the baselines')
    result.add('--restart-after', type=int, metavar='EDITS',
               help='edits after which the robot is restarted; 0: never (default: half of them)')
    result.add('--earlier', type=Path, metavar='FOLDER',
               help='a checkout of an earlier commit, whose robot learns the same edits')
    result.size('--earlier-corrections', 30, 3,
                'edits that the earlier commit learns: the first ones of each set')
    result.size('--burst', 32, 2, 'edits at once in the mode burst')
    result.size('--deletion', 10, 2, 'edits of the mode deletion, half of which are deleted')
    result.size('--remembered', 1000, 8, 'edits in memory in the mode scope')
    result.size('--long', 1000, 4, 'edits of the mode long')
    result.add('--minutes', type=float, default=0.0,
               help='length of a sitting of the mode long; 0: until it is finished')
    result.add('--keep', type=Path, metavar='FOLDER', default=Path('build/bench-edits'),
               help='folder of the mode long, which goes on there (default: %(default)s)')
    result.parameters()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    recorded = run_benchmark(
        options(), arguments, measure=measure, prepare=prepare,
        evaluate=lambda samples, run: evaluate(samples))
    if recorded.result.samples.get('scope') and can_draw():
        draw(recorded.result.samples['scope'], recorded.path.with_name('edits.svg'))


def prepare(args: argparse.Namespace) -> None:
    """Fill in a default; end the program if one of the edit sets cannot be used."""
    if args.restart_after is None:
        args.restart_after = args.corrections // 2
    most = max([args.corrections, *(getattr(args, mode) for mode in ('burst', 'deletion', 'long')
                                    if mode in args.modes)])
    try:
        found = edit_sets(args)
        for each in found:
            each.part(args.offset, most)
    except (OSError, ValueError) as error:
        raise SystemExit(f'--data: {error}') from error
    if len({each.name for each in found}) < len(found):
        raise SystemExit('--data: the names of two files begin alike, up to the first "_"')


def edit_sets(args: argparse.Namespace) -> list[EditSet]:
    """Read the edit sets; raises ``OSError`` or ``ValueError``."""
    return [read_edits(Path(path)) for path in args.data]


def measure(run: Run) -> Samples:
    """Run the selected parts; return their samples, with the last ones of the other parts."""
    args = run.args
    conditions = {'corrections': args.corrections, 'offset': args.offset, 'seed': args.seed,
                  'restart_after': args.restart_after, 'set': args.set}
    samples = run.earlier('edits')
    if samples.get('conditions') != conditions:
        samples = {}
    samples = {'conditions': conditions, 'runs': [], **samples}
    for path, edit_set in zip(args.data, edit_sets(args), strict=True):
        for mode in args.modes:
            MODES[mode](run, samples, edit_set)
        if 'sequential' in args.modes and args.earlier is not None:
            measure_earlier(run, samples, edit_set, path)
    return samples


def evaluate(samples: Mapping[str, Any]) -> Result:
    """Return the results of all parts that have samples."""
    return Result('edits', dict(samples), checks(samples), reported(samples), tables(samples))


def record(run: Run, samples: Samples, edit_set: EditSet, system: str,
           found: Mapping[str, Sequence[Mapping[str, Any]]], commit: str | None = None) -> None:
    """Put samples in the place of earlier ones, and write what there is: a run takes long."""
    def is_new(row: Mapping[str, Any]) -> bool:
        return (row['set'], row['system']) == (edit_set.name, system)

    labels = {'set': edit_set.name, 'system': system}
    for part, rows in found.items():
        samples[part] = [*(row for row in samples.get(part, ()) if not is_new(row)),
                         *({**labels, **row} for row in rows)]
        samples['runs'] = [
            *(row for row in samples['runs'] if not (is_new(row) and row['part'] == part)),
            {**labels, 'part': part, 'commit': commit or run.recorder.commit,
             'cpu': run.recorder.cpu, 'recorded': run.recorder.started[:10]}]
    run.record(evaluate(samples))


# -- the modes; their modules are imported late, so that --help does not load torch --------


def measure_sequential(run: Run, samples: Samples, edit_set: EditSet) -> None:
    """Teach one edit after the other to each system."""
    from bench.edits import sequential

    args = run.args
    edits = edit_set.part(args.offset, args.corrections).edits
    for system in args.systems:
        run.say(f'{edit_set.name}: {system}')
        with opened(system, settings_from(args.set), run.folder / f'{edit_set.name}-{system}',
                    args.seed) as model:
            rows, others = sequential.measure(
                model, edits, _unrelated(args, edit_set, args.corrections),
                at_once=SYSTEMS[system].at_once, restart_after=args.restart_after, say=run.say)
        record(run, samples, edit_set, system, {'edits': rows, 'unrelated': others})


def measure_earlier(run: Run, samples: Samples, edit_set: EditSet, path: str) -> None:
    """Teach one edit after the other to the robot of an earlier commit."""
    args = run.args
    run.say(f'{edit_set.name}: the robot in {args.earlier}')
    record(run, samples, edit_set, EARLIER, earlier_robot(
        args, path, run.folder / f'{edit_set.name}-earlier'), commit_of(args.earlier))


def measure_burst(run: Run, samples: Samples, edit_set: EditSet) -> None:
    """Teach edits that come at the same moment."""
    from bench.edits import burst

    args = run.args
    run.say(f'{edit_set.name}: {args.burst} at once')
    with opened(MACE, settings_from(args.set), run.folder / f'{edit_set.name}-burst',
                args.seed) as model:
        rows = burst.measure(model, edit_set.part(args.offset, args.burst).edits)
    record(run, samples, edit_set, MACE, {'burst': rows})


def measure_scope(run: Run, samples: Samples, edit_set: EditSet) -> None:
    """Measure which questions are in scope, without the device."""
    from bench.edits import scope_curve

    args = run.args
    run.say(f'{edit_set.name}: scope')
    count = min(args.remembered, len({edit.prompt for edit in edit_set.edits[args.offset:]}))
    rows = scope_curve.measure(
        settings_from(args.set), edit_set.part(args.offset, count).edits,
        _unrelated(args, edit_set, count), {min(args.corrections, count), count})
    record(run, samples, edit_set, MACE, {'scope': rows})


def measure_deletion(run: Run, samples: Samples, edit_set: EditSet) -> None:
    """Delete corrections that were learned."""
    from bench.edits import deletion
    from bench.edits.robot import Robot

    args = run.args
    run.say(f'{edit_set.name}: deletion')
    robot = Robot(settings_from(args.set), run.folder / f'{edit_set.name}-deletion')
    rows = deletion.measure(robot, edit_set.part(args.offset, args.deletion).edits)
    robot.close()
    record(run, samples, edit_set, MACE, {'deletion': rows})


def measure_long(run: Run, samples: Samples, edit_set: EditSet) -> None:
    """Teach many edits, or go on with them."""
    from bench.edits import long
    from bench.edits.robot import Robot

    args = run.args
    folder = (run.folder if args.quick else args.keep) / edit_set.name
    lines = long.SampleFile(folder / 'samples.jsonl', {
        'set': edit_set.name, 'edits': args.long, 'offset': args.offset, 'parameters': args.set})
    run.say(f'{edit_set.name}: {args.long} edits, in {folder}')
    rows, others = long.measure(
        lambda: Robot(settings_from(args.set), folder / 'robot'), lines,
        edit_set.part(args.offset, args.long).edits, _unrelated(args, edit_set, args.corrections),
        minutes=args.minutes, say=run.say)
    record(run, samples, edit_set, MACE, {'long': rows, 'long_unrelated': others})


def _unrelated(args: argparse.Namespace, edit_set: EditSet, count: int) -> list[Unrelated]:
    return unrelated_questions(
        edit_set.part(args.offset, count).edits, facts=QUICK_FACTS if args.quick else FACTS,
        chat=QUICK_CHAT if args.quick else CHAT)


MODES: Mapping[str, Callable[[Run, Samples, EditSet], None]] = {
    'sequential': measure_sequential, 'burst': measure_burst, 'scope': measure_scope,
    'deletion': measure_deletion, 'long': measure_long}


if __name__ == '__main__':
    main()
