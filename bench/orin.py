# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Four policies on a simulated Jetson AGX Orin 64 GB, beside what the paper reports.

Two models, each at a single robot's load and at saturation, with fine-tuning always pending and
with corrections as they come. Nothing here was measured on a Jetson. Results:
bench/results/orin.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.options import Options
from bench.common.results import Reported, Result, Table
from bench.common.running import Run, run_benchmark, Samples
from mace_ros.simulation import arrival_trace
from mace_ros.simulation.replay import summary, Target
from mace_ros.simulation.study import run as replay_all, Source, Study, tasks_of

DEVICE = 'orin-agx-64'
# Model, multiple of the trace's rate, and the requests with learning always and with corrections.
LOADS = {
    '1B, single robot': ('llama-3.2-1b', 0.01, 300, 1000),
    '1B, saturation': ('llama-3.2-1b', 0.12, 1000, 1000),
    '3B, single robot': ('llama-3.2-3b', 0.01, 300, 1000),
    '3B, saturation': ('llama-3.2-3b', 0.04, 1000, 1000),
}
LEARNING = ('always', 'corrections')
POLICIES = ('mace', 'periodic', 'continuous', 'inference_only')


def options() -> Options:
    """Return the options."""
    result = Options('orin', __doc__, quick='a few requests')
    result.add('--trace', type=Path, metavar='FILE',
               help='CSV in the format of the Azure LLM inference traces (default: Poisson '
               'arrivals with lengths like those of that trace)')
    result.size('--share', 1.0, 0.02, 'share of the requests to replay')
    result.add('--processes', type=int, default=1, help='worker processes (default: %(default)s)')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, evaluate=evaluate)


def measure(run: Run) -> Samples:
    """Replay each load under each policy; return one row per replay."""
    args, rows = run.args, []
    recorded = tuple(arrival_trace.read(args.trace)) if args.trace else ()
    for load, (model, scale, always, corrections) in LOADS.items():
        for learning, count in zip(LEARNING, (always, corrections), strict=True):
            source = Source('trace' if recorded else 'poisson',
                            args.trace.name if recorded else 'poisson', recorded,
                            rate=5.0, scale=scale)
            study = Study(Target(DEVICE, model), source, policies=POLICIES,
                          requests=max(int(count * args.share), 10), learning=learning)
            outcomes = replay_all(tasks_of(study), processes=args.processes)
            rows += [{**summary(o), 'load': load, 'learning': learning} for o in outcomes]
            run.say(f'{load}, {learning}: {study.requests} requests')
    return {'rows': rows}


def evaluate(samples: Samples, run: Run) -> Result:
    """Return a table per load, and how the policy mace compares with the others."""
    rows = {(r['load'], r['learning'], r['policy']): r for r in samples['rows']}
    reported = [
        Reported(f'{load}: mean {name}, mace / {other}',
                 rows[load, 'always', 'mace'][key] / rows[load, 'always', other][key],
                 note='fine-tuning always pending')
        for load in LOADS for name, key in (('TTFT', 'ttft_mean_ms'), ('TPOT', 'tpot_mean_ms'))
        for other in ('periodic', 'continuous') if rows[load, 'always', other][key]]
    reported += [Reported(f'{load}: utilisation of mace',
                          rows[load, 'always', 'mace']['utilisation']) for load in LOADS]
    return Result(
        'orin', samples, reported=reported, tables=[_table(load, rows) for load in LOADS],
        notes=['Simulated: no Jetson was at hand. Times come from data sheets and assumptions.',
               'The first columns are with fine-tuning always pending, the last three with '
               'corrections as they come.'])


def _table(load: str, rows: dict[tuple[str, str, str], dict[str, Any]]) -> Table:
    model, scale, *_ = LOADS[load]
    cells = []
    for policy in POLICIES:
        always, corrections = (rows[load, learning, policy] for learning in LEARNING)
        cells.append([
            policy, always['ttft_ms']['p50'], always['ttft_ms']['p95'], always['tpot_ms']['p50'],
            always['tpot_ms']['p95'], always['slo_attainment'], always['finetune_tokens_per_s'],
            always['utilisation'], corrections['ttft_ms']['p95'], corrections['slo_attainment'],
            corrections['freshness_s']['mean'] if policy != 'inference_only' else None])
    return Table(
        load, ['policy', 'TTFT p50 ms', 'TTFT p95 ms', 'TPOT p50 ms', 'TPOT p95 ms', 'in time',
               'fine-tune tokens/s', 'utilisation', 'TTFT p95 ms, corrections',
               'in time, corrections', 'freshness mean s'], cells,
        note=f'{model}, {scale:g} times the rate of the trace, seed 0')


if __name__ == '__main__':
    main()
