# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Replay a load on a simulated device, with the scheduler of the robot.

Writes a report (HTML, JSON, tables, plots) of how well each policy would meet its objectives and
how much it would learn; with --tune, a parameter file for the node.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import math
import os
from pathlib import Path
import re
import sys
from typing import Any

from tqdm import tqdm

from mace_ros.api.policies import POLICIES
from mace_ros.api.settings import InvalidSetting, PARAMETERS, Settings
from mace_ros.simulation import arrival_trace, report, tuning
from mace_ros.simulation.devices import DEVICES
from mace_ros.simulation.models import MODELS
from mace_ros.simulation.replay import DoesNotFit, Target
from mace_ros.simulation.study import run, Source, Study, tasks_of
from mace_ros.simulation.virtual_learning import Mistakes

THIS_MACHINE = 'this-machine'
# Parameters that affect a replay.
SIMULATED = re.compile(
    r'(scheduler|slo)\..*|adapter\.(rank|slots)|memory\.kv_cache_tokens|monitor\.slo_target|'
    r'finetune\.(budget|min_share|max_blocking_ms|period_s|period_steps|replay_samples|recompute|'
    r'max_sample_tokens)')
COMPARED = 'mace,periodic,continuous,inference_only'


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog='python -m mace_ros.simulation', description=(__doc__ or '').strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    load = made.add_mutually_exclusive_group(required=True)
    load.add_argument('--trace', type=Path, metavar='FILE',
                      help='CSV in the format of the Azure LLM inference traces')
    load.add_argument('--arrivals', choices=('poisson', 'bursty'),
                      help='generate arrivals instead, with lengths like those of that trace')
    add('--device', default='orin-agx-64', choices=[*DEVICES, THIS_MACHINE],
        metavar='DEVICE', help=f'one of {", ".join([*DEVICES, THIS_MACHINE])} '
                               '(default: %(default)s)')
    add('--power-mode', default='maxn', metavar='MODE',
        help='power mode of the device (default: %(default)s)')
    add('--calibration', type=Path, metavar='FILE',
        help=f'for {THIS_MACHINE}: a file that python -m bench.simulation --calibrate wrote')
    add('--model', default='llama-3.2-1b', choices=list(MODELS), metavar='MODEL',
        help=f'one of {", ".join(MODELS)} (default: %(default)s)')
    add('--weight-bytes', type=float, default=2.0, help='bytes of a weight (default: %(default)s)')
    add('--policy', default=COMPARED, metavar='LIST',
        help=f'some of {",".join(POLICIES)} (default: %(default)s)')
    add('--scale', type=float, default=1.0, metavar='R',
        help="multiply the trace's rate: below 1 it is thinned, above 1 played faster "
             '(default: %(default)s)')
    add('--rate', type=float, default=0.1,
        help='requests per second of a generator, before --scale (default: %(default)s)')
    add('--requests', type=int, default=1000, metavar='N',
        help='number of requests (default: %(default)s)')
    add('--learning', default='corrections', choices=('corrections', 'always', 'none'),
        help='learn corrections as they arrive, or always, to load the device fully '
             '(default: %(default)s)')
    add('--corrections', type=float, default=Mistakes().share, metavar='SHARE',
        help='share of the answers that is corrected while nothing drifts '
             '(default: %(default)s)')
    add('--sample-tokens', type=int, default=256,
        help='tokens of a fine-tune step, with --learning always (default: %(default)s)')
    add('--loads', default='0.5,1,1.5,2', metavar='LIST',
        help='multiples of the load at which to show attainment, or none (default: %(default)s)')
    add('--load-requests', type=int, default=200, metavar='N',
        help='requests at each of these loads (default: %(default)s)')
    add('--set', nargs='+', default=[], metavar='NAME=VALUE',
        help='parameters of the node to change')
    add('--seed', type=int, default=0, metavar='S', help='random seed (default: %(default)s)')
    add('--tune', action='store_true',
        help='search the parameters that meet the objectives with the most learning, and write '
             'params.yaml for the node')
    add('--processes', type=int, default=0, help='worker processes (default: one per core)')
    add('--no-skip', action='store_true',
        help='plan every iteration, even where nothing can change; slower, with the same result')
    add('--output', type=Path, required=True, metavar='DIR', help='folder for the report')
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program."""
    made = parser()
    args = made.parse_args(arguments)
    try:
        study = study_of(args)
        processes = args.processes or len(os.sched_getaffinity(0))
        if args.tune:
            return _tune(study, processes, args.output)
        tasks = tasks_of(study, skips=not args.no_skip)
        with tqdm(total=sum(t.count for t in tasks), unit='req', file=sys.stderr) as bar:
            outcomes = run(tasks, processes=processes, on_progress=bar.update)
        path = report.write(study, outcomes, args.output)
    except (InvalidSetting, DoesNotFit, arrival_trace.InvalidArrivals, OSError) as error:
        made.exit(1, f'{made.prog}: {error}\n')
    print((args.output / 'table.md').read_text(), end='')
    print(f'\n{report.validation_text()}\n\n{path}')
    return 0


def study_of(args: argparse.Namespace) -> Study:
    """Return the study that the options describe; raises the errors that :func:`main` reports."""
    changes = dict(_value(each) for each in args.set)
    for name in sorted(n for n in changes if not SIMULATED.fullmatch(n)):
        print(f'--set {name}: it is not simulated, and only passed on', file=sys.stderr)
    settings = Settings().updated(changes)
    policies = tuple(args.policy.split(','))
    for policy in policies:
        if policy not in POLICIES:
            raise InvalidSetting(f'--policy: {policy!r} is not one of {", ".join(POLICIES)}')
    if (args.device == THIS_MACHINE) != (args.calibration is not None):
        raise InvalidSetting(f'--calibration belongs to --device {THIS_MACHINE}')
    modes = DEVICES[args.device].modes if args.calibration is None else {'maxn': None}
    if args.power_mode not in modes:
        raise InvalidSetting(
            f'--power-mode: {args.device} has {", ".join(modes)}, not {args.power_mode!r}')
    for name in ('scale', 'rate', 'requests', 'load_requests', 'weight_bytes'):
        if not getattr(args, name) > 0:
            raise InvalidSetting(f'--{name.replace("_", "-")}: must be greater than 0')
    if args.trace is not None:
        source = Source('trace', args.trace.name, tuple(arrival_trace.read(args.trace)),
                        scale=args.scale)
    else:
        source = Source(args.arrivals, f'{args.arrivals}, {args.rate:g} per second',
                        rate=args.rate, scale=args.scale)
    target = Target(args.device, args.model, args.power_mode, args.weight_bytes,
                    args.calibration)
    target.check_memory(settings)
    loads = _loads(args.loads)
    return Study(
        target, source, settings, policies, args.requests, args.learning,
        Mistakes(share=args.corrections, longest=settings.finetune.max_sample_tokens),
        args.sample_tokens, loads, args.load_requests, args.seed)


def _loads(text: str) -> tuple[float, ...]:
    try:
        loads = () if text == 'none' else tuple(float(f) for f in text.split(','))
    except ValueError:
        loads = (0.0,)
    if not all(0.0 < load < math.inf for load in loads):
        raise InvalidSetting(f'--loads: {text!r} is neither none nor numbers above 0, with commas')
    return loads


def _value(text: str) -> tuple[str, Any]:
    name, _, value = text.partition('=')
    if name not in PARAMETERS:
        raise InvalidSetting(f'{name}: no such parameter')
    kind = type(PARAMETERS[name].default)
    try:
        return name, value == 'true' if kind is bool else kind(value)
    except ValueError:
        raise InvalidSetting(f'{name}: {value!r} is not of type {kind.__name__}') from None


def _tune(study: Study, processes: int, folder: Path) -> int:
    with tqdm(unit='replay', file=sys.stderr) as bar:
        found = tuning.tune(study, processes=processes, on_progress=bar.update)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'params.yaml'
    path.write_text(tuning.yaml(study, found))
    print(tuning.table(found), end='')
    print(f'\n{path}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
