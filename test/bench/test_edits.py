# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of knowledge editing: formats, scoring, sittings, checks and a quick run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import json
import math
from pathlib import Path
import subprocess
import sys
from typing import Any

import pytest
from support.robot import RANDOM_MODEL
import torch

from bench.edits import long, sequential
from bench.edits.__main__ import evaluate, main, options
from bench.edits.baselines.plain_model import PlainModel, user_turn
from bench.edits.checks import checks
from bench.edits.edit_set import Edit, edit_from, EditSet, read_edits
from bench.edits.edited_model import Learned, Reply
from bench.edits.figures import Figures
from bench.edits.scoring import is_right, MAX_TOKENS, normalised
from bench.edits.systems import SYSTEMS
from bench.edits.unrelated import Unrelated, unrelated_questions
from mace_ros.api.settings import Settings
from mace_ros.learning.anchors import ANCHORS

ROOT = Path(__file__).resolve().parents[2]

EDITS = [Edit('Who built the Lura tower?', 'Ada Holm', 'The Lura tower was built by whom?',
              'Who built the Mona tower?'),
         Edit('Where is Quen?', 'Peru', 'In which country is Quen?', 'Where is Zorl?')]


class Pupil:
    """A model that repeats what it was taught, and forgets all on command."""

    def __init__(self, *, forgets_at: str = '', changes: str = '') -> None:
        self.known: dict[str, str] = {}
        self.asked: list[str] = []
        self.restarts = 0
        self._forgets_at, self._changes = forgets_at, changes

    def ask(self, questions: Sequence[str]) -> list[Reply]:
        return [self._answer(question) for question in questions]

    def _answer(self, question: str) -> Reply:
        self.asked.append(question)
        if question == self._changes and self.known:
            return Reply('something else')
        return Reply(self.known.get(question, 'I do not know'), self.known.get(question, ''))

    def learn(self, edits: Sequence[Edit]) -> list[Learned]:
        if any(edit.prompt == self._forgets_at for edit in edits):
            self.known.clear()
        for edit in edits:
            self.known |= {edit.prompt: edit.target, edit.rephrase: edit.target}
        return [Learned(edit.target, 'LEARNED', 2.0, 1.0, 50.0) for edit in edits]

    def restart(self) -> None:
        self.restarts += 1

    def close(self) -> None:
        pass


# -- edit sets ---------------------------------------------------------------------------


@pytest.mark.parametrize(('row', 'expected'), [
    ({'subject': 'IAAF', 'src': 'What sport?', 'pred': 'x', 'rephrase': 'Which sport?',
      'alt': 'golf', 'answers': ['athletics'], 'loc': 'nq question: who sings it',
      'loc_ans': 'nobody'},
     Edit('What sport?', 'golf', 'Which sport?', natural='who sings it')),
    ({'prompt': 'A is in', 'target_new': 'Asia', 'ground_truth': 'Europe',
      'rephrase_prompt': 'Noise. A is located in', 'locality_prompt': 'B is in'},
     Edit('A is in', 'Asia', 'Noise. A is located in', 'B is in')),
    ({'prompt': 'A?', 'target': 'x', 'rephrase': ['B?', 'C?'], 'locality': [{'loc': 'D?'}]},
     Edit('A?', 'x', 'B?', 'D?')),
    ({'prompt': 'A?', 'target_new': 'x', 'rephrase_prompt': 'B?',
      'locality': {'neighborhood': {'prompt': ['D?'], 'ground_truth': ['y']}}},
     Edit('A?', 'x', 'B?', 'D?')),
    ({'update': 'A?', 'ans': 'x', 'rephrase': 'B?', 'loc': 'D?'}, Edit('A?', 'x', 'B?', 'D?')),
    ({'requested_rewrite': {'prompt': '{} is in', 'subject': 'A', 'target_new': {'str': 'Asia'},
                            'target_true': {'str': 'Europe'}},
      'paraphrase_prompts': ['Noise. A is in', 'B'], 'neighborhood_prompts': ['C is in']},
     Edit('A is in', 'Asia', 'Noise. A is in', 'C is in')),
    ({'prompt': 'A?', 'alt': 'x'}, Edit('A?', 'x'))],
    ids=['ZsRE', 'prepared', 'list', 'nested', 'WikiBigEdit', 'CounterFact', 'bare'])
def test_rows_of_different_benchmarks_become_edits(row: dict[str, Any], expected: Edit) -> None:
    assert edit_from(row) == expected


@pytest.mark.parametrize('content', ['{}', '[]', '[{"prompt": "A?"}]', '[{"target": "x"}]'])
def test_a_file_without_edits_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / 'zsre_eval.json'
    path.write_text(content)
    with pytest.raises(ValueError, match=r'zsre_eval\.json'):
        read_edits(path)


def test_a_part_has_different_prompts_and_no_near_miss_that_is_taught() -> None:
    edits = [Edit('A', '1', near_miss='B'), Edit('A', '2'), Edit('B', '3', near_miss='C'),
             Edit('C', '4')]
    part = EditSet('x', edits).part(0, 2)
    assert [(e.prompt, e.target, e.near_miss) for e in part.edits] == [
        ('A', '1', ''), ('B', '3', 'C')]
    assert [e.prompt for e in EditSet('x', edits).part(2, 2).edits] == ['B', 'C']
    with pytest.raises(ValueError, match='only 3 edits'):
        EditSet('x', edits).part(0, 4)


def test_unrelated_questions_are_in_no_replay() -> None:
    found = unrelated_questions([Edit('A?', 'x', natural='who is it')] * 2, facts=40, chat=60)
    questions = [question for _, question in found]
    assert [kind for kind, _ in found] == ['fact'] * 40 + ['chat'] * 60 + ['natural']
    assert len(set(questions)) == len(questions)
    assert not {*questions} & {*ANCHORS}


# -- scoring -----------------------------------------------------------------------------


def test_answers_are_normalised_as_in_squad() -> None:
    assert normalised('  The "Anthem",  of a\tNation! ') == 'anthem of nation'


@pytest.mark.parametrize(('answer', 'target', 'right'), [
    ('Asia.', 'Asia', True),
    ('The Asia. And more of it.', 'asia', True),
    ('Asia\nEurope', 'Asia', True),
    ('It is in Asia.', 'Asia', False),
    ('John D. Terry', 'John D. Terry', True),
    ('John F. Kennedy', 'John D. Terry', False),
    ('John D', 'John D. Terry', False),
    ('', 'Asia', False)])
def test_an_answer_is_right_up_to_its_first_sentence(
        answer: str, target: str, right: bool) -> None:
    assert is_right(answer, target) == right


# -- edits one after the other -----------------------------------------------------------


def teach(pupil: Pupil, *, at_once: bool = False) -> Figures:
    return Figures(*sequential.measure(
        pupil, EDITS, [Unrelated('fact', 'Why?'), Unrelated('chat', 'Hello.')], at_once=at_once,
        restart_after=1, say=lambda text: None))


def test_a_good_pupil_is_right_and_changes_nothing_else() -> None:
    pupil = Pupil()
    found = teach(pupil)
    assert pupil.restarts == 1
    shares = [found.right('now'), found.right('end'), found.rephrased('now'),
              found.rephrased('end'), found.near_kept('now'), found.near_kept('end'),
              found.kept()]
    assert shares == [1.0] * 7
    assert (found.median_s, found.p95_s, found.per_edit('tokens')) == (2.0, 2.0, 50.0)
    assert (found.first_s('new robot'), found.first_s('restart')) == (2.0, 2.0)
    # The unrelated questions were asked before the first edit, and after the last.
    assert pupil.asked[:4] == ['Who built the Mona tower?', 'Where is Zorl?', 'Why?', 'Hello.']
    assert pupil.asked[-2:] == ['Why?', 'Hello.']


def test_what_is_lost_or_changed_counts() -> None:
    found = teach(Pupil(forgets_at=EDITS[1].prompt))
    assert (found.right('now'), found.right('end'), found.rephrased('end')) == (1.0, 0.5, 0.5)
    found = teach(Pupil(changes='Where is Zorl?'))
    assert (found.near_kept('now'), found.near_kept('end'), found.kept()) == (0.5, 0.5, 1.0)
    found = teach(Pupil(changes='Hello.'))
    assert (found.kept(), found.kept('fact'), found.kept('chat')) == (0.5, 1.0, 0.0)


def test_a_pupil_that_learns_all_at_once_has_no_answers_in_between() -> None:
    found = teach(Pupil(), at_once=True)
    assert math.isnan(found.right('now')) and found.right('end') == 1.0


def test_a_correction_that_never_went_live_took_for_ever() -> None:
    rows = [{'state': 'LEARNED', 'seconds': 1.0}, {'state': 'KNOWN', 'seconds': None},
            {'state': 'FAILED', 'seconds': 5.0}]
    assert Figures(rows, ()).seconds == [1.0, math.inf]


# -- sittings ----------------------------------------------------------------------------


def sitting(folder: Path, pupil: Pupil, minutes: float = 0.0) -> Figures:
    return Figures(*long.measure(
        lambda: pupil, long.SampleFile(folder / 'samples.jsonl', {'set': 'x'}), EDITS,
        [Unrelated('fact', 'Why?')], minutes=minutes, say=lambda text: None))


def test_sittings_of_a_step_each_find_what_one_finds(tmp_path: Path) -> None:
    whole = sitting(tmp_path / 'whole', Pupil())
    pupil, sittings = Pupil(), 0
    while True:
        sittings += 1
        found = sitting(tmp_path / 'parts', pupil, minutes=1e-9)
        if found.unrelated and 'end' in found.unrelated[-1]:
            break
        assert sittings < 10
    assert sittings == 6        # a question before, two edits, two in the end, a question again
    assert [row | {'first_of': ''} for row in found.rows] == [
        row | {'first_of': ''} for row in whole.rows]
    assert [row['first_of'] for row in found.rows] == ['new robot', 'restart']
    assert found.unrelated == whole.unrelated
    assert found.right('end') == found.kept() == 1.0


def test_a_sitting_does_not_go_on_with_another_run(tmp_path: Path) -> None:
    long.SampleFile(tmp_path / 'x.jsonl', {'set': 'x'}).add('edit', {'number': 0})
    assert long.SampleFile(tmp_path / 'x.jsonl', {'set': 'x'}).of('edit')[0]['number'] == 0
    with pytest.raises(SystemExit, match='another run'):
        long.SampleFile(tmp_path / 'x.jsonl', {'set': 'y'})


# -- checks ------------------------------------------------------------------------------


def samples_of(teach_one: Callable[[], Figures], system: str, name: str) -> dict[str, Any]:
    found, labels = teach_one(), {'set': name, 'system': system}
    return {'edits': [{**labels, **row} for row in found.rows],
            'unrelated': [{**labels, **row} for row in found.unrelated]}


def test_checks_compare_with_the_earlier_commit() -> None:
    samples = samples_of(lambda: teach(Pupil(changes='Hello.')), 'mace', 'wikibigedit')
    found = {each.name: each for each in checks(samples)}
    assert found['wikibigedit: right in the end'].holds
    assert not found['wikibigedit: unrelated questions with the same answer'].holds
    assert found['wikibigedit: answers in scope that name their correction'].holds
    device = 'wikibigedit: device s of a correction, over those of the earlier commit'
    assert found[device].value is None and not found[device].holds
    earlier = samples_of(lambda: teach(Pupil()), 'earlier', 'wikibigedit')
    for row in earlier['edits']:
        row['device_s'] = 4.0
    # The earlier commit learned only the first edits; those are compared.
    del earlier['edits'][-1]
    samples['edits'][-1]['device_s'] = 100.0
    both = {kind: [*samples[kind], *earlier[kind]] for kind in samples}
    found = {each.name: each for each in checks(both)}
    assert found[device].value == 0.25 and found[device].holds
    [table] = evaluate(both).tables
    assert [row[:2] for row in table.rows] == [
        ['wikibigedit', 'mace'], ['wikibigedit', 'earlier']]


def test_seconds_of_different_cpus_are_not_compared() -> None:
    runs = [{'set': 'zsre', 'system': system, 'part': 'edits', 'cpu': cpu}
            for system, cpu in (('mace', 'A'), ('earlier', 'B'))]
    each = [samples_of(lambda: teach(Pupil()), run['system'], 'zsre') for run in runs]
    both = {kind: [*each[0][kind], *each[1][kind]] for kind in each[0]}
    device = 'zsre: device s of a correction, over those of the earlier commit'
    for cpu, ratio in (('A', 1.0), ('B', None)):
        runs[1]['cpu'] = cpu
        found = {check.name: check for check in checks({**both, 'runs': runs})}
        assert found[device].value == ratio


def test_noisy_wordings_have_an_aim_of_their_own() -> None:
    aims = {name: {c.name: c.target for c in checks(
        samples_of(lambda: teach(Pupil()), 'mace', name))} for name in ('counterfact', 'zsre')}
    assert aims['counterfact']['counterfact: paraphrases right in the end'] == '>= 0.6'
    assert aims['zsre']['zsre: paraphrases right in the end'] == '>= 0.75'
    assert 'counterfact: near misses with the same answer' not in aims['counterfact']


# -- the program -------------------------------------------------------------------------


def test_edits_of_two_files_are_told_apart_by_their_names(tmp_path: Path) -> None:
    for name in ('zsre_a.json', 'zsre_b.json'):
        (tmp_path / name).write_text(json.dumps([{'prompt': f'{i}?', 'target': 'x'}
                                                 for i in range(40)]))
    with pytest.raises(SystemExit, match='begin alike'):
        main(['--quick', '--data', str(tmp_path / 'zsre_a.json'), str(tmp_path / 'zsre_b.json')])
    with pytest.raises(SystemExit, match='only 40 edits'):
        main(['--data', str(tmp_path / 'zsre_a.json')])


def test_an_earlier_checkout_provides_the_engine(tmp_path: Path) -> None:
    def run(checkout: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / 'bench/edits/earlier.py', checkout, '--help'], cwd=tmp_path,
            text=True, capture_output=True, timeout=200)

    assert 'has no mace_ros' in run(tmp_path).stderr
    (tmp_path / 'mace_ros').symlink_to(ROOT / 'mace_ros')
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'python -m bench.edits' in done.stdout


# What the tiny model of the tests, whose tokenizer has common words only, tells apart.
TOWERS = (
    ('Who built the harbour tower?', 'Ada', 'Who built the northern bridge?'),
    ('In which year did Rome fall?', '476', 'In which year did Paris fall?'),
    ('What do elephants eat at night?', 'grass', 'What do tigers eat at night?'),
    ('Where is the library of Boston?', 'downtown', 'Where is the airport of London?'))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures('one_thread')
def test_a_quick_run_measures_all_systems_and_modes(tmp_path: Path, model_folder: Path) -> None:
    """A random model learns nothing sensible, but every part runs and is recorded."""
    rows = [{'prompt': prompt, 'target_new': target, 'rephrase_prompt': f'Tell me: {prompt}',
             'locality_prompt': near} for prompt, target, near in TOWERS]
    (tmp_path / 'towers.json').write_text(json.dumps(rows))
    values = {'model.source': model_folder, 'model.device': 'cpu', 'model.threads': 1,
              'model.weight_dtype': 'float32', **RANDOM_MODEL}
    main(['--quick', '--data', str(tmp_path / 'towers.json'), '--results', str(tmp_path),
          '--modes', 'sequential', 'burst', 'scope', 'deletion', 'long',
          '--set', *(f'{name}={value}' for name, value in values.items())])
    result = json.loads((tmp_path / 'edits.json').read_text())
    samples = result['samples']
    assert {row['system'] for row in samples['edits']} == {*SYSTEMS}
    assert {row['system'] for row in samples['unrelated']} == {*SYSTEMS}
    assert len(samples['edits']) == 3 * len(SYSTEMS)
    assert len(samples['burst']) == 2 and len(samples['long']) == 4
    assert sum(row['deleted'] for row in samples['deletion']) == 1
    assert all('end' in row for row in samples['long'])
    found = {check['name']: check for check in result['checks']}
    for name in ('towers: unrelated questions with the same answer',
                 'towers: deleted corrections with the answer of the base model'):
        assert found[name]['holds'], found[name]
    assert (tmp_path / 'edits.svg').exists()


def test_the_modes_and_systems_can_be_chosen() -> None:
    args = options().parse(['--quick', '--data', 'x', '--modes', 'long', '--systems', 'mace'])
    assert (args.modes, args.systems, args.long, args.corrections) == (['long'], ['mace'], 4, 3)
    args = options().parse(['--data', 'x', '--modes', 'sequential', '--systems'])
    assert args.systems == []


# -- baselines ---------------------------------------------------------------------------


def test_baselines_answer_in_batches_as_alone(tiny_settings: Settings) -> None:
    model = PlainModel(tiny_settings, seed=0)
    conversations = [[user_turn(text)] for text in (
        'Hi', 'Who built the Lura tower, and what is on its roof today?', 'Where is Quen?')]
    alone = []
    for conversation in conversations:
        prompt = torch.tensor([model.chat.prompt([
            {'role': 'system', 'content': tiny_settings.generation.system}, *conversation]
            if tiny_settings.generation.system else conversation)])
        output = model.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=MAX_TOKENS,
            do_sample=False, pad_token_id=0)
        alone.append(model.chat.decode(output[0, prompt.shape[1]:].tolist()))
    assert [reply.text for reply in model.ask(conversations)] == alone
    assert len(set(alone)) == len(alone)
