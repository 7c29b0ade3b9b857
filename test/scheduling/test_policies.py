# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""When each policy learns, on a device that only takes time."""

from functools import cache
import gc
from itertools import pairwise
from weakref import ref

from hypothesis import given, settings as hypothesis_settings, strategies as st
import pytest
from support.virtual_device import (
    CheckedEngine,
    CPU_PASS,
    FixedCache,
    GPU_PASS,
    poisson,
    quantile,
    query,
    served,
    STEP_TOKENS,
    tpot,
    ttft,
    undivided_step_s,
    VirtualDevice,
)

from mace_ros.api.settings import Settings
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import SegmentKind, State
from mace_ros.scheduling.policies import InferenceOnly
from mace_ros.scheduling.scheduler import POLICY_CLASSES, Scheduler
from mace_ros.scheduling.waiting_queue import WaitingQueue


def saturated(policy: str, seconds: float = 60.0, **kinds) -> CheckedEngine:
    """Return an engine that always had more requests than it could serve."""
    requests = [query(n, 0.02 * n, answer=64) for n in range(int(5 * seconds))]
    return served(policy, requests, **kinds)


def shares(engine: CheckedEngine, until: float) -> tuple[float, float]:
    """Return the predicted seconds of serving and learning in plans before ``until``."""
    plans = [plan for at, plan in engine.plans if at < until]
    learning = [p for p in plans if not p.decode and not p.prefill]
    return (sum(p.predicted_s for p in plans) - sum(p.predicted_s for p in learning),
            sum(p.predicted_s for p in learning))


# -- the baselines ----------------------------------------------------------------------

def test_inference_only_never_learns():
    engine = served('inference_only', poisson(5, 1.0, seed=1), until=20.0)
    assert not engine.finished_steps and not engine.steps[0].done


def test_continuous_halves_the_device_while_both_have_work():
    engine = saturated('continuous', device=VirtualDevice(noise=0.05))
    serving, learning = shares(engine, until=60.0)
    assert serving / (serving + learning) == pytest.approx(0.5, abs=0.03)


def test_continuous_runs_whole_steps_and_uses_the_idle_time():
    engine = served('continuous', poisson(10, 0.5, seed=2), until=60.0)
    steps = [plan for _, plan in engine.plans if plan.segments]
    assert all(plan.segments == len(engine.steps[-1].left + engine.steps[-1].done)
               and not plan.interruptible and not plan.decode + plan.prefill for plan in steps)
    accounts = engine.scheduler.statistics(engine.now)
    assert accounts.serving_s + accounts.learning_s == pytest.approx(engine.now, rel=0.001)


def test_periodic_stops_the_world_for_its_steps_every_period():
    values = {'finetune.period_s': 20.0, 'finetune.period_steps': 3}
    engine = served('periodic', poisson(60, 0.5, seed=3), until=130.0, values=values)
    steps = [at for at, plan in engine.plans if plan.segments]
    begins = steps[::3]
    assert begins[0] >= 20.0
    for begin, following in pairwise(begins):
        assert 20.0 <= following - begin <= 20.3   # the current pass ends first
    for group in zip(steps[::3], steps[1::3], steps[2::3], strict=False):
        between = [p for at, p in engine.plans if group[0] <= at <= group[2]]
        assert len(between) == 3, 'the steps of a retraining were interrupted'


def test_periodic_serves_as_long_as_it_trains_when_its_period_is_too_short():
    engine = saturated('periodic', values={'finetune.period_s': 1.0})
    serving, learning = shares(engine, until=60.0)
    assert serving / (serving + learning) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize('share', [0.0, 0.2, 0.5, 0.8])
def test_static_split_gives_learning_its_share(share):
    engine = saturated('static_split', seconds=20.0, values={'scheduler.static_share': share})
    accounts = engine.scheduler.statistics(engine.now)
    assert accounts.learning_s / engine.now == pytest.approx(share, abs=0.02)


def test_static_split_learns_in_idle_time():
    engine = served('static_split', [], until=20.0, values={'scheduler.static_share': 0.2})
    assert engine.scheduler.statistics(20.0).learning_s == pytest.approx(20.0, rel=0.01)


# -- mace: latency and idle time ---------------------------------------------------------

RATE, COUNT = 0.45, 100   # loads inference_only by about 40 %


@cache
def under_load(policy: str, seed: int) -> CheckedEngine:
    requests = poisson(COUNT, RATE, seed)
    return served(policy, requests, until=requests[-1].arrival)


@pytest.mark.parametrize('seed', [11, 12])
def test_mace_keeps_the_latency_of_serving_alone(seed):
    alone, mace, continuous = (
        under_load(policy, seed) for policy in ('inference_only', 'mace', 'continuous'))
    assert 0.3 <= alone.scheduler.statistics(alone.now).serving_s / alone.now <= 0.5
    for measure, most_of_continuous in ((ttft, 0.37), (tpot, 0.70)):
        p95_alone, p95, p95_continuous = (
            quantile([measure(r) for r in engine.finished], 0.95)
            for engine in (alone, mace, continuous))
        assert p95 <= 1.15 * p95_alone
        assert p95 <= most_of_continuous * p95_continuous


@pytest.mark.parametrize('seed', [11, 12])
def test_mace_uses_the_idle_time(seed):
    alone, mace = under_load('inference_only', seed), under_load('mace', seed)
    idle_s = mace.now - alone.scheduler.statistics(alone.now).serving_s
    possible = idle_s / undivided_step_s(mace.device)
    assert mace.learned_steps >= 0.8 * possible
    accounts = mace.scheduler.statistics(mace.now)
    assert accounts.serving_s + accounts.learning_s >= 0.95 * mace.now


@pytest.mark.parametrize('blocking_ms', [25.0, 50.0, 200.0])
def test_a_query_waits_for_one_segment_at_most(blocking_ms):
    device = VirtualDevice(noise=0.03)
    engine = served('mace', poisson(60, 0.4, seed=13), device=device,
                    values={'finetune.max_blocking_ms': blocking_ms})
    assert len(engine.learning_waits) > 20
    # Plans are interruptible: a query waits for the current segment, of up to 30 ms.
    assert max(engine.learning_waits) <= 0.035
    planned = [plan.predicted_s for _, plan in engine.plans if plan.segments and not plan.has_pass]
    longest = 4.0 * blocking_ms / 1e3
    assert max(planned) <= 1.1 * longest
    if blocking_ms == 50.0:
        assert quantile(planned, 0.5) >= 0.7 * longest


# -- mace: decisions ----------------------------------------------------------------------

@hypothesis_settings(max_examples=15)
@given(seed=st.integers(0, 1000), rate=st.floats(0.3, 3.0), slowdown=st.floats(1.0, 1.5))
def test_mace_learns_beside_decodes_only_and_within_the_allowed_slowdown(
        seed, rate, slowdown):
    device = VirtualDevice(noise=0.03, seed=seed)
    engine = served('mace', poisson(20, rate, seed), device=device,
                    values={'scheduler.max_slowdown': slowdown})
    delay = dict.fromkeys(engine.finished, 0.0)
    for ((at, plan), (end, _)), segment_s in zip(
            pairwise([*engine.plans, (engine.now, None)]), engine.segment_s, strict=True):
        learning = plan.segments or plan.finetune_tokens
        if not (learning and plan.decode):
            continue
        assert not plan.prefill
        for request in engine.finished:
            if request.arrival <= at < request.last_token_at:
                assert request in plan.decode, 'a request waits for its first token'
                if request.last_token_at < end:
                    continue   # its last token was published before the segments
                delay[request] += segment_s + device.seconds(plan.shape) - device.seconds(
                    plan.shape._replace(finetune_tokens=0))
    for request, delayed in delay.items():
        spent = request.last_token_at - request.first_token_at
        assert delayed <= (slowdown - 1.0) * (spent - delayed) + 0.005


@pytest.mark.parametrize(('curve', 'objective'), [(CPU_PASS, 0.06), (GPU_PASS, 0.012)])
@pytest.mark.parametrize('recompute', [False, True])
def test_mace_meets_the_slo_for_any_allowed_slowdown(curve, objective, recompute):
    requests = [query(n, 3.0 * n, tpot=objective) for n in range(12)]
    engine = served('mace', requests, device=VirtualDevice(curve=curve, noise=0.02),
                    values={'scheduler.max_slowdown': 1000.0}, recompute=recompute)
    assert all(r.slo_met for r in requests)
    # And uses the slack that the SLO leaves.
    assert quantile([tpot(r) for r in requests], 0.5) >= 0.75 * objective
    assert bool(engine.scheduler.statistics(engine.now).piggybacked_tokens) == recompute


def test_mace_does_not_learn_beside_late_answers():
    requests = [query(n, 3.0 * n, tpot=0.01) for n in range(5)]
    engine = served('mace', requests, device=VirtualDevice(),
                    values={'scheduler.max_slowdown': 1000.0})
    assert not any(plan.decode and plan.segments for _, plan in engine.plans)


def test_tokens_are_piggybacked_only_where_that_saves_device_time():
    busy = [query(n, 0.0, answer=300) for n in range(4)]
    values = {'scheduler.max_slowdown': 1.5}

    def piggybacked(device, recompute):
        engine = served('mace', [query(r.id, 0.0, answer=300) for r in busy], device=device,
                        values=values, recompute=recompute)
        return engine.scheduler.statistics(engine.now).piggybacked_tokens

    # A large GPU reads the weights anyway; but a piggybacked forward keeps no graphs.
    assert piggybacked(VirtualDevice(curve=GPU_PASS), recompute=True) > 10 * STEP_TOKENS
    assert piggybacked(VirtualDevice(), recompute=False) == 0


def test_piggybacking_is_decided_anew_for_each_step():
    device = VirtualDevice(curve=GPU_PASS)
    settings = Settings().updated({'scheduler.max_slowdown': 1.5})
    engine = CheckedEngine(Scheduler(settings, device.calibrated()), device, settings)
    engine.run([query(0, 0.0, answer=100)])
    assert engine.scheduler.statistics(engine.now).piggybacked_tokens == 0
    engine.recompute = True   # of the next steps
    engine.run([query(1, engine.now, answer=300)])
    assert engine.scheduler.statistics(engine.now).piggybacked_tokens > STEP_TOKENS


def test_the_scheduler_keeps_no_reference_to_a_step():
    device = VirtualDevice(curve=GPU_PASS)
    settings = Settings().updated({'scheduler.max_slowdown': 1.5})
    scheduler = Scheduler(settings, device.calibrated())
    engine = CheckedEngine(scheduler, device, settings, recompute=True)
    engine.run([query(0, 0.0, answer=300)])
    assert scheduler.statistics(engine.now).piggybacked_tokens > STEP_TOKENS
    steps = [ref(step) for step in engine.steps]
    del engine
    gc.collect()
    assert not any(step() for step in steps)


def test_a_new_slowdown_applies_from_its_change_on():
    values = {'scheduler.max_slowdown': 3.0}
    engine = served('mace', [query(0, 1000.0, answer=400, tpot=9.0)], values=values,
                    changes=[(1004.0, {'scheduler.max_slowdown': 1.2})])
    first, then = (
        sum(seconds for (at, plan), seconds in zip(engine.plans, engine.segment_s, strict=True)
            if plan.decode and begin <= at < begin + 4.0) for begin in (1000.0, 1004.0))
    assert first == pytest.approx(2.0 / 3.0 * 4.0, rel=0.15)
    assert then == pytest.approx(0.2 / 1.2 * 4.0, rel=0.15)


def test_no_learning_while_rows_wait_for_their_turn_to_decode():
    engine = served('mace', [query(n, 0.0, answer=40) for n in range(4)], until=30.0,
                    values={'scheduler.max_slowdown': 3.0},
                    changes=[(0.4, {'scheduler.max_requests': 2})])
    crowded = max(at for at, plan in engine.plans if len(plan.decode) == 2)
    assert crowded > 1.0
    last_of_four = sorted(r.last_token_at for r in engine.finished)[1]
    assert not any(p.segments for at, p in engine.plans if 0.4 < at < last_of_four)


def test_a_piggybacked_forward_continues_when_idle():
    device = VirtualDevice(curve=GPU_PASS)
    queries = [query(n, 1.0 * n, answer=20 + n) for n in range(10)]
    engine = served('mace', queries, device=device, recompute=True,
                    values={'scheduler.max_slowdown': 1.2})
    piggybacked = [step for step in engine.steps if step.piggybacked_so_far]
    assert piggybacked and all(
        step.piggybacked_so_far == STEP_TOKENS for step in piggybacked[:-1])
    alone = [plan for _, plan in engine.plans if plan.finetune_tokens and not plan.decode]
    assert alone and all(plan.predicted_s <= 0.051 for plan in alone)


# -- mace: freshness ------------------------------------------------------------------------

@pytest.mark.parametrize('min_share', [0.05, 0.2])
def test_overdue_corrections_get_their_minimum_share_of_a_saturated_device(min_share):
    values = {'finetune.min_share': min_share, 'slo.freshness_s': 30.0}
    engine = saturated('mace', seconds=90.0, values=values)
    before = [p for at, p in engine.plans if at < 30.0]
    assert not any(p.segments for p in before if p.prefill)
    accounts = engine.scheduler.statistics(engine.now)
    assert accounts.learning_s / (engine.now - 30.0) == pytest.approx(min_share, rel=0.2)
    assert any(SegmentKind.OPTIMIZER in [s.kind for s in step.done] for step in engine.steps)


@pytest.mark.parametrize(('values', 'policies'), [
    ({}, {'mace', 'continuous', 'periodic', 'static_split'}),
    ({'finetune.min_share': 0.0}, {'continuous', 'periodic', 'static_split'}),
    ({'finetune.budget': 0.0}, set())])
def test_a_correction_takes_precedence_only_if_it_can_be_learned(values, policies):
    overdue, state = set(), State(FixedCache(10000))
    for name in POLICY_CLASSES:
        settings = Settings().updated(
            {'slo.freshness_s': 30.0, 'scheduler.policy': name, **values})
        scheduler = Scheduler(settings, CostModel())
        assert not scheduler.is_overdue(state, 70.0, now=100.0)
        if scheduler.is_overdue(state, 69.0, now=100.0):
            overdue.add(name)
    assert overdue == policies


def test_a_policy_may_decide_by_the_state_whether_a_correction_takes_precedence(monkeypatch):
    class Patient(InferenceOnly):
        def is_overdue(self, state, since, now):
            return not state.has_requests

    monkeypatch.setitem(POLICY_CLASSES, 'inference_only', Patient)
    scheduler = Scheduler(
        Settings().updated({'scheduler.policy': 'inference_only'}), CostModel())
    busy = State(FixedCache(10000), WaitingQueue([query(0, 0.0)]))
    assert scheduler.is_overdue(State(FixedCache(10000)), 0.0, now=1.0)
    assert not scheduler.is_overdue(busy, 0.0, now=1.0)


def test_requests_made_late_by_overdue_learning_are_counted():
    # Seven rows that are just in time without learning.
    requests = [query(n, 0.0, answer=200, tpot=0.036) for n in range(7)]
    values = {'finetune.min_share': 0.2, 'slo.freshness_s': 1.0}
    engine = served('mace', requests, values=values, device=VirtualDevice())
    alone = served('inference_only', [query(n, 0.0, answer=200, tpot=0.036) for n in range(7)],
                   device=VirtualDevice())
    missed = (sum(r.slo_met for r in alone.finished) - sum(r.slo_met for r in engine.finished))
    assert missed > 0
    assert engine.scheduler.statistics(engine.now).late_for_learning >= missed
    fresh = served('mace', [query(n, 0.0, answer=200, tpot=0.036) for n in range(7)],
                   device=VirtualDevice())
    assert fresh.scheduler.statistics(fresh.now).late_for_learning == 0
