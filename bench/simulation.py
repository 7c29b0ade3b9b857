# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The simulator compared with the real engine: the same arrivals on this machine and in a replay.

Blocks alternate: those with even numbers calibrate the simulated device, on which the
arrivals of the others are replayed. Results: bench/results/simulation.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
import json
from pathlib import Path
import tempfile
from typing import Any

from bench.common.load import Arrival, prompts, prose, training_sequences
from bench.common.options import Options
from bench.common.results import Check, check, percentile, Reported, Result, Table
from bench.common.running import Run, run_benchmark, Samples

# Lengths of the trace are divided by this, so that a request takes a small model on a CPU as
# long as it takes a larger model on a robot's GPU.
SHORTER = 8
MIN_PROMPT, MAX_PROMPT = 48, 512     # tokens; the chat template alone has about 30
REPLAYS = 5      # of each block, with different noise
WITHIN = '-0.15 to 0.15'
POLICIES = ('mace', 'continuous')


def options() -> Options:
    """Return the options."""
    result = Options('simulation', __doc__, quick='two small blocks')
    add = result.add
    add('--trace', type=Path, metavar='FILE',
        help='CSV in the format of the Azure LLM inference traces (default: Poisson arrivals)')
    result.size('--blocks', 4, 1, 'pairs of blocks per policy')
    result.size('--requests', 20, 3, 'requests of a block')
    add('--policies', nargs='+', choices=POLICIES, default=list(POLICIES), metavar='POLICY',
        help=f'policies to run, of {", ".join(POLICIES)} (default: all); the checks are about mace')
    add('--minutes', type=float, default=60.0,
        help='start no pair of blocks later than this (default: %(default)s)')
    add('--busy', type=float, default=0.4,
        help='share of the device time that serving takes (default: %(default)s)')
    add('--sample-tokens', type=int, default=128,
        help='tokens of a fine-tune step (default: %(default)s)')
    add('--seed', type=int, default=0, help='(default: %(default)s)')
    add('--calibrate', type=Path, metavar='FILE',
        help="write the calibration for the simulator's --device this-machine to FILE")
    add('--record', action='store_true', help='print the errors found here on every report')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    recorded = run_benchmark(options(), arguments, measure=measure, evaluate=evaluate)
    args = recorded.run.args
    if args.record:
        record(json.loads(recorded.path.read_text()), args.requests)


def measure(run: Run) -> Samples:
    """Run and replay all blocks; return the samples."""
    comparison = Comparison(run)
    samples = comparison.measure()
    if run.args.calibrate is not None:
        run.args.calibrate.write_text(json.dumps(comparison.calibration) + '\n')
    return samples


def evaluate(samples: Samples, run: Run) -> Result:
    """Return the results of the samples."""
    return Result('simulation', samples, checks(samples), reported(samples), [table(samples)],
                  [f'Lengths of the trace divided by {SHORTER}; fine-tuning always pending.'])


class Comparison:
    """One run: real blocks, the calibration from half of them, and replays of the others."""

    def __init__(self, run: Run) -> None:
        """Load the engine."""
        # Imported here, so that --help does not load torch.
        from bench.systems.engine_under_load import EngineUnderLoad
        from bench.systems.probe import MeasurementLog
        from mace_ros.api.settings import Settings
        from mace_ros.model.chat import ChatTokenizer
        from mace_ros.model.loading import load_model
        import mace_ros.simulation.replay  # noqa: F401 - imported now, if its file changes later

        self._run, self._args = run, run.args
        self._settings = Settings().updated({'model.device': 'cpu'})
        loaded = load_model('', device='cpu')
        chat = ChatTokenizer(loaded.tokenizer)
        self._encode = lambda text: chat.prompt([{'role': 'user', 'content': text}])
        ids = training_sequences(loaded.tokenizer.encode(prose()), self._args.sample_tokens)
        del loaded
        self._engine = EngineUnderLoad(self._settings, run.folder, ids, print)
        self._measurements = MeasurementLog()
        # Of the blocks that calibrate: seconds of host work and of admissions.
        self._overheads: list[float] = []
        self._receiving_s, self._admitted = 0.0, 0
        self.calibration: dict[str, Any] = {}

    def measure(self) -> Samples:
        """Run all blocks, then replay those that do not calibrate."""
        args, cost = self._args, self._engine.engine.scheduler.cost
        arrivals = self._arrivals(2 * args.blocks * args.requests)
        alone = sum(cost.pass_s(0, 0, len(a.ids), len(a.ids) ** 2 // 2)
                    + (a.max_tokens - 1) * cost.pass_s(1, len(a.ids)) for a in arrivals)
        stretch = alone / args.busy / arrivals[-1].at     # of the times between arrivals
        self._engine.run_block('mace', -1, [replace(a, at=0.0) for a in arrivals[:2]], 0.0, 1)
        self._run.say(f'a request alone takes {alone / len(arrivals):.2f} s')
        real: list[dict[str, Any]] = []
        for block in range(2 * args.blocks):
            if block % 2 == 0 and block and self._run.minutes > args.minutes:
                break
            chosen = arrivals[block * args.requests:(block + 1) * args.requests]
            load = [replace(a, at=(a.at - chosen[0].at) * stretch) for a in chosen]
            for policy in args.policies:
                real.append(self._block(policy, block, load))
                self._run.say(f'block {block + 1} of {2 * args.blocks}: {policy}')
        self._engine.close()
        self._calibrate()
        return {'fitted': [r for r in real if r['block'] % 2 == 0],
                'real': [r for r in real if r['block'] % 2],
                'simulated': [self._replay(r, seed) for r in real if r['block'] % 2
                              for seed in range(REPLAYS)]}

    def _arrivals(self, count: int) -> list[Arrival]:
        """Return requests with the arrival times and shortened lengths of the trace."""
        from mace_ros.simulation import arrival_trace

        seed = self._args.seed
        trace = (arrival_trace.thinned(arrival_trace.read(self._args.trace), 0.1, count, seed)
                 if self._args.trace else arrival_trace.poisson(1.0, count, seed))
        made = []
        for number, each in enumerate(trace):
            tokens = min(max(each.prompt_tokens // SHORTER, MIN_PROMPT), MAX_PROMPT)
            text, ids = prompts(self._encode, f'{seed}/{number}', 1, tokens)[0]
            made.append(Arrival(each.at, text, tuple(ids), max(each.output_tokens // SHORTER, 2)))
        return made

    def _block(self, policy: str, block: int, load: list[Arrival]) -> dict[str, Any]:
        """Run a block; keep its measurements if it calibrates the simulator."""
        calibrates = block % 2 == 0
        if calibrates:
            self._engine.engine.observe(self._measurements)
        found = self._engine.run_block(policy, block, load, load[-1].at, 1)
        if calibrates:
            self._engine.engine.unobserve(self._measurements)
            iterations = self._engine.probe.log.iterations
            self._overheads += [i.wall_s - i.measured_s for i in iterations]
            self._receiving_s += sum(i.receive_s for i in iterations)
            self._admitted += len(load)
        return {
            'policy': policy, 'block': block,
            'arrivals': [[a.at, len(a.ids), a.max_tokens] for a in load],
            'ttft_ms': [row['ttft_ms'] for row in found.requests],
            'tpot_ms': [row['tpot_ms'] for row in found.requests],
            'finetune_tokens': found.block['finetune_tokens'],
            'busy_s': found.block['busy_s'], 'wall_s': found.block['wall_s']}

    def _calibrate(self) -> None:
        """Fit the cost model to the measurements; keep the relative errors as noise."""
        from mace_ros.scheduling.cost_file import to_dict

        cost = deepcopy(self._engine.engine.scheduler.cost)
        passes = [(m.plan.shape, m.pass_s) for m in self._measurements.all if m.pass_s > 0.0]
        segments = [each for m in self._measurements.all for each in m.segments]
        for _ in range(3):
            cost.calibrate(passes)
            for each in segments:
                cost.calibrate([each])
        self.calibration = {
            'cost_model': to_dict(cost),
            'pass_ratios': [s / cost.pass_s(*shape) for shape, s in passes],
            'segment_ratios': [s / cost.segment_s(x.kind, x.tokens) for x, s in segments],
            'overhead_s': (sum(self._overheads) - self._receiving_s) / len(self._overheads),
            'admission_s': self._receiving_s / self._admitted}

    def _replay(self, real: dict[str, Any], seed: int) -> dict[str, Any]:
        """Replay a block on the calibrated device."""
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


# -- checks ------------------------------------------------------------------------------


def numbers(rows: Sequence[dict[str, Any]], policy: str) -> dict[str, float]:
    """Return the numbers of a policy, over all blocks."""
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
    """Return the policies that ran."""
    return list(dict.fromkeys(row['policy'] for row in samples['real']))


def errors(samples: dict[str, Any], policy: str) -> dict[str, float]:
    """Return the relative errors of the simulation."""
    real, simulated = (numbers(samples[name], policy) for name in ('real', 'simulated'))
    return {name: simulated[name] / value - 1.0 for name, value in real.items()}


def checks(samples: dict[str, Any]) -> list[Check]:
    """Return the checks."""
    off = errors(samples, 'mace')
    return [check(f'{name} under mace, simulated against real', off[name], WITHIN)
            for name in ('TTFT p50', 'TTFT p95', 'fine-tune tokens')]


def reported(samples: dict[str, Any]) -> list[Reported]:
    """Return the errors without a target."""
    return [Reported(f'{name} under {policy}, simulated against real', value, WITHIN)
            for policy in policies(samples) for name, value in errors(samples, policy).items()
            if policy != 'mace' or name in ('TPOT p50', 'TPOT p95', 'utilisation')]


def table(samples: dict[str, Any]) -> Table:
    """Return the table of real and simulated numbers."""
    names = list(errors(samples, 'mace'))
    return Table('Real and simulated', ['policy', '', *names], [
        [policy, kind, *(numbers(samples[kind], policy)[name] for name in names)]
        for policy in policies(samples) for kind in ('real', 'simulated')],
        'ms; fine-tune tokens per second')


def record(result: dict[str, Any], requests: int) -> None:
    """Write the errors to the file from which every report of a simulation reads them."""
    from mace_ros.simulation.report import VALIDATION

    machine = result['machine']
    VALIDATION.write_text(json.dumps({
        'model': 'SmolLM2-135M', 'machine': f'{machine["cores"]} cores of {machine["cpu"]}',
        'commit': machine['commit'], 'requests': requests,
        'blocks': sum(row['policy'] == 'mace' for row in result['samples']['real']),
        'errors': {name: round(error, 3)
                   for name, error in errors(result['samples'], 'mace').items()}}, indent=1) + '\n')


if __name__ == '__main__':
    main()
