# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Shapes of device graphs: each pass fits one, or runs eagerly where none could be captured."""

from __future__ import annotations

import random

from hypothesis import given, settings, strategies as st
import pytest
from support.families import random_ids, tiny_model, with_reference
from support.serving import assert_response_of, random_sample, Request, serve
import torch

from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model.batch_descriptor import batch_descriptors, BatchDescriptor
from mace_ros.model.cuda_graph_runner import CapturedPass, PassOutputs
from mace_ros.model.graph_capture import capture
from mace_ros.model.graphed_layers import GraphedLayers
from mace_ros.model.lora_mapping import BASE_SLOT
from mace_ros.model.spans import PiggybackSpans, Span

pytestmark = pytest.mark.usefixtures('one_thread')


@given(rows=st.integers(0, 16), position=st.integers(0, 1999), chunks=st.lists(
    st.tuples(st.integers(2, 256), st.integers(0, 1000)), max_size=3), piggyback=st.booleans())
@settings(deadline=None, derandomize=True)
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
    'fine-tune steps': (GraphedLayers, 'capture'), 'their layers': (GraphedLayers, '__init__')}


@pytest.mark.parametrize('where', CAPTURES)
def test_shapes_that_can_not_be_captured_run_eagerly(
        where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where preparing a pass stands for capturing it."""
    rng = random.Random(0)
    model, lora, reference = with_reference(tiny_model('llama'))

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError('injected')

    with monkeypatch.context() as patch:
        for captured in (CapturedPass, GraphedLayers):
            patch.setattr(captured, 'capture', lambda *_: None)
        patch.setattr(*CAPTURES[where], fails)
        patch.setattr(torch.cuda, 'mem_get_info', lambda: (1, 1))
        for name in ('synchronize', 'graph_pool_handle', 'Stream'):
            patch.setattr(torch.cuda, name, lambda: None)
        report = capture(model, max_rows=2, max_tokens=16, max_context=64,
                         may_continue=lambda: True)

    steps = where in ('fine-tune steps', 'their layers')
    assert (report.steps == []) == steps == (not model.graphed_layers)
    assert (report.passes == 0) == (not steps) == (not model.graphs)
    assert 'injected' in report.failures[0]
    assert 'run eagerly' in str(report) and 'injected' in str(report)
    request = Request(random_ids(rng, 41), BASE_SLOT, 6)
    step = FinetuneStep(model, Trainer(lora, 1e-2), [random_sample(rng, 37)])
    serve(model, [request], rng, chunks=(1, 3, 19), step=step)
    assert step.done
    assert_response_of(reference, request)
