# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""bench.gpu judges from its samples: loads, memory, and the claims of the documentation."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.common.load import Arrival
from bench.gpu import beside, checks
from bench.gpu.__main__ import evaluate, of_others
from bench.gpu.beside import LOADS, Loads, PeakMemory
from bench.gpu.claims import CLAIMS, verdicts
from bench.gpu.passes import STEP_TOKENS
from bench.systems import device_timing
from bench.systems.device_timing import reading

ROOT = Path(__file__).resolve().parents[2]
NOTHING: dict[str, Any] = {kind: [] for kind in (
    'errors', 'passes', 'segments', 'weights', 'contexts', 'captures', 'beside', 'memory')}


def block(system: str, load: float | None, **changed: Any) -> dict[str, Any]:
    """Return a block in which the device works half of the time, as in serving alone at 50 %."""
    return {'system': system, 'load': load, 'wall_s': 10.0, 'busy_s': 5.0, 'finetune_tokens': 0,
            'undivided_s': 0.1, 'ttft_ms': [10.0, 20.0], 'tpot_ms': [2.0, 4.0]} | changed


def served() -> dict[str, Any]:
    """Return samples of all loads: fine-tuning keeps less the higher the load."""
    rows = [block('busy', None, busy_s=9.8)]
    for load in LOADS:
        # Undivided steps alone learn 10 steps a second.
        learned = round((1.0 - load / 2) * 100) * STEP_TOKENS
        rows.append(block('mace', load, busy_s=9.9, finetune_tokens=learned, ttft_ms=[
            10.0, 20.0 * (1.0 + load)]))
        if load:
            rows.append(block('inference_only', load))
    return NOTHING | {'beside': rows, 'memory': [{
        'shape': '1b', 'weights_bytes': 2e9, 'peak_bytes': 5e9, 'budget_bytes': 4e9,
        'graphs_bytes': 1e9, 'kv_cache_bytes': 1e9}]}


def values(samples: dict[str, Any]) -> dict[str, float | None]:
    return {c.name: c.value for c in checks.checks(['1b'], samples)}


@pytest.mark.parametrize('device, minutes, holds', [
    ('cpu', 4.9, True), ('cpu', 5.1, False), ('cuda', 8.9, True), ('cuda', 9.1, False)])
def test_a_run_is_short(device: str, minutes: float, holds: bool) -> None:
    run: Any = SimpleNamespace(
        args=SimpleNamespace(device=device, shapes=['tiny']), minutes=minutes)
    [found] = [c for c in evaluate(NOTHING, run).checks if 'minutes' in c.name]
    assert found.holds is holds


def test_serving_is_compared_at_the_same_load() -> None:
    found = values(served())
    assert found['load 50%: TTFT p95 beside fine-tuning / alone'] == pytest.approx(
        29.0 / 19.5)
    assert found['load 50%: TPOT p95 beside fine-tuning / alone'] == 1.0
    assert found['load 50%: fine-tuning / the rate of undivided steps alone'] == pytest.approx(0.75)
    assert found['load 50%: fine-tuning / what the remaining device time could yield'
                 ] == pytest.approx(1.5)
    assert found['load 50%: time that the device works'] == pytest.approx(0.99)
    others = {r.name: r.value for r in checks.reported(['1b'], served())}
    assert others == {f'load {load}: fine-tuning / the rate of undivided steps alone':
                      pytest.approx(rate) for load, rate in (('0%', 1.0), ('100%', 0.5))}
    rows = checks.loads_table(served()).rows
    assert [row[:2] for row in rows] == [
        ['0%', 'mace'], ['50%', 'inference_only'], ['50%', 'mace'],
        ['100%', 'inference_only'], ['100%', 'mace']]


@pytest.mark.parametrize('peak, ratio', [(5e9, 0.75), (None, None), (math.nan, None)])
def test_peak_memory_without_the_weights_is_compared_with_the_budget(
        peak: float | None, ratio: float | None) -> None:
    samples = served()
    samples['memory'][0]['peak_bytes'] = peak
    assert values(samples)['1b: peak memory beside the weights / the budget'] == ratio


def test_what_a_floor_reads_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_timing, 'BUFFER_BYTES', 400)
    ones, sums = torch.ones, []
    monkeypatch.setattr(torch, 'zeros', lambda *args, **kwargs: ones(*args, **kwargs))
    total = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, 'sum', lambda x: sums.append(x.numel()) or total(x))
    assert reading(1000, 'cpu')() == 50.0
    assert sums == [100, 100, 50]       # 1000 bytes, 400 at a time
    assert reading(40, 'cpu')() == 0.0 and sums[3:] == [10, 0]


def test_a_shape_that_is_measured_again_keeps_the_samples_of_others() -> None:
    rows = [{'shape': '1b int4', 'ms': 1.0}, {'shape': '8b int4', 'ms': 2.0}]
    assert of_others(rows, ['8b']) == rows[:1]
    assert of_others([block('mace', 0.5)], ['8b']) == []    # of one shape at a time


def test_a_peak_is_unknown_without_a_gpu() -> None:
    with PeakMemory('cpu') as peak:
        pass
    assert math.isnan(peak.nbytes)


def test_each_load_runs_with_and_without_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, 'arrivals', lambda *_, count, seconds, tokens: [
        Arrival(seconds, '', ())] * count)
    ran: list[tuple[str, int, float]] = []

    class Served:
        """An engine whose requests take a second, and its steps half of one."""

        engine = SimpleNamespace(chat=None)

        def run_block(self, system: str, number: int, requests: list[Arrival], seconds: float,
                      _: int) -> Any:
            ran.append((system, len(requests), seconds))
            return SimpleNamespace(block={'system': system, 'block': number}, requests=[
                {'ttft_ms': 1.0, 'tpot_ms': 2.0}] * len(requests))

        def request_seconds(self, *_: object) -> float:
            return 1.0

        def undivided_steps(self, count: int) -> list[float]:
            return [0.5] * count

    rows = list(Loads(Served(), SimpleNamespace(  # type: ignore[arg-type]
        args=SimpleNamespace(requests=40), say=lambda text: None)).blocks())
    one = {('mace', 0, 10.0), ('mace', 10, 20.0), ('inference_only', 10, 20.0),
           ('mace', 10, 10.0), ('inference_only', 10, 10.0)}
    assert set(ran[4:]) == one and len(ran) == 4 + 5 * beside.BLOCKS
    for load in LOADS[1:]:
        first = [r['system'] for r in rows if r['load'] == load][::2]
        assert set(first) == {'mace', 'inference_only'}     # in turn
    assert {len(r['tpot_ms']) for r in rows if r['load']} == {10}


# -- claims ------------------------------------------------------------------------------


@pytest.mark.parametrize('claim', CLAIMS, ids=lambda claim: f'{claim.page}: {claim.what}')
def test_a_claim_stands_on_its_page(claim: Any) -> None:
    page = (ROOT / 'docs' / claim.page).read_text()
    assert claim.text in ' '.join(page.split())
    assert bool(claim.what) == bool(claim.target)


def verdict_of(samples: dict[str, Any], what: str, *, on_gpu: bool = True) -> str:
    [verdict] = {row[0] for row in verdicts(samples, on_gpu=on_gpu).rows if row[3] == what}
    return str(verdict)


def test_claims_are_confirmed_or_refuted_by_what_was_measured() -> None:
    assert {row[0] for row in verdicts(NOTHING, on_gpu=True).rows} == {'not touched'}
    samples = served() | {'errors': [{'path': 'graphs: decode', 'error': 0.2},
                                     {'path': 'paged attention', 'error': 0.001}]}
    assert verdict_of(samples, 'error of passes under graphs') == 'refuted'
    assert verdict_of(samples, 'error of paged attention') == 'confirmed'
    assert verdict_of(samples, 'peak beside the weights / budget') == 'confirmed'
    assert verdict_of(samples, 'time that the device waits for the host') == 'confirmed'
    assert verdict_of(samples, 'bytes per parameter') == 'not touched'
    assert {row[0] for row in verdicts(samples, on_gpu=False).rows} == {'not touched'}


def test_claims_about_passes_are_judged_by_the_largest_shape() -> None:
    samples = NOTHING | {'passes': [
        {'shape': f'{shape} {weights}', 'what': 'decode', 'ms': ms}
        for shape, weights, ms in (('1b', 'bfloat16', 1.0), ('1b', 'int4', 2.0),
                                   ('8b', 'bfloat16', 9.0), ('8b', 'int4', 3.0))]}
    assert checks.largest_shape(samples) == '8b'
    assert verdict_of(samples, 'decode, int4 / bfloat16') == 'confirmed'
