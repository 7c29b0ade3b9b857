# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Replays under a virtual clock: inputs, results, and that skipping plans changes nothing."""

import dataclasses
from pathlib import Path
import subprocess
import sys

from hypothesis import given, Phase, settings as hypothesis_settings, strategies as st
import pytest
from support.arrivals import write_trace
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mace_ros.api.settings import Settings
from mace_ros.scheduling.plan import PassShape, Segment, SegmentKind
from mace_ros.simulation import arrival_trace
from mace_ros.simulation.devices import DEVICES
from mace_ros.simulation.models import MODELS
from mace_ros.simulation.replay import Load, replay, summary, Target
from mace_ros.simulation.roofline import Roofline, SteadyCost

POLICIES = ('mace', 'periodic', 'continuous', 'inference_only', 'static_split')
ORIN = Target('orin-agx-64', 'llama-3.2-1b')


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    return write_trace(tmp_path / 'arrivals.csv')


# -- inputs -------------------------------------------------------------------------------

def test_a_trace_is_read(tmp_path):
    path = tmp_path / 'arrivals.csv'
    path.write_text('TIMESTAMP,ContextTokens,GeneratedTokens\n'
                    '2023-11-16 18:15:46.6805900,374,44\n'
                    '2023-11-16 18:15:50.9951690,396,109\n'
                    '2023-11-16 18:15:51.0,7,0\n')
    first, second = arrival_trace.read(path)
    assert (first.at, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.at == pytest.approx(4.314579, abs=1e-6)


@pytest.mark.parametrize(('text', 'reason'), [
    ('', 'no column TIMESTAMP'),
    ('TIMESTAMP,ContextTokens\n', 'no column GeneratedTokens'),
    ('TIMESTAMP,ContextTokens,GeneratedTokens\n', 'no request'),
    ('TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.1,1,x\n', 'line 2'),
    ('TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n', 'line 2')])
def test_an_invalid_trace_is_refused_with_the_reason(tmp_path, text, reason):
    path = tmp_path / 'arrivals.csv'
    path.write_text(text)
    with pytest.raises(arrival_trace.InvalidArrivals, match=reason):
        arrival_trace.read(path)


@pytest.mark.parametrize('scale', [0.1, 0.5, 1.0, 3.0])
def test_a_scaled_trace_has_the_scaled_rate_and_its_lengths(azure, scale):
    recorded = arrival_trace.read(azure)
    arrivals = arrival_trace.thinned(recorded, scale, 600, seed=1)
    rate = arrival_trace.rate_of(recorded)
    assert arrival_trace.rate_of(arrivals) == pytest.approx(scale * rate, rel=0.15)
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    lengths = {(r.prompt_tokens, r.output_tokens) for r in recorded}
    assert {(a.prompt_tokens, a.output_tokens) for a in arrivals} <= lengths


def test_generators_have_their_rate_and_bursts_are_bursts():
    calm, wild = (make(0.5, 2000, seed=1) for make in (arrival_trace.poisson, arrival_trace.bursty))
    assert arrival_trace.rate_of(calm) == pytest.approx(0.5, rel=0.1)
    assert arrival_trace.rate_of(wild) == pytest.approx(0.5, rel=0.25)

    def spread(arrivals):   # dispersion of the counts in ten seconds; 1 for a Poisson process
        counts = [0] * (int(arrivals[-1].at / 10.0) + 1)
        for each in arrivals:
            counts[int(each.at / 10.0)] += 1
        mean = sum(counts) / len(counts)
        return sum((c - mean) ** 2 for c in counts) / len(counts) / mean

    assert spread(calm) == pytest.approx(1.0, abs=0.3)
    assert spread(wild) > 3.0


@pytest.mark.parametrize('name', ['smollm2-135m', 'llama-3.2-1b', 'llama-3-8b', 'qwen2.5-0.5b'])
def test_a_model_has_as_many_weights_as_in_transformers(name):
    import torch

    shape = MODELS[name]
    config, kind = ((Qwen2Config, Qwen2ForCausalLM) if name.startswith('qwen')
                    else (LlamaConfig, LlamaForCausalLM))
    with torch.device('meta'):
        model = kind(config(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden,
            intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim, tie_word_embeddings=shape.tied))
    matrices = {id(p): p.numel() for p in model.parameters() if p.dim() == 2}
    assert shape.parameters == sum(matrices.values())


@pytest.mark.parametrize('name', DEVICES)
def test_every_number_of_a_device_has_a_source(name):
    device = DEVICES[name]
    for mode in device.modes:
        for number in device.numbers(mode).values():
            assert number.value > 0.0
            assert len(number.source) > 3
    assert any(n.is_assumed for n in device.numbers('maxn').values())


def test_a_pass_takes_the_time_of_reading_or_of_computing():
    times = Roofline(DEVICES['orin-agx-64'], MODELS['llama-3.2-3b'])
    token_s = times.seconds(PassShape(1, 100))
    # The weights are read once, for one token as for eight.
    assert 3.2e9 * 2 / 204.8e9 < token_s < 2.0 * 3.2e9 * 2 / 204.8e9
    assert times.seconds(PassShape(8, 800)) < 1.05 * token_s
    # Large passes are bound by matrix multiplications.
    many = times.seconds(PassShape(0, 0, 4096, 0))
    assert many == pytest.approx(2.0 * times.seconds(PassShape(0, 0, 2048, 0)), rel=0.1)
    for kind in SegmentKind:
        assert 0.0 < times.seconds(Segment(kind, 64)) <= times.seconds(Segment(kind, 128))
    slow = Roofline(DEVICES['orin-agx-64'], MODELS['llama-3.2-3b'], mode='maxq')
    assert slow.seconds(PassShape(1, 100)) > 1.3 * token_s


@pytest.mark.parametrize('device', DEVICES)
def test_the_calibrated_cost_model_knows_the_device(device):
    times = Roofline(DEVICES[device], MODELS['llama-3.2-1b'])
    cost = SteadyCost.of(times, max_tokens=256)
    for shape in (PassShape(1, 300), PassShape(8, 9000), PassShape(0, 0, 200, 100 * 200),
                  PassShape(4, 4000, 100, 50 * 100)):
        assert cost.pass_s(*shape) == pytest.approx(times.seconds(shape), rel=0.1)
    for segment in (Segment(SegmentKind.FORWARD, 100), Segment(SegmentKind.HEAD, 16),
                    Segment(SegmentKind.BACKWARD_RECOMPUTED, 300)):
        assert cost.segment_s(segment.kind, segment.tokens) == pytest.approx(
            times.seconds(segment), rel=0.1)


def test_the_simulator_imports_neither_torch_nor_rclpy():
    code = ('import sys, mace_ros.simulation.__main__; '
            'assert not {"torch", "rclpy", "transformers"} & set(sys.modules)')
    subprocess.run([sys.executable, '-c', code], check=True)


# -- results ---------------------------------------------------------------------------------

def outcome_of(policy, arrivals, *, learning='corrections', skips=True, values=None, seed=0,
               target=ORIN):
    return replay(target, Settings().updated(values or {}), policy,
                  Load(arrivals, learning, seed=seed), skips=skips)


@hypothesis_settings(max_examples=60, phases=[
    Phase.explicit, Phase.reuse, Phase.generate])     # shrinking a replay would take minutes
@given(seed=st.integers(0, 10**6), policy=st.sampled_from(POLICIES),
       rate=st.sampled_from([0.05, 0.3, 1.0, 3.0]), learning=st.sampled_from(
           ['corrections', 'always', 'none']),
       kv=st.sampled_from([4096, 8192, 65536]), rows=st.sampled_from([2, 16]),
       budget=st.sampled_from([0.0, 0.2, 1.0]), admission=st.sampled_from(
           ['serve_late', 'reject']))
def test_skipping_plans_gives_the_same_results(
        seed, policy, rate, learning, kv, rows, budget, admission):
    arrivals = [dataclasses.replace(a, prompt_tokens=min(a.prompt_tokens, 2000))
                for a in arrival_trace.bursty(rate, 25, seed)]
    values = {'memory.kv_cache_tokens': kv, 'scheduler.max_requests': rows,
              'finetune.budget': budget, 'slo.admission': admission, 'slo.freshness_s': 5.0}
    stepped, skipped = (
        summary(outcome_of(policy, arrivals, learning=learning, skips=skips, values=values,
                           seed=seed)) for skips in (False, True))
    assert skipped.pop('plans') <= stepped.pop('plans')
    same(skipped, stepped)


def same(one, other):
    """Compare summaries; sums in another order may differ in the last digits."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9, nan_ok=True)
    else:
        assert one == other


def test_most_iterations_need_no_plan():
    arrivals = arrival_trace.poisson(0.05, 40, seed=1)
    found = outcome_of('mace', arrivals)
    assert found.plans < 0.5 * found.iterations
