# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The blocks of the colocation benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
import time
from typing import Any

from bench.colocation.checks import OURS, SPLIT, SYSTEMS
from bench.common.load import Arrival, arrivals, prose, Slo, training_sequences
from bench.common.running import Run

PEERS = tuple(s for s in SYSTEMS if s not in OURS)
IN_FLIGHT = 64


class ColocationRun:
    """One run: loads all systems, runs the blocks and collects the samples."""

    def __init__(self, run: Run) -> None:
        """Take options and temporary folder from ``run``."""
        self._run, self._args, self._folder = run, run.args, run.folder
        self.samples: dict[str, Any] = {
            'rate': None, 'requests': [], 'blocks': [], 'waits': [], 'undivided': [],
            'iterations': [], 'crowd': [], 'replans': []}
        self._peers: dict[str, Any] = {}
        self._ours: Any = None

    def prepare(self) -> None:
        """Learn the adapter, load and warm up all systems, and choose the arrival rate."""
        # Imported here, so that --help does not load torch.
        from bench.systems.adapter import publish
        from bench.systems.engine_under_load import EngineUnderLoad, POLICIES
        from mace_ros.api.settings import Settings
        from mace_ros.model.chat import ChatTokenizer
        from mace_ros.model.loading import load_model

        args, run = self._args, self._run
        settings = Settings().updated({
            'model.device': 'cpu', 'model.weight_dtype': args.dtype,
            'model.threads': args.threads})
        self._slo = Slo(settings.slo.ttft_ms, settings.slo.tpot_ms)
        run.say('loading the model and learning a correction for the adapter')
        loaded = load_model('', device='cpu')
        chat = ChatTokenizer(loaded.tokenizer)
        self._encode: Callable[[str], Sequence[int]] = lambda text: chat.prompt(
            [{'role': 'user', 'content': text}])
        ids = training_sequences(loaded.tokenizer.encode(prose()), args.sample_tokens)
        model = loaded.name
        del loaded
        published = publish(settings, self._folder / 'published', lambda text: None)
        self._policies = [s for s in args.systems if s in POLICIES]
        self._ours = EngineUnderLoad(
            settings, published.copy(self._folder / 'served'), ids, lambda text: None)
        dtype = args.peer_dtype or str(self._ours.engine.model.dtype).removeprefix('torch.')
        run.notes.append(
            f'{args.threads} threads; weights of mace_ros: {self._ours.engine.model.weight_dtype} '
            f'(model.weight_dtype {args.dtype}); weights of the peers: {dtype}.')
        self._load_peers(model, published.path, dtype, ids, settings)
        self._warm_up(POLICIES)
        self.samples['rate'] = args.rate
        run.say(f'{args.rate:.3f} arrivals per second, {args.requests} in a block of '
                f'{args.requests / args.rate:.0f} s')

    def measure(self) -> None:
        """Run the blocks."""
        args, run = self._args, self._run
        seconds = args.requests / args.rate
        round_s = 0.0
        for block in range(args.blocks):
            if run.minutes + round_s / 60.0 > args.minutes:
                run.notes.append(
                    f'Stopped after {block} of {args.blocks} blocks at the time limit.')
                break
            began = time.monotonic()
            load = arrivals(self._encode, f'{args.seed}/{block}', count=args.requests,
                            seconds=seconds, tokens=args.prompt_tokens)
            self._undivided(block)
            for system in self._order(block):
                run.say(f'block {block + 1} of {args.blocks}: {system}')
                if system in self._peers:
                    self._try(system, self._peer_block, system, block, load, seconds)
                else:
                    self._own_block(system, block, load, seconds)
            round_s = time.monotonic() - began
        if 'mace' in self._policies:
            run.say(f'{IN_FLIGHT} requests in flight')
            self.samples['crowd'], self.samples['replans'] = self._ours.run_saturated(
                load, 5.0 if args.quick else 60.0, IN_FLIGHT, args.output_tokens)

    def close(self) -> None:
        """Stop all systems."""
        for peer in self._peers.values():
            peer.close()
        if self._ours is not None:
            self._ours.close()

    def _warm_up(self, policies: Sequence[str]) -> None:
        """Run each system once; set the rate from the device time of a request."""
        args = self._args
        self._run.say(f'warming up: {", ".join([*self._policies, *self._peers])}')
        load = arrivals(self._encode, 'warm up', count=3, seconds=1.0, tokens=args.prompt_tokens)
        for policy in policies:
            self._ours.run_block(policy, -1, load[:1 if args.quick else 3], 0.0,
                                 args.output_tokens)
        self._ours.undivided_steps(2)
        for name, peer in list(self._peers.items()):
            self._try(name, peer.warm_up, load[:1], args.output_tokens)
        if args.rate is None:
            alone = self._ours.request_seconds(load, args.output_tokens)
            args.rate = args.busy / alone
            self._run.say(f'a request alone takes {alone:.2f} s')

    def _order(self, block: int) -> list[str]:
        """Return the systems of a block, rotated so that another one begins each time."""
        systems = [s for s in self._args.systems if s in self._policies or (
            s in self._peers and (s == SPLIT or block < self._args.peer_blocks))]
        first = block % len(systems)
        return systems[first:] + systems[:first]

    def _undivided(self, block: int) -> None:
        """Time whole fine-tune steps that run alone on the device."""
        count = 2 if self._args.quick else 5
        seconds = {'engine': self._ours.undivided_steps(count)}
        if SPLIT in self._peers:
            seconds['peft'] = self._peers[SPLIT].whole_steps(count, self._args.threads)
        self.samples['undivided'] += [
            {'whose': whose, 'block': block, 'tokens': self._args.sample_tokens, 'seconds': s}
            for whose, each in seconds.items() for s in each]

    def _own_block(self, system: str, block: int, load: list[Arrival], seconds: float) -> None:
        found = self._ours.run_block(system, block, load, seconds, self._args.output_tokens)
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
        from bench.colocation.peers import make_peer

        for system in PEERS:
            if system not in self._args.systems:
                continue
            if system == 'llama_cpp' and find_spec('llama_cpp') is None:
                self._run.notes.append('llama_cpp was not run: it is not installed.')
                continue
            self._run.say(f'loading {system}')
            peer = self._try(system, partial(
                make_peer, model=model, adapter=adapter, dtype=dtype, samples=ids,
                settings=settings, threads=self._args.threads, folder=self._folder), system)
            if peer is not None:
                self._peers[system] = peer
        self._run.notes.append(
            f'{SPLIT} ran in all blocks, the other peers in {self._args.peer_blocks}.')

    def _try(self, system: str, call: Callable[..., Any], *values: Any) -> Any:
        """Return the result of ``call``; drop a peer that fails and note why."""
        from bench.systems.peers.worker import PeerFailed

        try:
            return call(*values)
        except PeerFailed as error:
            self._run.say(f'{system} failed: {error}')
            self._run.notes.append(f'{system} was dropped: {str(error).splitlines()[0]}.')
            peer = self._peers.pop(system, None)
            if peer is not None:
                peer.close()
            return None
