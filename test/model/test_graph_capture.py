# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Shapes of device graphs: each pass fits one, or runs eagerly where none could be captured."""

from __future__ import annotations

from collections.abc import Callable
import random
from typing import Any

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
from mace_ros.model import graphed_layers
from mace_ros.model.batch_descriptor import batch_descriptors, BatchDescriptor, largest_first
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
    padded = BatchDescriptor.of(spans, finetune)

    prepared = set(batch_descriptors(max_rows=16, max_tokens=264, max_context=2000))

    assert padded in prepared or padded.keys > 8192
    assert padded.decode >= rows and padded.decode * padded.blocks * BLOCK_TOKENS >= rows * position
    assert padded.block >= tokens and padded.keys >= sum(n + first for n, first in chunks)


CAPTURES = {
    'passes': (CapturedPass, 'capture'), 'their inputs': (CapturedPass, '__init__'),
    'their outputs': (PassOutputs, '__init__'),
    'fine-tune steps': (GraphedLayers, 'capture'), 'their layers': (GraphedLayers, '__init__'),
    'steps that keep graphs': (GraphedLayers, 'capture_kept')}
PASSES, STEPS = 6, [64, 128]    # what is captured of the model below


def captured(model: PackedModel, monkeypatch: pytest.MonkeyPatch,
             *patches: tuple[object, str, Callable[..., object]], time_left: bool = True,
             free_bytes: float = 1.0, keeps_graphs: bool = True) -> CaptureReport:
    """Capture on a CPU."""
    with monkeypatch.context() as patch:
        use_fake_graphs(patch)
        for where in patches:
            patch.setattr(*where)
        return capture(model, max_rows=2, max_tokens=16, max_context=64,
                       keeps_graphs=keeps_graphs, may_continue=lambda: time_left,
                       free_bytes=lambda: free_bytes)


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
    assert (report.passes == 0) == passes == (not model.graphs)
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

        model.graphs, model.graphed_layers = None, []
        report = captured(model, monkeypatch, (CapturedPass, 'capture', fails), *(
            (GraphedLayers, name, fails) for name in ('capture', 'capture_kept')))

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
    assert (report.passes, report.steps, model.graphs) == (0, STEPS, None)
    assert ('injected' if raises else 'off by 0.01') in str(report)
    assert_serves(model, lora, reference)


def test_a_graph_that_finds_other_tokens_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora, reference = with_reference(tiny_model('llama'))
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'argmax', lambda logits, dim, out: out.fill_(logits.argmin()))
        report = captured(model, monkeypatch)
    assert (report.passes, model.graphs) == (0, None)
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
    ({'time_left': False}, 'the time for capturing was over'),
    ({'free_bytes': 0.1}, 'only 0 MB of memory were free')])
def test_the_report_says_why_capturing_ended(
        left: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = with_reference(tiny_model('llama'))
    report = captured(model, monkeypatch, **left)
    assert (report.passes, report.steps) == (1, [])
    assert reason in str(report)


def test_the_largest_shapes_reserve_the_memory() -> None:
    found = list(batch_descriptors(max_rows=16, max_tokens=256, max_context=2000))
    decode, block, *others = largest_first(found)
    assert (decode.decode, decode.blocks, decode.block) == (16, 128, 0)
    assert (block.block, block.saves) == (256, True)
    assert block.keys == max(d.keys for d in found)
    assert sorted(map(repr, (decode, block, *others))) == sorted(map(repr, found))
    assert others[0].decode == 1
