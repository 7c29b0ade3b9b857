# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Shapes of device graphs: each pass fits one, or runs eagerly where none could be captured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
import math
import random
from typing import Any
import weakref

from hypothesis import given, settings, strategies as st
import pytest
from support.fake_graphs import fake_graph, overwrite, Results, use_fake_graphs
from support.families import random_ids, tiny_model, with_reference
from support.serving import assert_response_of, random_sample, Request, serve
import torch
from transformers import PreTrainedModel

from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model import graph_check, graphed_layers
from mace_ros.model.batch_descriptor import (
    batch_descriptors,
    BatchDescriptor,
    largest_first,
    Limits,
)
from mace_ros.model.capturing import CaptureFailed
from mace_ros.model.cuda_graph_runner import CapturedPass, PassOutputs
from mace_ros.model.graph_capture import capture, CaptureReport
from mace_ros.model.graphed_layers import GraphedLayers
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import BASE_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.sampling import Row, sample, Sampling
from mace_ros.model.spans import PiggybackSpans, Span

pytestmark = pytest.mark.usefixtures('one_thread')


@given(rows=st.integers(0, 16), position=st.integers(0, 1999), chunks=st.lists(
    st.tuples(st.integers(2, 256), st.integers(0, 1000)), max_size=3), piggyback=st.booleans())
@settings(derandomize=True)
def test_every_pass_within_the_limits_fits_one_of_the_batch_descriptors(
        rows: int, position: int, chunks: list[tuple[int, int]], piggyback: bool) -> None:
    spans = [Span((0,), position, range(200), 0, True)] * rows + [
        Span((0,) * n, first, range(200), 0, True) for n, first in chunks]
    tokens = sum(n for n, _ in chunks)
    if tokens > 256 or not (spans or piggyback):
        return
    finetune = PiggybackSpans([Span((0,) * 8, 0, [0], 0, False)], []) if piggyback else None
    limits = Limits.of(max_context=2000, cache_tokens=2496)
    padded = BatchDescriptor.of(spans, finetune, limits)

    prepared = set(batch_descriptors(
        max_rows=16, max_tokens=264, max_context=2000, limits=limits))

    assert padded in prepared or padded.keys > 2496 + BLOCK_TOKENS
    assert max(d.blocks for d in prepared) == 125
    assert padded.decode >= rows and padded.decode * padded.blocks * BLOCK_TOKENS >= rows * position
    assert padded.block >= tokens and padded.keys >= sum(n + first for n, first in chunks)


CAPTURES = {
    'passes': (CapturedPass, 'capture'), 'their inputs': (CapturedPass, '__init__'),
    'their outputs': (PassOutputs, '__init__'),
    'fine-tune steps': (GraphedLayers, 'capture'), 'their layers': (GraphedLayers, '__init__'),
    'steps that keep graphs': (GraphedLayers, 'capture_kept')}
PASSES, STEPS = 6, [64, 128]    # what is captured of the model below


def captured(model: PackedModel, monkeypatch: pytest.MonkeyPatch,
             *patches: tuple[object, str, object], time_left: float = 1.0,
             free_bytes: float | Callable[[], float] = 1.0, **options: Any) -> CaptureReport:
    """Capture on a CPU."""
    with monkeypatch.context() as patch:
        use_fake_graphs(patch)
        for where in patches:
            patch.setattr(*where)
        return capture(model, **{'max_rows': 2} | options, max_tokens=16, max_context=64,
                       time_left=lambda: time_left,
                       free_bytes=free_bytes if callable(free_bytes) else lambda: free_bytes)


def assert_serves(model: PackedModel, lora: LoRAManager, reference: PreTrainedModel) -> None:
    rng = random.Random(0)
    request = Request(random_ids(rng, 41), BASE_SLOT, 6)
    step = FinetuneStep(model, Trainer(lora, 1e-2), [random_sample(rng, 37)])
    serve(model, [request], rng, chunks=(1, 3, 19), step=step)
    assert step.done
    assert_response_of(reference, request)


@pytest.mark.parametrize('where', CAPTURES)
def test_shapes_that_can_not_be_captured_run_eagerly(
        where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora, reference = with_reference(tiny_model('llama'))

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError('injected')

    report = captured(model, monkeypatch, (*CAPTURES[where], fails))

    steps = where in ('fine-tune steps', 'their layers')
    passes = where in ('passes', 'their inputs', 'their outputs')
    assert (report.steps == []) == steps == (not model.graphed_layers)
    assert (report.passes == 0) == passes == (not model.fast_passes)
    assert 'injected' in report.failures[0]
    assert 'run eagerly' in str(report) and 'injected' in str(report)
    assert_serves(model, lora, reference)


@pytest.mark.parametrize('error', [torch.OutOfMemoryError, CaptureFailed])
def test_a_capture_that_fails_at_any_shape_leaves_a_model_that_serves(
        error: type[RuntimeError], monkeypatch: pytest.MonkeyPatch) -> None:
    """After lack of memory other shapes are captured, after a failed capture none."""
    model, lora, reference = with_reference(tiny_model('llama'))
    captures = PASSES + 2 * len(STEPS)      # each step twice: recomputed, and with graphs kept
    for failing in range(captures):
        done: list[object] = []

        def fails(*_: object, failing: int = failing, done: list[object] = done) -> None:
            done.append(None)
            if len(done) == failing + 1:
                raise error('injected')

        model.fast_passes, model.graphed_layers = None, []
        report = captured(
            model, monkeypatch, (graph_check, 'SAMPLES', 1), (CapturedPass, 'capture', fails),
            *((GraphedLayers, name, fails) for name in ('capture', 'capture_kept')))

        # After a failed capture nothing else is captured; without memory, only shorter steps are.
        assert len(done) == failing + 1 if error is CaptureFailed else len(done) >= failing + 1
        steps_left = STEPS[:max(failing - PASSES, 0)]
        assert len(report.failures) == 1 and str(report).count('injected') == 1
        if failing >= PASSES:
            assert (report.passes, report.steps) == (PASSES, steps_left)
        elif error is CaptureFailed:
            assert (report.passes, report.steps) == (failing, [])
        else:
            assert (report.passes, report.steps) == (PASSES - 1, STEPS)
        assert_serves(model, lora, reference)
    report = captured(model, monkeypatch)
    assert (report.passes, report.failures) == (PASSES, [])


@pytest.mark.parametrize('error', [RuntimeError, ValueError])
@pytest.mark.parametrize('fits, passes', [
    (lambda d: not d.block, 2), (lambda d: d.tokens <= 16, 4), (lambda d: False, 0)],
    ids=['rows', 'few tokens', 'nothing'])
def test_passes_that_fail_before_their_capture_cost_no_other_kind_and_no_smaller_ones(
        fits: Callable[[BatchDescriptor], bool], passes: int, error: type[Exception],
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as experts that are chosen on the host for many tokens, or Triton's compilers."""
    model, lora, reference = with_reference(tiny_model('llama'))

    def fails(self: CapturedPass, *_: object) -> None:
        if not fits(self.descriptor):
            raise error('injected')

    report = captured(model, monkeypatch, (CapturedPass, 'capture', fails))
    assert (report.passes, report.steps) == (passes, STEPS)
    assert len(report.failures) == PASSES - passes
    assert all('injected' in failure for failure in report.failures)
    assert_serves(model, lora, reference)


def test_passes_as_large_as_one_that_failed_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    tried: list[BatchDescriptor] = []

    def fails(self: CapturedPass, *_: object) -> None:
        tried.append(self.descriptor)
        raise RuntimeError('injected')

    report = captured(model, monkeypatch, (CapturedPass, 'capture', fails), max_rows=16)
    assert [d.decode for d in tried if not d.block] == [16, 1]      # not 2, 4 and 8
    assert len(report.failures) > len(tried)


def test_a_pass_that_lacks_memory_is_freed_before_the_next_one_is_tried(
        monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    held: list[weakref.ref[torch.Tensor]] = []

    def fails(*_: object) -> None:
        assert all(tensor() is None for tensor in held)
        values = torch.zeros(1)
        held.append(weakref.ref(values))
        raise torch.OutOfMemoryError('injected')

    report = captured(model, monkeypatch, (CapturedPass, 'capture', fails))
    assert (report.passes, report.failures) == (0, ['injected'] * 3)


def test_steps_that_recompute_are_captured_without_memory_for_what_layers_keep(
        monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora, reference = with_reference(tiny_model('llama'))

    def fails(*_: object) -> None:
        raise AssertionError

    report = captured(model, monkeypatch, (GraphedLayers, 'capture_kept', fails),
                      keeps_graphs=False)
    assert (report.steps, report.failures) == (STEPS, [])
    assert_serves(model, lora, reference)


@pytest.mark.parametrize('kept', [False, True])
def test_layers_with_other_gradients_under_graphs_are_not_used(
        kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora, reference = with_reference(tiny_model('llama'))

    def recomputed(compute: Callable[[], Any], *places: Any) -> Any:
        replay, result = fake_graph(compute, *places)

        def wrong() -> None:
            replay()
            result[-1].mul_(1.01)

        return wrong, result

    def with_forward(callables: Any, *_: object, **__: object) -> Any:
        return [lambda x, *w, layer=layer: layer(x, *w) * 1.01 for layer in callables]

    report = captured(model, monkeypatch, (torch.cuda, 'make_graphed_callables', with_forward)
                      if kept else (graphed_layers, 'captured', recomputed))
    assert report.steps == (STEPS if kept else [])
    [failure] = report.failures
    assert 'off by 0.01' in failure and ('keep graphs' in failure) == kept
    assert_serves(model, lora, reference)


def test_layers_whose_gradients_a_later_replay_overwrites_are_not_used(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """As if layers were captured in another order than a step replays them."""
    model, lora, reference = with_reference(tiny_model('llama'))
    results: list[Results] = []

    def recomputed(compute: Callable[[], Results], *places: Any) -> Any:
        replay, result = fake_graph(compute, *places)
        earlier = list(results)
        results.append(result)
        return lambda: (overwrite(earlier), replay()), result

    report = captured(model, monkeypatch, (graphed_layers, 'captured', recomputed))
    assert report.steps == []
    assert 'off by inf' in report.failures[0]
    assert_serves(model, lora, reference)


@pytest.mark.parametrize('raises', [False, True])
def test_graphs_that_compute_something_else_are_not_used(
        raises: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora, reference = with_reference(tiny_model('llama'))
    run = CapturedPass.run

    def wrong(*args: Any) -> torch.Tensor:
        if raises:
            raise RuntimeError('injected')
        return run(*args) * 1.01

    with monkeypatch.context() as patch:
        patch.setattr(CapturedPass, 'run', wrong)
        report = captured(model, monkeypatch)
    assert (report.passes, report.steps, model.fast_passes) == (0, STEPS, None)
    assert ('injected' if raises else 'off by 0.01') in str(report)
    assert_serves(model, lora, reference)


def without_adapters(run: Any, graph: CapturedPass, spans: Any, piggyback: Any) -> torch.Tensor:
    logits: torch.Tensor = run(graph, [replace(s, slot=BASE_SLOT) for s in spans], piggyback)
    return logits


def without_inputs(run: Any, graph: CapturedPass, spans: Any, piggyback: Any) -> torch.Tensor:
    logits: torch.Tensor = run(graph, spans, piggyback)
    if piggyback is not None:
        piggyback.hidden[1].zero_()
    return logits


def wrong_beside_chunks(run: Any, graph: CapturedPass, *args: Any) -> torch.Tensor:
    logits: torch.Tensor = run(graph, *args)
    return logits * 1.01 if graph.descriptor.decode and graph.descriptor.block else logits


def wrong_in_a_row(run: Any, graph: CapturedPass, *args: Any) -> torch.Tensor:
    """Return logits whose error is too small to be seen among those of all rows."""
    logits: torch.Tensor = run(graph, *args).clone()
    if len(logits) > 3:
        logits[-1] *= 1.0015
    return logits


@pytest.mark.parametrize('wrong', [
    without_adapters, without_inputs, wrong_beside_chunks, wrong_in_a_row])
def test_graphs_that_are_wrong_in_a_part_are_not_used(
        wrong: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    slots = [x.clone() for linear in model.linears for x in (linear.slots_a, linear.slots_b)]
    run = CapturedPass.run
    report = captured(model, monkeypatch, (
        CapturedPass, 'run', lambda *args: wrong(run, *args)))
    assert (report.passes, model.fast_passes) == (0, None)
    assert 'under a graph is off by' in report.failures[0]
    for linear in model.linears:        # the check has restored the adapters
        for x in (linear.slots_a, linear.slots_b):
            assert torch.equal(x, slots.pop(0))


@pytest.mark.parametrize('family, used', [('llama', False), ('qwen3-moe', True)])
def test_only_tokens_that_choose_experts_may_differ_in_some_samples(
        family: str, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = with_reference(tiny_model(family))
    run, runs = CapturedPass.run, Counter[BatchDescriptor]()

    def wrong_at_first(graph: CapturedPass, *args: Any) -> torch.Tensor:
        runs[graph.descriptor] += 1
        return run(graph, *args) * (1.01 if runs[graph.descriptor] == 1 else 1.0)

    report = captured(model, monkeypatch, (CapturedPass, 'run', wrong_at_first))
    assert report.passes == (PASSES if used else 0)


def test_graphs_that_can_not_be_compared_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    report = captured(model, monkeypatch, *(
        (graph_check, name, lambda *_: ()) for name in ('checked_passes', 'passes_of_shapes')))
    assert (report.passes, report.steps, model.fast_passes) == (0, STEPS, None)
    assert report.failures == ['no pass under a graph could be compared']


def test_a_graph_that_finds_other_tokens_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora, reference = with_reference(tiny_model('llama'))
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'argmax', lambda logits, dim, out: out.fill_(logits.argmin()))
        report = captured(model, monkeypatch)
    assert (report.passes, model.fast_passes) == (0, None)
    assert 'the best tokens are not' in str(report)
    assert_serves(model, lora, reference)


def test_a_graph_finds_the_best_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """And greedy sampling returns them without another kernel."""
    model, _, _ = with_reference(tiny_model('llama'))
    captured(model, monkeypatch)
    one, two = Span((5,), 40, [0, 1, 2], BASE_SLOT, True), Span((6,), 3, [4], BASE_SLOT, True)
    short, long = (Span((5,) * n, 0, range(4), BASE_SLOT, True) for n in (9, 60))
    for spans, in_graph in (([one, two], True), ([short], True), ([long], False)):
        logits, best = model.run(spans), model.best_tokens
        assert (best is not None) == in_graph
        if best is not None:
            assert torch.equal(best, logits.argmax(-1))
        greedy, drawn = Row(Sampling()), Row(Sampling(temperature=1.0))
        assert sample(logits, [greedy] * len(logits), best).tokens is best or not in_graph
        assert sample(logits, [drawn] * len(logits), best).tokens is not best


@pytest.mark.parametrize('left, reason', [
    ({'time_left': 0.0}, 'the time for capturing was over'),
    ({'room': 0.0}, 'the memory budget has no room for them'),
    ({'free_bytes': 0.1}, 'only 0 MB of memory were free')])
def test_the_report_says_why_capturing_ended(
        left: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    report = captured(model, monkeypatch, **left)
    assert (report.passes, report.steps) == (1, [])
    assert reason in str(report)


def test_passes_leave_time_for_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    report = captured(model, monkeypatch, time_left=0.3)
    assert (report.passes, report.steps) == (1, STEPS)
    assert 'the time for capturing was over' in str(report)


class Memory:
    """What PyTorch reserves: 100 bytes for each capture, and what it keeps cached."""

    def __init__(self) -> None:
        self.captures: weakref.WeakSet[Any] = weakref.WeakSet()
        self.cached = 0

    def patches(self) -> list[tuple[object, str, object]]:
        """Return what replaces PyTorch's and ours."""
        def capture(captured: object, *_: object) -> None:
            self.captures.add(captured)
            self.cached += 1000

        return [(CapturedPass, 'capture', capture), (GraphedLayers, 'capture', capture),
                (torch.cuda, 'empty_cache', lambda: setattr(self, 'cached', 0)),
                (torch.cuda, 'memory_reserved', lambda: 100 * len(self.captures) + self.cached)]


@pytest.mark.parametrize('room, passes, steps', [
    (1000, PASSES, STEPS), (850, PASSES, STEPS[:1]), (750, PASSES, []), (650, PASSES, []),
    (250, 2, []), (50, 0, [])])
def test_graphs_take_no_more_memory_than_the_budget_has_room_for(
        room: float, passes: int, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free but cached does not count. Those that fit stay."""
    model, lora, reference = with_reference(tiny_model('llama'))
    report = captured(model, monkeypatch, *Memory().patches(), room=room)
    assert (report.passes, report.steps) == (passes, steps)
    assert report.nbytes == 100 * (passes + len(steps)) <= room
    assert ('no room' in str(report)) == (room < 1000)
    assert_serves(model, lora, reference)


@pytest.mark.parametrize('room, passes, steps', [
    (1350, PASSES, STEPS), (1200, PASSES, STEPS[:1]), (1150, PASSES, []), (850, 5, []),
    (100, 0, [])])
def test_what_the_driver_keeps_of_graphs_counts_too(
        room: float, passes: int, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here half as much as in PyTorch's pools."""
    model, _, _ = with_reference(tiny_model('llama'))
    memory = Memory()
    report = captured(model, monkeypatch, *memory.patches(), room=room, keeps_graphs=False,
                      free_bytes=lambda: 9999 - 150 * len(memory.captures) - memory.cached)
    assert (report.passes, report.steps) == (passes, steps)
    assert report.nbytes == 100 * (passes + len(steps))
    assert report.driver_bytes == 50 * (passes + len(steps))


@pytest.mark.parametrize('free', [math.inf, math.nan])
def test_unknown_free_memory_does_not_count(free: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    report = captured(model, monkeypatch, *Memory().patches(), free_bytes=free)
    assert (report.passes, report.driver_bytes) == (PASSES, 0)


def test_the_largest_shapes_reserve_the_memory() -> None:
    found = list(batch_descriptors(max_rows=16, max_tokens=256, max_context=2000))
    decode, block, *others = largest_first(found)
    assert (decode.decode, decode.blocks, decode.block) == (16, 128, 0)
    assert (block.block, block.saves) == (256, True)
    assert block.keys == max(d.keys for d in found)
    assert sorted(map(repr, (decode, block, *others))) == sorted(map(repr, found))
    assert others[0].decode == 1


def test_no_shape_is_larger_than_a_context_or_the_cache() -> None:
    limits = Limits.of(max_context=16384, cache_tokens=16384)
    found = list(batch_descriptors(16, 256, 16384, limits))
    assert max(d.blocks for d in found) == 1024
    assert max(d.keys for d in found) == 16384 + BLOCK_TOKENS
    # A longer pass has a descriptor that holds it, although none is prepared.
    spans = [Span((0,) * 20, 9000, range(600), 0, True)] * 2
    assert BatchDescriptor.of(spans, None, limits).keys >= 2 * 9020
