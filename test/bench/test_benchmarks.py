# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks start, keep earlier samples only if they can be compared, and report failures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
import json
from pathlib import Path
from runpy import run_module
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from support.virtual_device import FixedCache, query

from bench.common.load import Arrival
from bench.common.options import Options, settings_from
from bench.common.recording import dumps, FOLDER, read
from bench.common.rendering import markdown, summary
from bench.common.results import check, Result
from bench.common.running import Run, run_benchmark
from bench.common.stale import stale
from bench.learning import drift
from bench.learning.__main__ import evaluate
from bench.memory.budget import least_passes
from bench.soak import floor, growth
from bench.systems.engine_under_load import EngineUnderLoad
from bench.systems.probe import Probe
from bench.systems.replanner import Replanner
from mace_ros.api.settings import Settings
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import Measurement, PassShape, Plan, Segment, SegmentKind, State
from mace_ros.scheduling.scheduler import Scheduler
from mace_ros.scheduling.waiting_queue import WaitingQueue

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('module', [
    'bench', 'bench.colocation', 'bench.constrained', 'bench.decode', 'bench.durability',
    'bench.edits', 'bench.everywhere', 'bench.gpu', 'bench.kernels', 'bench.learning',
    'bench.memory', 'bench.operation', 'bench.orin', 'bench.pictures', 'bench.publication',
    'bench.report', 'bench.simulation', 'bench.soak'])
@pytest.mark.filterwarnings('ignore:.*found in sys.modules:RuntimeWarning')
def test_every_benchmark_prints_help(
        module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', [module, '--help'])
    with pytest.raises(SystemExit) as ended:
        run_module(module, run_name='__main__')
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(f'usage: python -m {module} ')


# -- options and results -----------------------------------------------------------------


def test_a_quick_run_has_smaller_defaults_and_given_numbers_win() -> None:
    options = Options('x', 'A benchmark.', quick='once')
    options.size('--peer-blocks', 6, 2, 'blocks')
    options.threads()
    assert options.parse([]).peer_blocks == 6
    quick = options.parse(['--quick', '--threads', '3'])
    assert (quick.peer_blocks, quick.threads) == (2, 3)
    assert options.parse(['--quick', '--peer-blocks', '4']).peer_blocks == 4


def test_parameters_of_the_node_are_set_by_name() -> None:
    settings = settings_from(['finetune.budget=0.5', 'memory.prefix_sharing=false'])
    assert settings.finetune.budget == 0.5
    assert not settings.memory.prefix_sharing


def test_a_run_is_recorded_with_its_notes(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(run: Run) -> dict[str, Any]:
        run.notes.append('A note.')
        return {**run.earlier('x'), 'again': [3.0], 'new': [1.0]}

    def evaluate_x(samples: dict[str, Any], run: Run) -> Result:
        return Result('x', samples, [check('new', samples['new'][0], '<= 2')])

    there = {'cpu': 'another', 'cores': 8, 'gpu': None, 'commit': 'abc'}
    oldest = {**there, 'started': '2026-01-01T10:00:00+00:00'}
    (tmp_path / 'x.json').write_text(json.dumps({
        'started': '2026-01-02T10:00:00+00:00', 'machine': {**there, 'memory_gib': 1.0},
        'earlier': {'oldest': oldest},
        'samples': {'oldest': [0.0], 'old': [2.0], 'again': [2.0]}}))
    recorded = run_benchmark(
        Options('x', 'A benchmark.', quick='once'), ['--results', str(tmp_path)],
        measure=measure, evaluate=evaluate_x)
    written = json.loads(recorded.path.read_text())
    assert recorded.path == tmp_path / 'x.json'
    assert written['samples'] == {'oldest': [0.0], 'old': [2.0], 'again': [3.0], 'new': [1.0]}
    assert written['earlier'] == {
        'oldest': oldest, 'old': {**oldest, 'started': '2026-01-02T10:00:00+00:00'}}
    note = 'Samples of an earlier run, 2026-01-02, commit abc, 8 cores of another: `old`.'
    assert f'- {note}' in markdown([written])
    assert written['notes'] == ['A note.']
    assert list(written) == ['bench', 'quick', 'started', 'seconds', 'machine', 'command',
                             'settings', 'earlier', 'notes', 'checks', 'reported', 'tables',
                             'samples']
    printed = capsys.readouterr().out
    assert '1 of 1 checks hold' in printed and note in printed


def test_recorded_results_can_be_rendered() -> None:
    results = read(FOLDER)
    assert len(results) >= 8
    assert markdown(results).count('**Checks**') >= 7
    assert '1 of 2 checks hold' in summary(
        Result('x', {}, [check('a', 1.0, '<= 2'), check('b', None, '<= 2')]))


def test_results_of_an_earlier_engine_are_named(tmp_path: Path) -> None:
    engine = tmp_path / 'mace_ros/engine.py'
    engine.parent.mkdir()
    (tmp_path / 'bench/z').mkdir(parents=True)
    for name, code in (
            ('w.py', 'import mace_ros'),        # does not run the engine
            ('x.py', 'from mace_ros import engine'),
            ('y.py', 'import bench.common'),
            ('common.py', "start(['python', '-m', 'mace_ros.engine'])"),
            ('z/__main__.py', 'from mace_ros.engine import run')):
        (tmp_path / 'bench' / name).write_text(code)

    def git(*words: str) -> str:
        return subprocess.run(
            ['git', '-c', 'user.name=x', '-c', 'user.email=x@example.org', *words], cwd=tmp_path,
            check=True, capture_output=True, text=True).stdout.strip()

    def commit(text: str) -> str:
        engine.write_text(text)
        git('add', '.')
        git('commit', '-m', 'x')
        return git('rev-parse', '--short=12', 'HEAD')

    git('init')
    first = commit('def run():\n    """Run."""\n    return 1\n')
    second = commit('def run():\n    """Run once."""\n    return 1  # pass\n')
    # Samples of the second run that name an earlier system are meant to be of that commit.
    results = [
        {'bench': 'x', 'machine': {'commit': first}, 'samples': {}},
        {'bench': 'y', 'machine': {'commit': f'{second} and changes'},
         'earlier': {'old': {'commit': second}, 'conditions': {'commit': first}},
         'samples': {'old': [], 'conditions': {}, 'runs': [
             {'system': 'mace', 'commit': second}, {'system': 'earlier', 'commit': first}]}}]
    assert not list(stale(results, tmp_path))
    third = commit('def run():\n    """Run once."""\n    return 2\n')
    results += [{'bench': 'z', 'machine': {'commit': third}, 'samples': {}},
                {'bench': 'w', 'machine': {'commit': first}, 'samples': {}}]
    assert list(stale(results, tmp_path)) == [
        f'x was recorded at {first}; changed since: mace_ros/engine.py',
        f'y was recorded at {second}; changed since: mace_ros/engine.py']
    results[-2]['machine'] = {'commit': first}
    assert list(stale(results[-2:], tmp_path)) == [
        f'z was recorded at {first}; changed since: mace_ros/engine.py']
    listed = tmp_path / 'bench/unaffected.json'
    listed.write_text(json.dumps({git('rev-parse', 'HEAD'): 'It returns what nobody uses.'}))
    assert not list(stale(results, tmp_path))
    engine.write_text('def run():\n    return 3\n')       # not committed yet
    assert len(list(stale(results, tmp_path))) == 3


def test_check_compares_value_and_target() -> None:
    assert check('a', 1.0, '<= 1.15').holds
    assert not check('a', 1.2, '<= 1.15').holds
    assert not check('a', float('nan'), '<= 1.15').holds


@pytest.mark.parametrize(('value', 'code'), [(1.0, 0), (2.0, 1)])
def test_the_exit_code_of_the_report_tells_if_all_checks_hold(
        tmp_path: Path, value: float, code: int) -> None:
    result = {'bench': 'x', 'checks': [asdict(check('a', value, '<= 1.5'))], 'reported': [],
              'tables': []}
    (tmp_path / 'x.json').write_text(json.dumps(result))
    done = subprocess.run([sys.executable, '-m', 'bench.report', '--results', str(tmp_path)],
                          cwd=ROOT, text=True, capture_output=True, timeout=200)
    assert done.returncode == code, done.stderr
    assert ('FALLS SHORT' in done.stdout) == bool(code)


# -- the engine under load ---------------------------------------------------------------


@pytest.mark.parametrize('system', ['inference_only', 'mace', 'continuous'])
def test_pending_fine_tuning_runs_beside_requests_if_the_policy_learns(
        system: str, tmp_path: Path, model_folder: Path) -> None:
    """Only the policy differs between the systems that bench.colocation compares."""
    settings = Settings().updated({
        'model.source': str(model_folder), 'model.device': 'cpu', 'model.weight_dtype': 'float32'})
    served = EngineUnderLoad(settings, tmp_path, [range(5, 69)], lambda text: None)
    try:
        ids = tuple(served.engine.chat.prompt([{'role': 'user', 'content': 'Who are you?'}]))
        steps = 0
        for i in range(2 if system == 'inference_only' else 20):    # a slow machine needs many
            block = served.run_block(
                system, i, [Arrival(0.1 * k, 'Who are you?', ids) for k in range(3)], 1.0, 4)
            assert [row['output_tokens'] for row in block.requests] == [4, 4, 4]
            assert 0.0 < block.block['busy_s'] <= block.block['wall_s']
            [part] = block.iterations
            rows = [dict(zip(part['columns'], row, strict=True)) for row in part['rows']]
            assert all(0.0 < row['work_ms'] <= row['wall_ms'] for row in rows)
            steps += block.block['finetune_steps']
            if steps:
                break
    finally:
        served.close()
    assert (steps > 0) == (system != 'inference_only')


def request(query_id: str) -> Any:
    """Return a request that arrived at 1.0 and had its first pass at 2.0."""
    return SimpleNamespace(id=query_id, arrival=1.0, started_at=2.0)


def test_probe_merges_the_steps_of_an_iteration() -> None:
    """Events are returned before the segments run, so one iteration may take two steps."""
    times = iter([3.5, 4.5, 5.5])
    probe = Probe(lambda: next(times))
    plan = Plan(segments=1, shape=PassShape(decode_rows=1, decode_context=10))
    values: Mapping[str, float] = {}
    probe.phase('receive', 2.0, 2.1, values)
    probe.phase('plan', 2.1, 2.2, {'cpu_ms': 90.0})
    probe.planned(plan, 1)
    probe.phase('pass', 2.5, 3.0, values)
    probe.phase('sample', 3.0, 3.1, values)
    probe.committed([request('q')])
    probe.phase('iteration', 2.0, 3.5, values)
    probe.finished([])
    assert not probe.log.iterations
    probe.phase('fine-tune forward', 4.0, 4.2, values)
    probe.measured(Measurement(plan, 0.6, ((Segment(SegmentKind.FORWARD, 8), 0.2),)), CostModel())
    probe.phase('iteration', 4.0, 4.3, values)
    probe.finished([])
    [iteration] = probe.log.iterations
    assert iteration.wall_s == pytest.approx(1.8)
    assert iteration.work_s == pytest.approx(0.8)
    assert iteration.receive_s == pytest.approx(0.1)
    assert iteration.plan_s == pytest.approx(0.1)
    assert iteration.plan_cpu_s == pytest.approx(0.09)
    assert iteration.measured_s == pytest.approx(0.8)
    assert (iteration.in_flight, iteration.decode_rows, iteration.segments) == (1, 1, 1)
    assert probe.log.busy_s == pytest.approx(0.8)
    # The token reached the caller when the first step returned.
    assert probe.log.request_times('q', 0.5).first == 3.5
    assert probe.log.finetuning == [(4.0, 4.2, 1.0)]


def test_replanner_times_only_plans_of_enough_requests_and_changes_nothing() -> None:
    scheduler = Scheduler(Settings(), CostModel())
    state = State(FixedCache(10000), WaitingQueue(query(n, 0.01 * n) for n in range(3)))
    plan = scheduler.plan(state, 1.0)
    replanner = Replanner(scheduler, state, in_flight=3)
    replanner.planned(plan, 2)
    assert replanner.microseconds == []
    replanner.planned(plan, 3)
    assert len(replanner.microseconds) == 1
    assert scheduler.plan(state, 1.0) == plan


def test_probe_attributes_the_wait_of_a_request_to_fine_tuning() -> None:
    """Segments count as a whole, tokens in a pass by their share of its predicted time."""
    probe = Probe(lambda: 3.0)
    cost = CostModel()
    shape = PassShape(decode_rows=1, decode_context=10, finetune_tokens=64)
    plan = Plan(finetune_tokens=64, shape=shape)
    probe.phase('fine-tune backward', 0.5, 1.25, {})
    probe.planned(plan, 1)
    probe.phase('pass', 1.5, 1.75, {})
    probe.measured(Measurement(plan, 0.25), cost)
    probe.committed([request('q')])
    probe.finished([])
    share = 1.0 - cost.pass_s(*shape._replace(finetune_tokens=0)) / cost.pass_s(*shape)
    # Of the segment, the part after the arrival at 1.0.
    assert probe.log.finetune_wait_s('q') == pytest.approx(0.25 + share * 0.25)


def test_probe_does_not_record_steps_that_run_nothing() -> None:
    probe = Probe(lambda: 1.0)
    probe.phase('plan', 0.0, 0.5, {'cpu_ms': 500.0})
    probe.planned(Plan(), 0)
    probe.phase('iteration', 0.0, 1.0, {})
    probe.finished([])
    assert not probe.log.iterations


# -- soak, memory and learning -----------------------------------------------------------


SHORT_SOAK = """
import sys
from bench import soak

soak.CALIBRATION_QUERIES = 64       # the throughput need not be exact
soak.main(sys.argv[1:])
"""


def test_a_short_soak_loses_nothing(tmp_path: Path, model_folder: Path) -> None:
    """A few seconds of bench.soak; they are too short to judge the growth of memory."""
    done = subprocess.run(
        [sys.executable, '-c', SHORT_SOAK, '--minutes', '0.12', '--model', str(model_folder),
         '--results', str(tmp_path)], cwd=ROOT, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    [result] = [json.loads(path.read_text()) for path in tmp_path.rglob('soak.json')]
    holds = {each['name']: each['holds'] for each in result['checks']}
    for name in ('responses per query', 'corrections acknowledged', 'parameter changes refused',
                 'errors in the log, and answers that broke off'):
        assert holds[name], done.stdout


@pytest.mark.parametrize(('leak', 'holds'), [(0.0, True), (0.05, False)])
def test_a_leak_counts_as_growth_and_temporary_memory_does_not(leak: float, holds: bool) -> None:
    """After the warm-up, in which caches fill, fine-tune steps hold memory temporarily."""
    rows = [{'at_s': float(t), 'memory_mb': min(t, 100) + 1000.0 + 400.0 * (t % 7 > 2) + leak * t}
            for t in range(1800)]
    assert (growth(floor(rows)) <= 0.02) == holds


def test_no_schedule_needs_fewer_passes_than_the_bound() -> None:
    """Two prompts of 32 tokens, half of them shared, and responses of 16 tokens each."""
    prompts = [[1] * 16 + [n] * 16 for n in (2, 3)]
    # A pass holds one block per response for its prompt and one more for its tokens; the pass
    # of the first token needs only the former. One of three blocks holds the shared prefix.
    assert least_passes(prompts, [16, 16], 3, 16) == (2 * (15 * 2 + 1)) / 2
    assert least_passes(prompts, [16, 16], 1000, 16) == 16      # a token of each in every pass


def test_recorded_samples_of_learning_give_the_recorded_checks() -> None:
    """So a run of one part can be combined with recorded samples of the other parts."""
    found = json.loads((FOLDER / 'learning.json').read_text())
    again = json.loads(dumps(asdict(evaluate(found['samples']))))
    # Samples are rounded when they are written.
    for one, known in zip(again['checks'], found['checks'], strict=True):
        assert {**one, 'value': None} == {**known, 'value': None}
        measured = known['value'] is not None
        assert one['value'] == (pytest.approx(known['value'], rel=1e-4) if measured else None)
    for table, known in zip(again['tables'], found['tables'], strict=True):
        assert (table['title'], table['columns']) == (known['title'], known['columns'])
        for row, expected in zip(table['rows'], known['rows'], strict=True):
            assert row == [pytest.approx(x, rel=1e-4) if isinstance(x, float) else x
                           for x in expected]


def test_runs_that_cannot_be_compared_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = {'questions': 2, 'rate': 1.0, 'seed': 'a'}
    here = {'cpu': 'this one', 'set': []}
    runs = [{'system': 'mace', 'trace': trace, **here},
            {'system': 'periodic', 'trace': trace, 'cpu': 'another', 'set': []},
            {'system': 'mace, no drift', 'trace': {**trace, 'rate': 2.0}, **here},
            {'system': 'mace, overloaded', 'trace': {**trace, 'rate': 2.0}, **here}]
    earlier = {'drift_runs': runs, 'drift': [{'system': run['system']} for run in runs]}
    monkeypatch.setattr(drift, 'InteractiveEngine', MagicMock())
    monkeypatch.setattr(drift, 'make_trace', MagicMock())
    monkeypatch.setattr(drift, 'play', lambda robot, load: (
        [{'right': True}], {'asked': 1, 'learning_s': 1.0}))
    found = drift.measure(MagicMock(), Path(), earlier, system='continuous', questions=2, rate=1.0,
                          seed='a', commit='c', conditions=here)
    kept = ['mace', 'mace, overloaded', 'continuous']
    assert [run['system'] for run in found['drift_runs']] == kept
    assert [row['system'] for row in found['drift']] == kept
    assert found['drift_runs'][-1] == {
        'system': 'continuous', 'commit': 'c', 'trace': trace, **here, 'asked': 1,
        'learning_s': 1.0}
