# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The simulator against the real engine: the same arrivals, on this machine and in a replay.

Blocks alternate: from those with even numbers the machine is fitted, the arrivals of the
others are replayed with it. Results: bench/results/simulation.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
import json
from pathlib import Path
import tempfile
import time
from typing import Any

from bench.load import Arrival, prompts, prose, samples as cut
from bench.report import summary
from bench.results import Check, check, percentile, Recorder, Reported, Result, Table

# Lengths of the trace are divided by this: a small model on a CPU has the time per request
# that a larger one has on a robot's GPU.
SHORTER = 8
LEAST_PROMPT, MOST_PROMPT = 48, 512     # the chat template alone takes some 30
REPLAYS = 5      # of each block, with different noise
WITHIN = '-0.15 to 0.15'
POLICIES = ('mace', 'continuous')


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    result = argparse.ArgumentParser(prog='python -m bench.simulation', description=__doc__.strip())
    add = result.add_argument
    add('--quick', action='store_true', help='two small blocks: says that all runs, not how well')
    add('--trace', type=Path, metavar='FILE',
        help='CSV in the format of the Azure LLM inference traces (default: Poisson arrivals)')
    add('--blocks', type=int, help='pairs of blocks per policy (default: 4; quick: 1)')
    add('--requests', type=int, help='requests of a block (default: 20; quick: 3)')
    add('--policies', nargs='+', choices=POLICIES, default=list(POLICIES), metavar='POLICY',
        help=f'of {", ".join(POLICIES)} (default: all); the checks are about mace')
    add('--minutes', type=float, default=60.0,
        help='begin no pair of blocks after so long (default: %(default)s)')
    add('--busy', type=float, default=0.4,
        help='share of the device that answers are to keep busy (default: %(default)s)')
    add('--sample-tokens', type=int, default=128, help='of a fine-tune step (default: %(default)s)')
    add('--seed', type=int, default=0, help='(default: %(default)s)')
    add('--calibrate', type=Path, metavar='FILE',
        help='write there what --device this-machine of the simulator reads')
    add('--record', action='store_true', help='have the errors printed on every report')
    add('--results', type=Path, metavar='FOLDER', help='where to write the results')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    args.blocks = args.blocks or (1 if args.quick else 4)
    args.requests = args.requests or (3 if args.quick else 20)
    recorder = Recorder(vars(args), quick=args.quick)
    with tempfile.TemporaryDirectory(prefix='mace-bench-') as folder:
        run = Run(args, Path(folder))
        samples = run.measure()
        if args.calibrate is not None:
            args.calibrate.write_text(json.dumps(run.calibration) + '\n')
    result = Result('simulation', samples, checks(samples), reported(samples), [table(samples)], [
        f'Lengths of the trace divided by {SHORTER}; fine-tuning always pending.'])
    path = recorder.write(result, args.results)
    if args.record:
        record(json.loads(path.read_text()), args)
    print(f'{summary(result)}\n\n{path}')


class Run:
    """One run of the benchmark."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Load the engine."""
        # Only here, so that --help answers at once.
        from bench.serving import Served
        from mace_ros.api.settings import Settings
        from mace_ros.model.chat import ChatTokenizer
        from mace_ros.model.loading import load_model
        import mace_ros.simulation.replay  # noqa: F401 - all code as it is now

        self._args, self._begun = args, time.monotonic()
        self._settings = Settings().updated({'model.device': 'cpu'})
        loaded = load_model('', device='cpu')
        chat = ChatTokenizer(loaded.tokenizer)
        self._encode = lambda text: chat.prompt([{'role': 'user', 'content': text}])
        ids = cut(loaded.tokenizer.encode(prose()), args.sample_tokens)
        del loaded
        self._served = Served(self._settings, folder, ids, print)
        self._seen: list[Any] = []      # measurements of the blocks that are fitted
        self._overheads: list[float] = []      # of iterations, admissions included
        self._admissions: list[float] = []
        self.calibration: dict[str, Any] = {}

    def measure(self) -> dict[str, Any]:
        """Run all blocks, then replay those that were not fitted; return the samples."""
        args, cost = self._args, self._served.engine.scheduler.cost
        arrivals = self._arrivals(2 * args.blocks * args.requests)
        alone = sum(cost.pass_s(0, 0, len(a.ids), len(a.ids) ** 2 // 2)
                    + (a.max_tokens - 1) * cost.pass_s(1, len(a.ids)) for a in arrivals)
        spread = alone / args.busy / arrivals[-1].at     # of the time between arrivals
        self._served.run_block('mace', -1, [replace(a, at=0.0) for a in arrivals[:2]], 0.0, 1)
        print(f'requests alone take {alone / len(arrivals):.2f} s', flush=True)
        self._listen()
        real: list[dict[str, Any]] = []
        for block in range(2 * args.blocks):
            if block % 2 == 0 and block and time.monotonic() > self._begun + 60.0 * args.minutes:
                break
            some = arrivals[block * args.requests:(block + 1) * args.requests]
            begin = some[0].at
            load = [replace(a, at=(a.at - begin) * spread) for a in some]
            for policy in args.policies:
                real.append(self._block(policy, block, load))
                print(f'block {block + 1} of {2 * args.blocks}: {policy}', flush=True)
        self._served.close()
        self._fit()
        return {'fitted': [r for r in real if r['block'] % 2 == 0],
                'real': [r for r in real if r['block'] % 2],
                'simulated': [self._replay(r, seed) for r in real if r['block'] % 2
                              for seed in range(REPLAYS)]}

    def _arrivals(self, count: int) -> list[Arrival]:
        from mace_ros.simulation import arrival_trace

        seed = self._args.seed
        found = (arrival_trace.thinned(arrival_trace.read(self._args.trace), 0.1, count, seed)
                 if self._args.trace else arrival_trace.poisson(1.0, count, seed))
        made = []
        for number, each in enumerate(found):
            tokens = min(max(each.prompt_tokens // SHORTER, LEAST_PROMPT), MOST_PROMPT)
            text, ids = prompts(self._encode, f'{seed}/{number}', 1, tokens)[0]
            made.append(Arrival(each.at, text, tuple(ids), max(each.output_tokens // SHORTER, 2)))
        return made

    def _listen(self) -> None:
        """Hear of each measurement that the scheduler hears of, and of each admission."""
        from bench.probe import after, before

        before(self._served.engine.scheduler, 'observe',
               lambda measurement, now: self._seen.append(measurement))
        after(self._served.engine, '_admit',
              lambda began, ended, events: self._admissions.append(ended - began))

    def _block(self, policy: str, block: int, load: list[Arrival]) -> dict[str, Any]:
        """Run a block; its measurements are kept if it is one to fit."""
        seen, admissions = len(self._seen), len(self._admissions)
        found = self._served.run_block(policy, block, load, load[-1].at, 1)
        if block % 2:
            del self._seen[seen:], self._admissions[admissions:]
        else:
            self._overheads += [i.wall_s - i.measured_s
                                for i in self._served.engine.log.iterations]
        return {
            'policy': policy, 'block': block,
            'arrivals': [[a.at, len(a.ids), a.max_tokens] for a in load],
            'ttft_ms': [row['ttft_ms'] for row in found.requests],
            'tpot_ms': [row['tpot_ms'] for row in found.requests],
            'finetune_tokens': found.block['finetune_tokens'],
            'busy_s': found.block['busy_s'], 'wall_s': found.block['wall_s']}

    def _fit(self) -> None:
        """Fit the machine to what was measured, and keep how far single times are off."""
        from mace_ros.simulation.cost_file import to_dict

        cost = deepcopy(self._served.engine.scheduler.cost)
        passes = [(m.plan.shape, m.pass_s) for m in self._seen if m.pass_s > 0.0]
        segments = [each for m in self._seen for each in m.segments]
        for _ in range(3):
            cost.calibrate(passes)
            for each in segments:
                cost.calibrate([each])
        self.calibration = {
            'cost_model': to_dict(cost),
            'pass_ratios': [s / cost.pass_s(*shape) for shape, s in passes],
            'segment_ratios': [s / cost.segment_s(x.kind, x.tokens) for x, s in segments],
            'overhead_s': ((sum(self._overheads) - sum(self._admissions))
                           / len(self._overheads)),
            'admission_s': sum(self._admissions) / len(self._admissions)}

    def _replay(self, real: dict[str, Any], seed: int) -> dict[str, Any]:
        """Replay a block that was really run."""
        from mace_ros.simulation import arrival_trace
        from mace_ros.simulation.replay import Load, replay, Target, tpot_s

        with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
            json.dump(self.calibration, file)
            file.flush()
            outcome = replay(
                Target('this-machine', 'smollm2-135m', calibration=Path(file.name)),
                self._settings, real['policy'],
                Load([arrival_trace.Arrival(*a) for a in real['arrivals']], 'always',
                     sample_tokens=self._args.sample_tokens, seed=seed))
        return {
            'policy': real['policy'], 'block': real['block'], 'seed': seed,
            'ttft_ms': [1e3 * ((r.first_token_at or 0.0) - r.arrival) for r in outcome.requests],
            'tpot_ms': [1e3 * tpot_s(r) for r in outcome.requests],
            'finetune_tokens': outcome.finetune_tokens,
            'busy_s': sum(outcome.stages.values()), 'wall_s': outcome.ends_at}


# -- what the samples say ------------------------------------------------------------------


def found(rows: Sequence[dict[str, Any]], policy: str) -> dict[str, float]:
    """Return the numbers of one policy, over all blocks."""
    own = [r for r in rows if r['policy'] == policy]

    def pooled(column: str) -> list[float]:
        return [value for r in own for value in r[column]]

    wall_s = sum(r['wall_s'] for r in own)
    return {
        **{f'{name} p{percent}': percentile(pooled(column), percent)
           for name, column in (('TTFT', 'ttft_ms'), ('TPOT', 'tpot_ms')) for percent in (50, 95)},
        'fine-tune tokens': sum(r['finetune_tokens'] for r in own) / wall_s,
        'utilisation': sum(r['busy_s'] for r in own) / wall_s}


def policies(samples: dict[str, Any]) -> list[str]:
    """Return the policies that were run."""
    return list(dict.fromkeys(row['policy'] for row in samples['real']))


def errors(samples: dict[str, Any], policy: str) -> dict[str, float]:
    """Return how far the simulation is off, as a share of what is real."""
    real, simulated = (found(samples[name], policy) for name in ('real', 'simulated'))
    return {name: simulated[name] / value - 1.0 for name, value in real.items()}


def checks(samples: dict[str, Any]) -> list[Check]:
    """Return the checks."""
    off = errors(samples, 'mace')
    return [check(f'{name} under mace, simulated against real', off[name], WITHIN)
            for name in ('TTFT p50', 'TTFT p95', 'fine-tune tokens')]


def reported(samples: dict[str, Any]) -> list[Reported]:
    """Return the errors that nothing hangs on."""
    return [Reported(f'{name} under {policy}, simulated against real', value, WITHIN)
            for policy in policies(samples) for name, value in errors(samples, policy).items()
            if policy != 'mace' or name in ('TPOT p50', 'TPOT p95', 'utilisation')]


def table(samples: dict[str, Any]) -> Table:
    """Return real and simulated numbers side by side."""
    names = list(errors(samples, 'mace'))
    return Table('Real and simulated', ['policy', '', *names], [
        [policy, kind, *(found(samples[kind], policy)[name] for name in names)]
        for policy in policies(samples) for kind in ('real', 'simulated')],
        'ms; fine-tune tokens per second')


def record(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Write down the errors where every report of a simulation finds them."""
    from mace_ros.simulation.report import VALIDATION

    machine = result['machine']
    VALIDATION.write_text(json.dumps({
        'model': 'SmolLM2-135M', 'machine': f'{machine["cores"]} cores of {machine["cpu"]}',
        'commit': machine['commit'], 'requests': args.requests,
        'blocks': sum(row['policy'] == 'mace' for row in result['samples']['real']),
        'errors': {name: round(error, 3)
                   for name, error in errors(result['samples'], 'mace').items()}}, indent=1) + '\n')


if __name__ == '__main__':
    main()
