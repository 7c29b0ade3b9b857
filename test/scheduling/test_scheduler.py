# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Behaviour that all policies share: serving, admission, budgets, live settings, accounts."""

from copy import deepcopy

from hypothesis import given, settings as hypothesis_settings, strategies as st
import pytest
from support.virtual_device import (
    CheckedEngine,
    FixedCache,
    new_step,
    poisson,
    query,
    served,
    STEP_TOKENS,
    tpot,
    ttft,
    VirtualDevice,
)

from mace_ros.api.settings import PARAMETERS, Settings
from mace_ros.scheduling.plan import SegmentKind, State
from mace_ros.scheduling.prefill_queue import PrefillQueue
from mace_ros.scheduling.request import Request, RequestState
from mace_ros.scheduling.scheduler import POLICY_CLASSES, Scheduler
from mace_ros.scheduling.waiting_queue import PATIENCE, WaitingQueue

QUIET = VirtualDevice()
CALIBRATED = QUIET.calibrated()


def scheduler(**values) -> Scheduler:
    names = {name.replace('__', '.'): value for name, value in values.items()}
    return Scheduler(Settings().updated(names), deepcopy(CALIBRATED))


def running(number: int, *, now: float, output: int = 5, prompt: int = 64, tpot: float = 0.1,
            behind: float = 0.0, answer: int = 200) -> Request:
    """Return a decoding request whose next token is due one TPOT from now, less ``behind``."""
    request = query(number, now - 10.0, prompt=prompt, answer=answer, tpot=tpot)
    request.state = RequestState.RUNNING
    request.output_tokens = output
    request.computed_tokens = prompt + output - 1
    request.first_token_at = now + tpot - behind - output * tpot
    request.last_token_at = now
    request.blocks = list(range(-(-request.known_tokens // 16)))
    return request


def test_the_parameter_offers_exactly_the_policies():
    assert PARAMETERS['scheduler.policy'].choices == tuple(POLICY_CLASSES)


# -- under any load, each request is served and each plan is valid -----------------------

queries = st.builds(
    dict, arrival=st.floats(0.0, 3.0), prompt=st.integers(1, 600), answer=st.integers(1, 40),
    ttft=st.sampled_from([0.001, 0.2, 1.0, 600.0]), tpot=st.sampled_from([0.001, 0.03, 0.1, 60.0]),
    priority=st.integers(-3, 3))
changes = st.lists(st.tuples(st.floats(0.0, 5.0), st.sampled_from([
    {'scheduler.policy': 'mace'}, {'scheduler.policy': 'continuous'},
    {'scheduler.policy': 'static_split'}, {'scheduler.policy': 'periodic'},
    {'scheduler.max_requests': 1}, {'scheduler.max_batch_tokens': 7},
    {'scheduler.max_batch_tokens': 300}, {'scheduler.max_slowdown': 100.0},
    {'finetune.budget': 0.0}, {'finetune.budget': 0.3}, {'finetune.max_blocking_ms': 1.0},
    {'slo.freshness_s': 1.0, 'finetune.min_share': 0.5}])), max_size=4)


@hypothesis_settings(max_examples=60)
@given(policy=st.sampled_from(sorted(POLICY_CLASSES)), queries=st.lists(queries, max_size=14),
       changes=changes, tokens=st.sampled_from([3, 64, 256]), most=st.sampled_from([1, 2, 16]),
       memory=st.sampled_from([672, 2000, 16384]), recompute=st.booleans(),
       slowdown=st.sampled_from([1.0, 1.05, 3.0]))
def test_no_request_starves_and_every_plan_is_valid(
        policy, queries, changes, tokens, most, memory, recompute, slowdown):
    # The engine checks each plan: limits of tokens, requests and memory, no request planned
    # twice, no more segments than are left; and that it never gets stuck.
    engine = served(
        policy, [query(n, **q) for n, q in enumerate(queries)], until=6.0,
        device=VirtualDevice(scale=0.3, noise=0.1, outliers=0.02, seed=len(queries)),
        changes=sorted(changes, key=lambda change: change[0]), recompute=recompute,
        values={'scheduler.max_batch_tokens': tokens, 'scheduler.max_requests': most,
                'memory.kv_cache_tokens': memory, 'scheduler.max_slowdown': slowdown,
                'finetune.period_s': 2.0})
    assert len(engine.finished) == len(queries)
    assert all(r.output_tokens == r.max_tokens for r in engine.finished)
    # A step that piggybacks at the end still holds blocks.
    assert engine.pool.free_blocks + engine.blocks_of_step == engine.pool.num_blocks
    for step in engine.steps:
        whole = [s.kind for s in new_step(recompute=recompute).left]
        ran = [SegmentKind.BACKWARD if s.kind is SegmentKind.BACKWARD_RECOMPUTED and not recompute
               else s.kind for s in step.done]
        if step.piggybacked_so_far:
            assert not ran or step.piggybacked_so_far == STEP_TOKENS
            whole = [kind for kind in whole if kind is not SegmentKind.FORWARD]
        assert ran == whole[:len(ran)]


def test_the_same_calls_give_the_same_plans():
    def plans():
        engine = served('mace', poisson(30, 2.0, seed=3), until=20.0)
        return [(at, [r.id for r in plan.decode], [(c.request.id, c.tokens) for c in plan.prefill],
                 plan.finetune_tokens, plan.segments, plan.predicted_s)
                for at, plan in engine.plans]
    assert plans() == plans()


def test_requests_of_higher_priority_do_not_starve_the_rest():
    flood = [query(n, 0.05 * n, answer=4, priority=5, ttft=0.2) for n in range(400)]
    humble = query('humble', 0.5, answer=4, ttft=0.2)
    served('inference_only', [*flood, humble], device=VirtualDevice())
    assert ttft(flood[-1]) > 5.0, 'the load is too low for this test'
    assert 1.0 < ttft(humble) < 5.0   # delayed by the flood, but served before its end


# -- the content of a pass -----------------------------------------------------------

def test_least_slack_goes_first_within_a_priority():
    state = State(FixedCache(10000))
    relaxed = query('relaxed', 0.0, ttft=2.0)
    long = query('long', 0.0, ttft=0.7, prompt=250)
    urgent = query('urgent', 0.0, ttft=0.6)
    important = query('important', 0.0, ttft=2.0, priority=1)
    state.waiting = WaitingQueue([relaxed, long, urgent, important])
    order = []
    plans = scheduler()
    while state.waiting:
        for chunk in plans.plan(state, 0.0).prefill:
            order.append(chunk.request.id)
            if chunk.request in state.waiting:
                state.waiting.remove(chunk.request)
    assert order == ['important', 'long', 'urgent', 'relaxed']


@given(waiting=st.lists(st.tuples(
           st.integers(0, 100), st.sampled_from([0.2, 1.0, 5.0]), st.integers(1, 600),
           st.integers(0, 3)), max_size=20),
       started=st.lists(st.integers(1, 600), max_size=2), now=st.sampled_from([0.5, 20.0, 200.0]))
def test_the_lazy_prefill_queue_has_the_order_of_a_full_sort(waiting, started, now):
    waiting = [query(n, float(arrival), prompt=prompt, ttft=ttft, priority=priority)
               for n, (arrival, ttft, prompt, priority) in enumerate(waiting)]
    started = [query(100 + n, 0.0, prompt=prompt) for n, prompt in enumerate(started)]

    def prefill_s(tokens: int) -> float:
        return 0.01 * tokens

    def turn(request: Request) -> tuple[float, float]:
        if now > request.arrival + PATIENCE * request.ttft_slo:
            return float('-inf'), request.arrival
        return -request.priority, request.deadline - prefill_s(request.prompt_tokens)

    queue = PrefillQueue(started, WaitingQueue(waiting), FixedCache(), prefill_s, now)
    order = []
    while (candidate := queue.pop(admit=True)) is not None:
        order.append(turn(candidate[3]))
    assert order == sorted(map(turn, started + waiting))
    assert queue.remaining == 0


def test_prompts_that_arrive_together_are_computed_one_after_another():
    requests = [query(n, 0.0, prompt=400, answer=4) for n in range(8)]
    engine = served('inference_only', requests, device=VirtualDevice())
    begun = []
    for _, plan in engine.plans:
        begun += [c.request.id for c in plan.prefill if begun[-1:] != [c.request.id]]
    assert sorted(begun) == sorted({r.id for r in requests})    # each one once


def test_a_plan_looks_up_only_the_waiting_requests_that_may_be_next():
    cache = FixedCache(10000)
    state = State(cache, WaitingQueue(query(n, 0.01 * n) for n in range(1000)))
    plan = scheduler().plan(state, 10.0)
    assert [chunk.request.id for chunk in plan.prefill][:1] == ['0']
    assert len(cache.looked_up) < 20


def test_no_waiting_request_is_looked_up_without_a_free_slot():
    cache = FixedCache(10000)
    state = State(cache, WaitingQueue(query(n, 0.01 * n) for n in range(100)),
                  [running(100, now=10.0)])
    plan = scheduler(scheduler__max_requests=1).plan(state, 10.0)
    assert plan.decode and not plan.prefill
    assert not cache.looked_up


def test_a_prefill_chunk_lets_decode_rows_meet_their_deadline():
    now = 100.0
    for spare in (0.03, 0.05, 0.08, 0.12, 0.2):
        row = running(0, now=now, tpot=0.3, behind=0.3 - spare)
        state = State(FixedCache(10000), WaitingQueue([query(1, now, prompt=200)]), [row])
        plan = scheduler().plan(state, now)
        assert plan.decode == (row,)
        assert QUIET.seconds(plan.shape) <= spare
        if spare >= 0.08:   # and uses their slack
            assert QUIET.seconds(plan.shape) >= 0.6 * min(spare, 0.21)


def test_a_late_row_does_not_stop_prefills():
    now = 100.0
    row = running(0, now=now, tpot=0.001, behind=5.0)
    state = State(FixedCache(10000), WaitingQueue([query(1, now, prompt=200)]), [row])
    plan = scheduler().plan(state, now)
    assert plan.decode == (row,)
    assert 16 <= plan.prefill[0].tokens < 100   # and the prefill does not stop the row


def test_a_very_late_prompt_no_longer_waits_for_rows_without_slack():
    row, prompt = query(0, 0.0, answer=300, tpot=0.0258), query(1, 0.3)
    served('inference_only', [row, prompt], device=VirtualDevice())
    assert 0.9 < ttft(prompt) < 1.4


def test_too_many_decode_rows_take_turns_by_deadline():
    now = 100.0
    rows = [running(n, now=now, behind=0.01 * n) for n in range(6)]
    plan = scheduler(scheduler__max_requests=3).plan(State(FixedCache(0), running=rows), now)
    assert set(plan.decode) == set(rows[3:])


def test_a_row_that_is_always_late_does_not_starve_another():
    late, patient = query(0, 0.0, answer=200, tpot=0.001), query(1, 0.0, answer=4, tpot=0.5)
    served('inference_only', [late, patient], device=VirtualDevice(),
           changes=[(0.2, {'scheduler.max_requests': 1})])
    assert patient.last_token_at < late.last_token_at
    assert tpot(patient) < 0.55


def test_prompts_share_a_pass_only_where_that_pays():
    state = State(FixedCache(10000), WaitingQueue([query(0, 0.0), query(1, 0.0)]))
    on_cpu = scheduler().plan(state, 0.0)
    assert [c.request.id for c in on_cpu.prefill] == ['0']   # 80 + 80 ms, or both 140
    gpu = VirtualDevice(curve=((1, 8.4), (200, 8.8), (65536, 2870.0)))
    on_gpu = Scheduler(Settings(), gpu.calibrated()).plan(state, 0.0)
    assert [c.request.id for c in on_gpu.prefill] == ['0', '1']


def test_admission_waits_for_memory_and_late_requests_are_not_overtaken():
    big = query('big', 0.0, prompt=100, answer=100)
    small = query('small', 0.0, prompt=10, answer=5, ttft=5.0)
    row = running(9, now=0.0, tpot=10.0)
    cache = FixedCache(112)
    state = State(cache, WaitingQueue([big, small]), [row])
    plans = scheduler()
    assert [c.request for c in plans.plan(state, 0.0).prefill] == [small]
    assert not plans.plan(state, 1.0).prefill   # big is late: freed blocks are reserved for it
    cache.free_tokens = 200
    assert plans.plan(state, 1.0).prefill[0].request is big


def test_of_the_requests_with_slack_the_largest_is_preempted():
    now = 100.0
    short, long = (running(n, now=now, prompt=prompt, output=1, tpot=60.0)
                   for n, prompt in enumerate((64, 256)))
    late = running(2, now=now, prompt=512, output=1, tpot=0.001, behind=1.0)
    rows = [short, long, late]
    for row in rows:
        row.blocks.pop()    # the next token needs another block
    plan = scheduler().plan(State(FixedCache(32), running=rows), now)
    assert (plan.preempted, plan.decode) == ((long,), (short, late))


def test_a_request_larger_than_the_cache_is_rejected_with_the_sizes():
    state = State(FixedCache(512, 512), WaitingQueue([query(0, 0.0, prompt=300, answer=300)]))
    plan = scheduler().plan(state, 0.0)
    assert plan.rejected[0].reason == (
        '608 tokens of KV cache needed, the cache holds 512 (memory.kv_cache_tokens, '
        'memory.budget_mb)')


# -- admission by prediction -----------------------------------------------------------

def test_reject_rejects_requests_that_would_be_late_with_the_prediction():
    burst = [query(n, 0.0, ttft=0.5, answer=8) for n in range(20)]
    engine = served('inference_only', burst, device=VirtualDevice(),
                    values={'slo.admission': 'reject'})
    assert 3 <= len(engine.finished) <= 8
    assert len(engine.finished) + len(engine.rejected) == 20
    assert all(ttft(r) <= 0.55 for r in engine.finished)
    reason = engine.plans[0][1].rejected[0].reason
    assert reason.startswith('predicted time to first token ') and reason.endswith('500 ms')
    assert engine.scheduler.statistics(engine.now).rejected == len(engine.rejected)


def test_reject_considers_that_all_slots_are_taken():
    rows = [running(n, now=0.0, answer=100) for n in range(2)]
    state = State(FixedCache(10000), WaitingQueue([query(9, 0.0)]), rows)
    plans = scheduler(slo__admission='reject', scheduler__max_requests=2)
    assert plans.plan(state, 0.0).rejected
    assert not scheduler(slo__admission='reject').plan(state, 0.0).rejected


def test_serve_late_serves_all():
    burst = [query(n, 0.0, ttft=0.1, answer=8) for n in range(20)]
    engine = served('inference_only', burst, device=VirtualDevice())
    assert len(engine.finished) == 20


# -- live settings and accounts ----------------------------------------------------------

@pytest.mark.parametrize(('values', 'shows'), [
    ({'scheduler.policy': 'inference_only'}, lambda plan: not plan.segments),
    ({'finetune.budget': 0.0}, lambda plan: not plan.segments),
    ({'finetune.max_blocking_ms': 4.0}, lambda plan: plan.segments == 1),
    ({'finetune.max_blocking_ms': 500.0}, lambda plan: plan.segments > 20),
    ({'scheduler.policy': 'continuous'}, lambda plan: not plan.interruptible),
])
def test_a_change_applies_at_the_next_plan_when_idle(values, shows):
    plans = scheduler()
    state = State(FixedCache(10000), finetune=new_step())
    before = plans.plan(state, 0.0)
    assert before.segments in range(9, 14) and before.interruptible and not shows(before)
    plans.update(Settings().updated(values))
    assert shows(plans.plan(state, 0.0))


@pytest.mark.parametrize(('values', 'shows'), [
    ({'scheduler.max_batch_tokens': 40}, lambda plan: plan.shape.tokens == 40),
    ({'scheduler.max_requests': 1}, lambda plan: not plan.prefill),
    ({'slo.admission': 'reject'}, lambda plan: plan.rejected),
    ({'slo.freshness_s': 3.0}, lambda plan: plan.segments),
    ({'scheduler.policy': 'static_split'}, lambda plan: plan.segments),
])
def test_a_change_applies_at_the_next_plan_when_busy(values, shows):
    plans = scheduler()
    state = State(FixedCache(10000), WaitingQueue([query(1, 5.9, prompt=2000, ttft=0.3)]),
                  [running(0, now=6.0, tpot=9.0)], new_step())
    plans.plan(state, 0.0)
    before = plans.plan(state, 6.0)
    assert before.shape.tokens == 256 and not shows(before)
    plans.update(Settings().updated(values))
    assert shows(plans.plan(state, 6.0))


@pytest.mark.parametrize('policy', ['mace', 'continuous', 'static_split'])
@pytest.mark.parametrize('budget', [0.05, 0.4])
def test_learning_stays_within_its_budget(policy, budget):
    engine = served(policy, poisson(10, 1.0, seed=4), until=60.0,
                    values={'finetune.budget': budget})
    # One slice may overdraw the budget: of 50 ms as predicted, and the prediction can be wrong.
    slice_s = 1.4 if policy == 'continuous' else 0.08
    learning_s = engine.scheduler.statistics(engine.now).learning_s
    assert 0.85 * budget * engine.now <= learning_s <= budget * engine.now + slice_s


def test_without_a_budget_nothing_is_learned_until_it_is_raised():
    engine = served('mace', [], until=20.0, values={'finetune.budget': 0.0},
                    changes=[(10.0, {'finetune.budget': 1.0})])
    learned = [at for at, plan in engine.plans if plan.segments]
    assert min(learned) == 10.0
    assert engine.scheduler.statistics(20.0).learning_s == pytest.approx(10.0, rel=0.05)


def test_the_statistics_account_for_all_tokens_and_seconds():
    requests = poisson(20, 0.5, seed=5)
    engine = served('mace', requests, until=60.0)
    accounts = engine.scheduler.statistics(engine.now)
    assert accounts.prefill_tokens == 20 * 64
    assert accounts.decode_tokens == 20 * 31
    assert accounts.finetune_steps == engine.finished_steps > 0
    assert accounts.finetune_tokens == STEP_TOKENS * accounts.finetune_steps
    assert accounts.serving_s + accounts.learning_s == pytest.approx(engine.now, rel=0.001)
    assert 0.9 <= accounts.busy_share <= 1.0
    assert accounts.iterations == sum(not plan.is_empty for _, plan in engine.plans)
    assert max(tpot(r) for r in requests) < 0.1


def test_a_pass_with_piggybacked_tokens_is_split_between_serving_and_learning():
    device = VirtualDevice(curve=((1, 8.4), (200, 8.8), (65536, 2870.0)))
    settings = Settings().updated({'scheduler.max_slowdown': 2.0})
    engine = CheckedEngine(Scheduler(settings, device.calibrated()), device, settings,
                           recompute=True)
    engine.run([query(0, 0.0, answer=200)])
    accounts = engine.scheduler.statistics(engine.now)
    assert accounts.piggybacked_tokens > STEP_TOKENS
    alone = served('inference_only', [query(0, 0.0, answer=200)], device=device)
    assert accounts.serving_s == pytest.approx(alone.now, rel=0.05)
