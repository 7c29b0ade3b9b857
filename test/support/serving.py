# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Requests to a packed model in random passes, and the reference for their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
import random

from support.families import random_ids, relative_error
from support.finetuning import scattered_tables
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import Span

TOLERANCE = 1e-4
TIE = 1e-4   # logits closer than this may swap places


@dataclass
class Request:
    """A prompt with greedy decoding; ``logits`` holds those of each response token."""

    prompt: list[int]
    slot: int
    max_tokens: int
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    response: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.response) == self.max_tokens

    def span(self, tokens: int) -> Span:
        known = (self.prompt + self.response)[self.computed:self.computed + tokens]
        last = self.computed + len(known) == len(self.prompt) + len(self.response)
        return Span(known, self.computed, self.blocks, self.slot, last)


def serve(model: PackedModel, requests: Sequence[Request], rng: random.Random, *,
          chunks: Sequence[int], step: FinetuneStep | None = None) -> None:
    """
    Serve all requests in random passes beside a fine-tune step.

    Each pass takes some of the requests in any order, chunks of any of the given sizes, and
    some fine-tune tokens while any are left. Segments of the step run between the passes.
    """
    lengths = [len(r.prompt) + r.max_tokens for r in requests]
    tables = scattered_tables(rng, model, [*lengths, *(step.kv_tokens if step else ())])
    for request in requests:
        request.blocks = tables.pop(0)
    if step is not None:
        step.hold_blocks(tables)
    while not all(r.done for r in requests):
        batch = [r for r in requests if not r.done]
        rng.shuffle(batch)
        batch = batch[:rng.randint(1, len(batch))]
        spans = [r.span(1 if r.response else rng.choice(chunks)) for r in batch]
        finetune = None
        if step is not None and step.piggyback_tokens:
            finetune = step.piggyback_spans(min(rng.choice(chunks), step.piggyback_tokens))
        logits = iter(model.run(spans, finetune))
        if step is not None and finetune is not None:
            step.piggybacked(finetune.tokens)
        for request, span in zip(batch, spans, strict=True):
            request.computed += len(span.tokens)
            if span.wants_logits:
                request.logits.append(next(logits).clone())
                request.response.append(int(request.logits[-1].argmax()))
        assert next(logits, None) is None
        if step is not None:
            for _ in list(step.segments())[:rng.randint(0, 3)]:
                step.run_segment()
    if step is not None:
        while step.piggyback_tokens and step.holds_blocks:
            finetune = step.piggyback_spans(min(rng.choice(chunks), step.piggyback_tokens))
            model.run((), finetune)
            step.piggybacked(finetune.tokens)
        while not step.done:
            step.run_segment()


def assert_response_of(model: PreTrainedModel, request: Request) -> None:
    """Compare all logits with ``generate``, and all tokens up to a tie of the best two."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([request.prompt]), do_sample=False, max_new_tokens=request.max_tokens,
            output_logits=True, return_dict_in_generate=True)
    expected = output.sequences[0, len(request.prompt):].tolist()
    for i, (ours, theirs) in enumerate(zip(request.logits, output.logits, strict=False)):
        assert relative_error(ours, theirs[0]) < TOLERANCE
        if request.response[i] != expected[i]:
            best, second = theirs[0].topk(2).values
            assert best - second < TIE
            return   # after a tie the texts may differ
    assert request.response[:len(expected)] == expected


def random_sample(rng: random.Random, count: int) -> Sample:
    prompt = count // 2
    return Sample(tuple(random_ids(rng, count)), (0.0,) * prompt + (1.0,) * (count - prompt))
