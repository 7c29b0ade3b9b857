# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A node that is killed (kill -9) again and again, and started anew on the same storage folder.

A client asks and corrects without a pause. Kills fall at random, and on purpose while
corrections come in, are trained, and a version is saved, recorded and announced. Whatever
was acknowledged must be in the journal, and the version that was announced last, or a newer
one, must serve again. Results: bench/results/durability.json.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
import random
import sqlite3
import sys
import tempfile
import time
from typing import Any

from bench.node import NodeProcess, own_domain
from bench.report import summary
from bench.results import Check, check, Recorder, Reported, Result, Table
from bench.wreck import examine, lost, older, Wreck
from mace_ros.store.layout import JOURNAL

START_S = 250.0
LIFE_S = 12.0           # after it is ready, of a node that is killed at random
WAIT_S = 200.0          # at most, for what a kill is to fall into: a slow machine takes long
# For messages that were on their way, and for Fast DDS (3.2.3) to give up what the killed process
# has locked in shared memory: a client that closes meanwhile crashes.
DRAIN_S = 3.0
ASK_S = 0.2             # between two questions
UNANSWERED = 8          # questions at most, so that a slow machine learns, too
CORRECT_EVERY = 5       # questions; the node learns nearly as fast, so that versions come
BURST = 20              # corrections at once
PROFILES = ('', 'ann')
SYNC_S = 0.02           # that fsync takes, as with an SD card: to save takes some of them
SETTLED_S = 5.0
# Where kills are to fall, by turns.
AIMS = ('any', 'saving', 'intake', 'recording', 'training', 'publishing', 'any', 'starting')
# Where some must have fallen: a version is saved, put on record, and announced.
PHASES = ('intake', 'training', 'saving', 'recording', 'publishing')
ROUNDS, QUICK_ROUNDS = 50, len(AIMS)
# Of a node whose model has random weights: it is ready, and learns, within seconds. The last layers
# of noise alone would learn little.
PARAMETERS: dict[str, Any] = {
    'adapter.target_modules': 'all-linear',
    'model.threads': 1, 'model.weight_dtype': 'float32', 'finetune.learning_rate': 0.01,
    'finetune.replay_weight': 1.0, 'finetune.replay_samples': 2, 'gate.tolerance': 1.0,
    'generation.max_tokens': 8, 'scheduler.max_slowdown': 10.0,
    'drift.min_budget': 1.0,
    # A slow machine that is always asked learns, too.
    'slo.freshness_s': 5.0, 'finetune.min_share': 0.5,
    # A version goes back for one reason only: that something was lost.
    'gate.auto_rollback': False}


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    result = argparse.ArgumentParser(prog='python -m bench.durability', description=__doc__.strip())
    add = result.add_argument
    add('--quick', action='store_true', help='one kill of each kind: says that all runs')
    add('--rounds', type=int, help=f'kills (default: {ROUNDS}; quick: {QUICK_ROUNDS})')
    add('--seed', type=int, default=6, help='of moments and questions (default: 6)')
    add('--model', default='', help='model.source (default: a tiny one of random weights)')
    add('--results', type=Path, metavar='FOLDER', help='where to write the results')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    recorder = Recorder(vars(args), quick=args.quick)
    own_domain()
    with tempfile.TemporaryDirectory(prefix='mace-bench-') as name:
        folder = Path(name)
        model = args.model or str(tiny_model(folder / 'model'))
        aims = [AIMS[i % len(AIMS)] for i in range(args.rounds)]
        samples = run(folder, model, aims, args.seed)
    result = Result(
        'durability', samples, checks(samples), reported(samples), [table(samples)],
        [f'Each fsync of a file or folder takes {SYNC_S * 1e3:g} ms longer, as on an SD card, so '
         'that kills fall between them.'])
    path = recorder.write(result, args.results)
    print(summary(result))
    print(f'\n{path}')


def tiny_model(folder: Path) -> Path:
    """Make a small model of random weights, with the tokenizer of the packaged one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mace_ros.model.loading import load_model

    tokenizer = load_model('', device='cpu').tokenizer
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Promises:
    """What the node has told in all its lives."""

    acknowledged: set[str] = field(default_factory=set)
    announced: dict[str, tuple[int, str]] = field(default_factory=dict)    # of each profile


def run(folder: Path, model: str, aims: Sequence[str], seed: int) -> dict[str, Any]:
    """Kill a node once for each aim; return what was found after each kill."""
    chance = random.Random(seed)
    parameters = {'model.source': model, **PARAMETERS}
    storage = folder / 'storage'
    promises, wreck = Promises(), None
    rows: list[dict[str, Any]] = []
    errors: Counter[str] = Counter()
    ready_s = LIFE_S
    for number, aim in enumerate([*aims, 'none']):      # the last life: to see it start
        life = Life(folder, parameters, number, chance, promises)
        try:
            if aim == 'starting':
                time.sleep(chance.uniform(0.0, ready_s))
            else:
                ready_s = life.begin(wreck)
                life.until(aim)
        except BaseException:
            print(life.log, file=sys.stderr)
            raise
        finally:
            life.end()
        if rows:
            rows[-1]['started_on'] = life.wrong_start
        errors.update(life.errors())
        if aim == 'none' or not (storage / JOURNAL).exists():
            continue
        wreck = examine(storage)
        rows.append({
            'aim': aim, 'phases': life.phases(wreck), 'lived_s': life.lived_s,
            'acknowledged': len(promises.acknowledged), 'lost': lost(wreck, promises.acknowledged),
            'published': len(wreck.versions), 'older': older(wreck, promises.announced),
            'live': {p or 'robot': v for p, (v, _) in wreck.live.items()},
            'damaged': list(wreck.damaged), 'unknown': life.unknown(wreck), 'started_on': []})
        print(f'{number + 1}: {aim}, in {" and ".join(rows[-1]["phases"])}; '
              f'{rows[-1]["acknowledged"]} acknowledged, live {rows[-1]["live"]}', flush=True)
    return {'kills': rows, 'log': dict(errors)}


class Life:
    """A node from its start to its end, and a client that does not let it rest."""

    def __init__(self, folder: Path, parameters: dict[str, Any], number: int,
                 chance: random.Random, promises: Promises) -> None:
        """Start both."""
        from mace_ros.msg import AdapterVersion, CorrectionStatus

        from mace_ros.ros.client import LATCHED, MaceClient, RELIABLE

        self._chance, self._promises, self._number = chance, promises, number
        self._adapters = folder / 'storage' / 'adapters'
        self._client = MaceClient()
        self._heard: list[Any] = []         # of versions
        self._statuses: list[Any] = []      # of corrections of earlier lives, too
        self._client.node.create_subscription(
            CorrectionStatus, '/mace/correction_status', self._statuses.append, RELIABLE)
        self._client.node.create_subscription(
            AdapterVersion, '/mace/adapter_version', self._heard.append, LATCHED)
        self._node = NodeProcess(folder, parameters, sync_s=SYNC_S)
        self._began = time.monotonic()
        self._ready = False
        self._answers: list[Any] = []
        self._corrections: set[str] = set()
        self._served: set[tuple[str, int]] = set()
        self._said = 0
        self.wrong_start: list[str] = []
        self.lived_s = 0.0

    @property
    def log(self) -> str:
        """All that the node has printed."""
        return self._node.log

    def begin(self, wreck: Wreck | None) -> float:
        """Wait until it serves what it has to; return how many seconds that took."""
        self._client.wait_until_ready(START_S)
        took, self._ready = time.monotonic() - self._began, True
        expected = dict(wreck.live) if wreck is not None else {}
        expected.setdefault('', (0, ''))
        end = time.monotonic() + SETTLED_S
        while (any(self._first(p) is None for p in expected) and time.monotonic() < end):
            time.sleep(0.01)
        self.wrong_start = [
            f'{profile!r}: {self._first(profile)} served instead of {live}'
            for profile, live in expected.items() if self._first(profile) != live]
        self.wrong_start += [f'{path.name} is still there'
                             for path in self._adapters.glob('*/.tmp-*')]
        self._known_folders = self._folders()
        self._known_versions = len(self._published())
        return took

    def until(self, aim: str) -> None:
        """Talk to the node until the moment has come to kill it."""
        (earliest_s, latest_s), happens = self._moment(aim)
        ask_at, kill_at = time.monotonic(), time.monotonic() + WAIT_S
        seen = False
        while (now := time.monotonic()) < kill_at:
            if not seen and happens():
                seen, kill_at = True, now + self._chance.uniform(earliest_s, latest_s)
            if now >= ask_at:
                ask_at = now + ASK_S
                if sum(not a.is_complete() for _, a in self._answers) < UNANSWERED:
                    self._ask()
            time.sleep(0.0005)

    def end(self) -> None:
        """Kill the node; note what it has told, and that is what it has promised."""
        from mace_ros.msg import AdapterVersion, CorrectionStatus

        self.lived_s = time.monotonic() - self._began
        self._node.kill()
        time.sleep(DRAIN_S)
        self._hear()
        self._client.close()
        self._promises.acknowledged |= {
            s.id for s in self._statuses if s.state != CorrectionStatus.REJECTED}
        for message in self._heard:
            if message.state == AdapterVersion.PUBLISHED:
                self._promises.announced[message.profile] = (message.version, message.sha256)

    def phases(self, wreck: Wreck) -> list[str]:
        """Return what was under way in the end, by what is left of it."""
        from mace_ros.msg import CorrectionStatus

        if not self._ready:
            return ['starting']
        newest = {s.id: s.state for s in self._statuses}
        under_way = {
            'saving': wreck.leftovers, 'recording': set(wreck.saved) - self._known_folders,
            'publishing': [profile for profile, live in wreck.live.items()
                           if live != self._promises.announced.get(profile)],
            'training': CorrectionStatus.TRAINING in newest.values(),
            'intake': self._corrections - newest.keys()}
        return [phase for phase, found in under_way.items() if found] or ['serving']

    def unknown(self, wreck: Wreck) -> list[str]:
        """Return which answers came from a version that is not on record."""
        return [f'{profile!r}: {version}' for profile, version in sorted(self._served)
                if version and not {(profile, version), ('', version)} & set(wreck.versions)]

    def errors(self) -> list[str]:
        """Return a word for each error in the log."""
        return [level for line in self.log.splitlines()
                for level in ('ERROR', 'FATAL', 'Traceback') if level in line]

    # -- the client ------------------------------------------------------------------

    def _moment(self, aim: str) -> tuple[tuple[float, float], Callable[[], bool]]:
        """Return between how many seconds to kill, and after what."""
        from mace_ros.msg import CorrectionStatus

        if aim == 'intake':
            at = time.monotonic() + self._chance.uniform(0.0, LIFE_S / 2)
            return (0.0, SYNC_S), lambda: time.monotonic() > at and self._burst()
        if aim == 'training':
            return (0.0, 1.0), lambda: any(
                s.state == CorrectionStatus.TRAINING for s in list(self._statuses))
        if aim == 'saving':     # weights, configuration, folder
            return (0.0, 3 * SYNC_S), lambda: any(self._adapters.glob('*/.tmp-*'))
        if aim == 'recording':      # renamed
            return (0.0, SYNC_S / 2), lambda: bool(self._folders() - self._known_folders)
        if aim == 'publishing':     # on record, and not yet announced
            known = self._on_record()
            return (0.0, 0.0), lambda: self._on_record() > known
        return (0.0, LIFE_S if aim == 'any' else 0.0), lambda: True

    def _ask(self) -> None:
        """Ask, and now and then correct an earlier answer, or what nobody has asked."""
        self._hear()
        profile = self._chance.choice(PROFILES)
        self._said += 1
        name = f'{self._number}-{self._said}'
        question = f'Question {self._chance.randrange(10000)}?'
        answered = [a for p, a in self._answers if p == profile and a.is_complete()]
        self._answers.append((
            profile, self._client.ask(question, query_id=name, profile=profile)))
        if self._said % CORRECT_EVERY == 0:
            about = {'query_id': self._chance.choice(answered).id} if (
                answered and self._chance.random() < 0.5) else {'prompt': question}
            self._correct(name, profile, **about)

    def _burst(self) -> bool:
        """Send many corrections at once, most of which contradict each other."""
        for i in range(BURST):
            self._correct(f'{self._number}-burst-{i}', PROFILES[i % len(PROFILES)],
                          prompt=f'Question {i % 4}?')
        return True

    def _correct(self, name: str, profile: str, **about: str) -> None:
        self._corrections.add(name)
        self._client.correct(f'AnswerHandle {name}.', correction_id=name, profile=profile, **about)

    def _hear(self) -> None:
        self._served |= {(profile, answer.response.adapter_version)
                         for profile, answer in self._answers if answer.is_complete()}

    def _published(self) -> list[Any]:
        from mace_ros.msg import AdapterVersion

        return [m for m in list(self._heard) if m.state == AdapterVersion.PUBLISHED]

    def _first(self, profile: str) -> tuple[int, str] | None:
        return next(((m.version, m.sha256) for m in self._published()
                     if m.profile == profile), None)

    def _on_record(self) -> int:
        """Return how many versions the journal has; it is only looked at."""
        journal = self._adapters.with_name(JOURNAL)
        with closing(sqlite3.connect(f'file:{journal}?mode=ro', uri=True)) as opened:
            return int(opened.execute('SELECT count(*) FROM versions').fetchone()[0])

    def _folders(self) -> set[str]:
        return {f'adapters/{path.parent.name}/{path.name}' for path in self._adapters.glob('*/v*')}


# -- what the samples say ----------------------------------------------------------------


def checks(samples: dict[str, Any]) -> list[Check]:
    """Return the checks."""
    kills = samples['kills']

    def total(column: str) -> tuple[float, str]:
        found = [x for kill in kills for x in kill[column]]
        return float(len(found)), '; '.join(map(str, found[:3]))

    hit = Counter(phase for kill in kills for phase in kill['phases'])
    acknowledged = kills[-1]['acknowledged']
    rows = [
        ('acknowledged corrections lost', 'lost', f'of {acknowledged}'),
        ('versions on disk or on record that do not load', 'damaged', ''),
        ('versions that were announced, and older ones live', 'older', ''),
        ('starts on another version than the live one, or beside a half-written one',
         'started_on', f'of {len(kills)}'),
        ('answers from a version that is not on record', 'unknown', '')]
    return [
        check('kills', float(len(kills)), f'>= {ROUNDS}'),
        *(check(name, total(column)[0], '<= 0', total(column)[1] or note)
          for name, column, note in rows),
        check('kills that fell into each phase, fewest', float(min(hit[p] for p in PHASES)),
              '>= 3', ', '.join(f'{phase} {hit[phase]}' for phase in hit)),
        check('errors in the log', float(sum(samples['log'].values())), '<= 0')]


def reported(samples: dict[str, Any]) -> list[Reported]:
    """Return the numbers that explain the others."""
    last = samples['kills'][-1]
    return [
        Reported('corrections acknowledged', float(last['acknowledged'])),
        Reported('versions published', float(last['published']))]


def table(samples: dict[str, Any]) -> Table:
    """Return a row for each kill."""
    return Table('Kills', ['aim', 'under way', 'lived, s', 'acknowledged', 'live'],
                 [[k['aim'], ', '.join(k['phases']), k['lived_s'], k['acknowledged'],
                   ', '.join(f'{p} {v}' for p, v in k['live'].items())]
                  for k in samples['kills']],
                 'Under way: by what was left of it, on disk and in the messages.')


if __name__ == '__main__':
    main()
