# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks print their options, and their report marks missed targets."""

from __future__ import annotations

from dataclasses import asdict
import json
from pathlib import Path
import subprocess
import sys
from unittest.mock import MagicMock

import pytest

from bench import drift, learning
from bench.load import Arrival
from bench.memory_budget import least_passes
from bench.results import check, dumps, FOLDER
from bench.serving import Served
from bench.soak import floor, growth
from mace_ros.api.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('module', [
    'bench', 'bench.colocation', 'bench.decode', 'bench.durability', 'bench.gpu', 'bench.kernels',
    'bench.learning', 'bench.memory', 'bench.operation', 'bench.report', 'bench.soak'])
def test_help(module: str) -> None:
    done = subprocess.run([sys.executable, '-m', module, '--help'], cwd=ROOT, text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith('usage: ')


def test_a_short_soak_loses_nothing(tmp_path: Path, model_folder: Path) -> None:
    """Some seconds of bench.soak, which are too few to measure the growth of memory."""
    done = subprocess.run(
        [sys.executable, '-m', 'bench.soak', '--minutes', '0.25', '--model', str(model_folder),
         '--results', str(tmp_path)], cwd=ROOT, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    [result] = [json.loads(path.read_text()) for path in tmp_path.rglob('soak.json')]
    holds = {each['name']: each['holds'] for each in result['checks']}
    for name in ('responses per query', 'corrections acknowledged', 'parameter changes refused',
                 'errors in the log, and answers that broke off'):
        assert holds[name], done.stdout


@pytest.mark.parametrize('system', ['inference_only', 'mace', 'continuous'])
def test_learning_that_is_always_pending_goes_on_beside_answers(
        system: str, tmp_path: Path, model_folder: Path) -> None:
    """In bench.colocation the policy alone decides whether the engine learns."""
    settings = Settings().updated({
        'model.source': str(model_folder), 'model.device': 'cpu', 'model.weight_dtype': 'float32'})
    served = Served(settings, tmp_path, [range(5, 69)], lambda text: None)
    try:
        ids = tuple(served.engine.chat.prompt([{'role': 'user', 'content': 'Who are you?'}]))
        steps = 0
        for i in range(2 if system == 'inference_only' else 20):    # on a slow machine
            block = served.run_block(
                system, i, [Arrival(0.1 * k, 'Who are you?', ids) for k in range(3)], 1.0, 4)
            assert [row['output_tokens'] for row in block.requests] == [4, 4, 4]
            steps += block.block['finetune_steps']
            if steps:
                break
    finally:
        served.close()
    assert (steps > 0) == (system != 'inference_only')


@pytest.mark.parametrize(('leak', 'holds'), [(0.0, True), (0.05, False)])
def test_memory_that_comes_and_goes_is_no_growth_and_a_leak_is(leak: float, holds: bool) -> None:
    """After the warm-up, fine-tune steps use memory for short times."""
    rows = [{'at_s': float(t), 'memory_mb': min(t, 100) + 1000.0 + 400.0 * (t % 7 > 2) + leak * t}
            for t in range(1800)]
    assert (growth(floor(rows)) <= 0.02) == holds


def test_no_schedule_needs_fewer_passes_than_the_bound() -> None:
    """Two prompts of 32 tokens, the first 16 in common, and answers of 16 tokens each."""
    prompts = [[1] * 16 + [n] * 16 for n in (2, 3)]
    # In each pass an answer holds 1 block of its own for the prompt, and from the second pass on
    # 1 more for its output. Of 3 blocks, 1 is for the common prefix.
    assert least_passes(prompts, [16, 16], 3, 16) == (2 * (15 * 2 + 1)) / 2
    assert least_passes(prompts, [16, 16], 1000, 16) == 16      # a token each in every pass


def test_what_was_found_out_about_learning_can_be_computed_again() -> None:
    """A run of one part is merged with the recorded parts in this way."""
    found = json.loads((FOLDER / 'learning.json').read_text())
    again = json.loads(dumps(asdict(learning.result_of(found['samples']))))
    # Samples are rounded when they are written.
    for one, known in zip(again['checks'], found['checks'], strict=True):
        assert one == known | {'value': pytest.approx(known['value'], rel=1e-4)}
    for table, known in zip(again['tables'], found['tables'], strict=True):
        assert (table['title'], table['columns']) == (known['title'], known['columns'])
        for row, expected in zip(table['rows'], known['rows'], strict=True):
            assert row == [pytest.approx(x, rel=1e-4) if isinstance(x, float) else x
                           for x in expected]


def test_runs_that_cannot_be_compared_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {'questions': 2, 'rate': 1.0, 'seed': 'a'}
    here = {'cpu': 'this one', 'set': []}
    runs = [{'system': 'mace', 'trace': asked, **here},
            {'system': 'periodic', 'trace': asked, 'cpu': 'another', 'set': []},
            {'system': 'mace, no drift', 'trace': {**asked, 'rate': 2.0}, **here},
            {'system': 'mace, overloaded', 'trace': {**asked, 'rate': 2.0}, **here}]
    earlier = {'drift_runs': runs, 'drift': [{'system': run['system']} for run in runs]}
    monkeypatch.setattr(drift, 'Robot', MagicMock())
    monkeypatch.setattr(drift, 'trace', MagicMock())
    monkeypatch.setattr(drift, 'play', lambda robot, load: (
        [{'right': True}], {'asked': 1, 'learning_s': 1.0}))
    found = drift.measure(MagicMock(), Path(), earlier, system='continuous', questions=2, rate=1.0,
                          seed='a', commit='c', conditions=here)
    kept = ['mace', 'mace, overloaded', 'continuous']
    assert [run['system'] for run in found['drift_runs']] == kept
    assert [row['system'] for row in found['drift']] == kept
    assert found['drift_runs'][-1] == {
        'system': 'continuous', 'commit': 'c', 'trace': asked, **here, 'asked': 1,
        'learning_s': 1.0}


def test_check_compares_value_and_target() -> None:
    assert check('a', 1.0, '<= 1.15').holds
    assert not check('a', 1.2, '<= 1.15').holds
    assert not check('a', float('nan'), '<= 1.15').holds


@pytest.mark.parametrize(('value', 'code'), [(1.0, 0), (2.0, 1)])
def test_report_exits_by_what_holds(tmp_path: Path, value: float, code: int) -> None:
    result = {'bench': 'x', 'checks': [asdict(check('a', value, '<= 1.5'))], 'reported': [],
              'tables': []}
    (tmp_path / 'x.json').write_text(json.dumps(result))
    done = subprocess.run([sys.executable, '-m', 'bench.report', '--results', str(tmp_path)],
                          cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert ('FALLS SHORT' in done.stdout) == bool(code)
