# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Answers and learning on one CPU: our policies and what people use today, side by side.

All systems get the same Poisson arrivals, in blocks that interleave within one run, with
an adapter attached and fine-tuning always pending. Results: bench/results/colocation.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
import os
from pathlib import Path
import tempfile
import time
from typing import Any

from bench.colocation_checks import checks, reported, SPLIT, SYSTEMS, table
from bench.load import Arrival, arrivals, prose, samples as cut, Slo
from bench.plot import draw
from bench.report import summary
from bench.results import check, Recorder, Result

PEERS = tuple(s for s in SYSTEMS if s not in (
    'mace', 'inference_only', 'continuous', 'periodic', 'static_split'))
IN_FLIGHT = 64


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    result = argparse.ArgumentParser(prog='python -m bench.colocation', description=__doc__.strip())
    add = result.add_argument
    add('--quick', action='store_true',
        help='a few requests only, within five minutes: says that all runs, not how well')
    add('--blocks', type=int, help='interleaved blocks (default: 6; quick: 2)')
    add('--requests', type=int, help='requests per block and system (default: 20; quick: 2)')
    add('--peer-blocks', type=int,
        help=f'blocks of the peers but {SPLIT} (default: 3; quick: 1)')
    add('--systems', nargs='+', choices=list(SYSTEMS), default=list(SYSTEMS), metavar='SYSTEM',
        help=f'which ones to run, of {", ".join(SYSTEMS)} (default: all)')
    add('--busy', type=float, default=0.4,
        help='share of the device that answers are to keep busy (default: %(default)s)')
    add('--rate', type=float, help='arrivals per second, instead of --busy')
    add('--prompt-tokens', type=int, default=64, help='(default: %(default)s)')
    add('--output-tokens', type=int, default=32, help='(default: %(default)s)')
    add('--sample-tokens', type=int, default=128, help='of a fine-tune step (default: %(default)s)')
    add('--dtype', default='auto', help='model.weight_dtype of our engine (default: %(default)s)')
    add('--peer-dtype', default='',
        help="precision of the peers' weights (default: that of our engine)")
    add('--threads', type=int, default=0, help='of a system, all in all (default: one per core)')
    add('--minutes', type=float, default=95.0,
        help='begin no block that would not end by then (default: %(default)s)')
    add('--seed', type=int, default=0, help='of arrivals and prompts (default: %(default)s)')
    add('--results', type=Path, metavar='FOLDER', help='where to write the results')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    defaults = (2, 2, 1) if args.quick else (6, 20, 3)
    for name, default in zip(('blocks', 'requests', 'peer_blocks'), defaults, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.threads = args.threads or len(os.sched_getaffinity(0))
    recorder = Recorder(vars(args), quick=args.quick)
    with tempfile.TemporaryDirectory(prefix='mace-bench-') as folder:
        run = Run(args, Path(folder))
        try:
            run.prepare()
            run.measure()
        finally:
            run.close()
    samples = run.samples
    found = [*checks(samples), check('minutes that the run took', run.minutes,
                                     '<= 5' if args.quick else '<= 100')]
    result = Result('colocation', samples, found, reported(samples), [table(samples)], run.notes)
    path = recorder.write(result, args.results)
    if not draw(samples, path.with_suffix('.svg')):
        print('no picture: matplotlib is not importable')
    print(f'\n{summary(result)}\n\n{path}')


class Run:
    """One run of the benchmark, from loading to the samples."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Begin; ``folder`` is for files that nobody needs later on."""
        self._args, self._folder = args, folder
        self._begun = time.monotonic()
        self.notes: list[str] = []
        self.samples: dict[str, Any] = {
            'rate': None, 'requests': [], 'blocks': [], 'waits': [], 'undivided': [],
            'iterations': [], 'crowd': []}
        self._peers: dict[str, Any] = {}
        self._served: Any = None

    @property
    def minutes(self) -> float:
        """Minutes since the beginning."""
        return (time.monotonic() - self._begun) / 60.0

    def say(self, text: str) -> None:
        """Tell what goes on."""
        print(f'[{self.minutes:5.1f} min] {text}', flush=True)

    def prepare(self) -> None:
        """Learn the adapter, load all systems, warm them up and find the rate of arrivals."""
        # Only here, so that --help answers at once.
        from bench.adapter import publish
        from bench.serving import POLICIES, precision_of, Served
        from mace_ros.api.settings import Settings
        from mace_ros.model.chat import ChatTokenizer
        from mace_ros.model.loading import load_model

        args = self._args
        settings = Settings().updated({
            'model.device': 'cpu', 'model.weight_dtype': args.dtype,
            'model.threads': args.threads})
        self._slo = Slo(settings.slo.ttft_ms, settings.slo.tpot_ms)
        self.say('loading the model and learning a correction for the adapter')
        loaded = load_model('', device='cpu')
        chat = ChatTokenizer(loaded.tokenizer)
        self._encode: Callable[[str], Sequence[int]] = lambda text: chat.prompt(
            [{'role': 'user', 'content': text}])
        ids = cut(loaded.tokenizer.encode(prose()), args.sample_tokens)
        model = loaded.name
        del loaded
        published = publish(settings, self._folder / 'published', lambda text: None)
        self._policies = [s for s in args.systems if s in POLICIES]
        self._served = Served(settings, published.copy(self._folder / 'served'), ids,
                              lambda text: None)
        dtype = args.peer_dtype or str(self._served.engine.model.dtype).removeprefix('torch.')
        self.notes.append(
            f'{args.threads} threads; weights of our engine '
            f'{precision_of(self._served.engine)} (model.weight_dtype {args.dtype}), of the peers '
            f'{dtype}.')
        self._load_peers(model, published.path, dtype, ids, settings)
        self.say(f'warming up: {", ".join([*self._policies, *self._peers])}')
        warm = arrivals(self._encode, 'warm up', count=3, seconds=1.0, tokens=args.prompt_tokens)
        for policy in POLICIES:
            self._served.run_block(policy, -1, warm[:1 if args.quick else 3], 0.0,
                                   args.output_tokens)
        self._served.undivided_steps(2)
        for name, peer in list(self._peers.items()):
            self._try(name, peer.warm_up, warm[:1], args.output_tokens)
        if args.rate is None:
            alone = self._served.request_seconds(warm, args.output_tokens)
            args.rate = args.busy / alone
            self.say(f'a request alone takes {alone:.2f} s')
        self.samples['rate'] = args.rate
        self.say(f'{args.rate:.3f} arrivals per second, {args.requests} in a block of '
                 f'{args.requests / args.rate:.0f} s')

    def measure(self) -> None:
        """Run the blocks."""
        args = self._args
        seconds = args.requests / args.rate
        round_s = 0.0
        for block in range(args.blocks):
            if self.minutes + round_s / 60.0 > args.minutes:
                self.notes.append(f'Stopped after {block} of {args.blocks} blocks, for the time.')
                break
            began = time.monotonic()
            load = arrivals(self._encode, f'{args.seed}/{block}', count=args.requests,
                            seconds=seconds, tokens=args.prompt_tokens)
            self._undivided(block)
            for system in self._order(block):
                self.say(f'block {block + 1} of {args.blocks}: {system}')
                if system in self._peers:
                    self._try(system, self._peer_block, system, block, load, seconds)
                else:
                    self._own_block(system, block, load, seconds)
            round_s = time.monotonic() - began
        if 'mace' in self._policies:
            self.say(f'{IN_FLIGHT} requests in flight')
            self.samples['crowd'] = self._served.crowd(
                load, 5.0 if args.quick else 60.0, IN_FLIGHT, args.output_tokens)

    def close(self) -> None:
        """End all processes."""
        for peer in self._peers.values():
            peer.close()
        if self._served is not None:
            self._served.close()

    def _order(self, block: int) -> list[str]:
        """Return the systems of a block; each time another one begins."""
        systems = [s for s in self._args.systems if s in self._policies or (
            s in self._peers and (s == SPLIT or block < self._args.peer_blocks))]
        turn = block % len(systems)
        return systems[turn:] + systems[:turn]

    def _undivided(self, block: int) -> None:
        """Measure whole fine-tune steps that have the device for themselves."""
        count = 2 if self._args.quick else 5
        spent = {'engine': self._served.undivided_steps(count)}
        if SPLIT in self._peers:
            spent['peft'] = self._peers[SPLIT].whole_steps(count, self._args.threads)
        self.samples['undivided'] += [
            {'whose': whose, 'block': block, 'tokens': self._args.sample_tokens, 'seconds': s}
            for whose, each in spent.items() for s in each]

    def _own_block(self, system: str, block: int, load: list[Arrival], seconds: float) -> None:
        found = self._served.run_block(system, block, load, seconds, self._args.output_tokens)
        self.samples['requests'] += found.requests
        self.samples['blocks'].append(found.block)
        self.samples['waits'] += found.waits
        if system == 'mace':
            self.samples['iterations'] += found.iterations

    def _peer_block(self, system: str, block: int, load: list[Arrival], seconds: float) -> None:
        rows, row = self._peers[system].run_block(
            system, block, load, seconds, self._args.output_tokens, self._slo)
        self.samples['requests'] += rows
        self.samples['blocks'].append(row)

    def _load_peers(self, model: str, adapter: Path, dtype: str, ids: Sequence[Sequence[int]],
                    settings: Any) -> None:
        from bench.colocation_peers import make_peer

        for system in PEERS:
            if system not in self._args.systems:
                continue
            if system == 'llama_cpp' and find_spec('llama_cpp') is None:
                self.notes.append('llama_cpp was not run: not importable here.')
                continue
            self.say(f'loading {system}')
            peer = self._try(system, partial(
                make_peer, model=model, adapter=adapter, dtype=dtype, samples=ids,
                settings=settings, threads=self._args.threads, folder=self._folder), system)
            if peer is not None:
                self._peers[system] = peer
        self.notes.append(
            f'{SPLIT} ran in all blocks, the other peers in {self._args.peer_blocks}.')

    def _try(self, system: str, call: Callable[..., Any], *values: Any) -> Any:
        """Return what ``call`` returns; do without a peer that fails, and say why."""
        from bench.peers.worker import PeerFailed

        try:
            return call(*values)
        except PeerFailed as error:
            reason = str(error).splitlines()[0]
            self.say(f'{system} failed: {error}')
            self.notes.append(f'{system} was given up: {reason}.')
            peer = self._peers.pop(system, None)
            if peer is not None:
                peer.close()
            return None


if __name__ == '__main__':
    main()
