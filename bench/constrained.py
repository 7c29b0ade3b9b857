# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Seven free answers beside one of a JSON schema: what the constraint costs the others.

Blocks with a constrained eighth answer alternate with blocks in which it is free, too. Measured are
the time per token of the seven, and the time that masks take on the host, relative to the
passes. Results: bench/results/constrained.json.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
import json
import statistics
from typing import Any

from bench.common.options import Options, settings_from
from bench.common.results import Check, check, paired, Ratio, Reported, Result, Table
from bench.common.running import Run, run_benchmark, Samples
from mace_ros.telemetry.observer import IterationObserver

FREE = 7
TEXT = 'Tell me what a robot needs in room {}.'
# Its array has no end, so that the answer is constrained for all of its tokens.
SCHEMA = json.dumps({'type': 'object', 'required': ['steps'], 'properties': {'steps': {
    'type': 'array', 'minItems': 1000, 'items': {
        'type': 'object', 'required': ['action', 'place', 'speed'], 'properties': {
            'action': {'enum': ['drive', 'turn', 'wait']}, 'place': {'type': 'string'},
            'speed': {'type': 'number', 'minimum': 0, 'maximum': 2}}}}}})


def options() -> Options:
    """Return the options."""
    result = Options('constrained', __doc__, quick='two short pairs')
    result.size('--pairs', 11, 2, 'pairs of blocks with and without a constrained answer')
    result.size('--output-tokens', 96, 16, 'tokens of an answer')
    result.threads()
    result.parameters()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    run_benchmark(options(), arguments, measure=measure, evaluate=evaluate)


def evaluate(samples: Samples, run: Run) -> Result:
    """Return the results of the samples."""
    return Result('constrained', samples, checks(samples), reported(samples), [table(samples)])


class PhaseSeconds(IterationObserver):
    """The seconds of each phase of the iterations."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def phase(self, name: str, began: float, ended: float, values: Mapping[str, float]) -> None:
        """Add a phase that has ended."""
        self.seconds[name] += ended - began


def measure(run: Run) -> Samples:
    """Run the blocks in turn; return a row for each."""
    from mace_ros.engine.builder import build_engine

    args = run.args
    settings = settings_from(args.set).updated({
        'model.threads': args.threads, 'finetune.budget': 0.0})
    engine = build_engine(settings, storage=run.folder, progress=run.say)
    engine.chat.end_tokens = frozenset()     # all answers have the requested length
    try:
        block(engine, -1, constrained=True, tokens=args.output_tokens)     # warm-up
        rows = []
        for pair in range(args.pairs):
            # The order alternates, so that a drift of the machine affects both alike.
            for constrained in ((False, True) if pair % 2 else (True, False)):
                row = block(engine, pair, constrained=constrained, tokens=args.output_tokens)
                run.say(f'{"constrained" if constrained else "free"}: {row["tpot_ms"]:.2f} ms')
                rows.append(row)
        return {'blocks': rows, 'device': engine.hardware.name}
    finally:
        engine.close()


def block(engine: Any, pair: int, *, constrained: bool, tokens: int) -> dict[str, Any]:
    """Answer eight queries at once; return the mean time per token of the first seven."""
    from mace_ros.api.events import Query, Response, ResponseFormat

    phases, found = PhaseSeconds(), dict[str, Any]()
    queries = [Query(TEXT.format(i), id=f'{pair}/{constrained}/{i}', max_tokens=tokens,
                     temperature=0.0, no_learn=True) for i in range(FREE + 1)]
    if constrained:
        queries[-1] = Query(
            queries[-1].text, id=queries[-1].id, max_tokens=tokens, temperature=0.0,
            no_learn=True, response_format=ResponseFormat.JSON_SCHEMA, response_schema=SCHEMA)
    engine.observe(phases)
    for query in queries:
        engine.submit(query)
    while len(found) < len(queries):
        found |= {e.query_id: e for e in engine.step().events if isinstance(e, Response)}
    engine.unobserve(phases)
    for response in found.values():
        if response.output_tokens != tokens:
            raise AssertionError(f'{response.query_id}: {response.error or "ended early"}')
    seconds = phases.seconds
    return {'pair': pair, 'constrained': constrained,
            'tpot_ms': statistics.mean(found[q.id].tpot_ms for q in queries[:FREE]),
            'masks_ms': seconds['masks'] * 1e3, 'sample_ms': seconds['sample'] * 1e3,
            'iterations_ms': seconds['iteration'] * 1e3}


# -- checks ------------------------------------------------------------------------------


def checks(samples: Samples) -> list[Check]:
    """Return the checks."""
    ratio, share = tpot_ratio(samples), masks_share(samples)
    return [
        check('time per token of seven free answers, beside a constrained one / a free one',
              ratio.median, '<= 1.05', ratio.spread),
        check('host time of masks / time of the iterations', share, '<= 0.02',
              'on CUDA the device computes meanwhile')]


def tpot_ratio(samples: Samples) -> Ratio:
    """Return the ratio of the times per token, per pair."""
    by = {constrained: {b['pair']: b['tpot_ms'] for b in samples['blocks']
                        if b['constrained'] is constrained} for constrained in (True, False)}
    return paired(by[True], by[False])


def masks_share(samples: Samples) -> float:
    """Return the median share of the time of constrained blocks that masks take."""
    return statistics.median(b['masks_ms'] / b['iterations_ms'] for b in samples['blocks']
                             if b['constrained'])


def reported(samples: Samples) -> list[Reported]:
    """Return numbers without a target that explain the checks."""
    return [Reported(f'{phase} ms of a block, {"constrained" if constrained else "free"}',
                     statistics.median(b[f'{phase}_ms'] for b in samples['blocks']
                                       if b['constrained'] is constrained))
            for phase in ('masks', 'sample', 'iterations') for constrained in (False, True)]


def table(samples: Samples) -> Table:
    """Return the table with a row for each pair of blocks."""
    by = {(b['pair'], b['constrained']): b['tpot_ms'] for b in samples['blocks']}
    return Table('Milliseconds per token of the seven', ['pair', 'all free', 'one constrained'],
                 [[str(p), by[p, False], by[p, True]] for p in sorted({p for p, _ in by})],
                 samples['device'])


if __name__ == '__main__':
    main()
