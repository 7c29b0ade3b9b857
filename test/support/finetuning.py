# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Samples to learn, the same loss by PEFT, and ways to do a step's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import copy
import random

from peft import get_peft_model, PeftModel
from peft.utils import set_peft_model_state_dict
from support.families import (
    lora_config,
    relative_error,
    VOCABULARY,
)
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.memory.block_pool import BLOCK_TOKENS, BlockPool
from mace_ros.model.lora import BASE_SLOT, FIRST_SERVED_SLOT, LoRAManager
from mace_ros.model.spans import Span
from mace_ros.scheduling.plan import SegmentKind

TOLERANCE = 1e-4

Drive = Callable[[FinetuneStep], None]   # does a step's forward in some way


def samples(seed: int = 0, lengths: Sequence[int] = (40, 9, 2, 61)) -> list[Sample]:
    """Return samples of several lengths, unweighted at first, then of different weights."""
    rng = random.Random(seed)
    result = []
    for length in lengths:
        prompt = length // 3
        weights = [0.0] * prompt + [rng.choice((0.5, 1.0, 2.0)) for _ in range(length - prompt)]
        result.append(Sample(tuple(rng.randrange(VOCABULARY) for _ in range(length)),
                             tuple(weights)))
    return result


def alike(*, shared: int = 19) -> list[Sample]:
    """Return samples that begin with the same tokens, some of them with no other prompt."""
    begin = tuple(random.Random(7).randrange(VOCABULARY) for _ in range(shared))
    return [Sample((*begin, *s.tokens), (*(0.0 for _ in begin), *s.weights))
            for s in samples(lengths=(30, 9, 2, 41, 2))]


def as_peft(reference: PreTrainedModel, bank: LoRAManager, tensors: dict[str, Tensor],
            ) -> PeftModel:
    """Return PEFT's model with the same adapter, ready to be trained."""
    peft = get_peft_model(copy.deepcopy(reference), lora_config(bank))
    loaded = set_peft_model_state_dict(peft, tensors)
    assert not loaded.unexpected_keys
    return peft


def loss_of(peft: PeftModel, batch: Sequence[Sample]) -> Tensor:
    """Return the weighted mean cross-entropy, one sample at a time."""
    total, normaliser = torch.zeros(()), 0.0
    for sample in batch:
        logits = peft(input_ids=torch.tensor([sample.tokens])).logits[0].float()
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(sample.tokens[1:]), reduction='none')
        weights = torch.tensor(sample.weights[1:])
        total, normaliser = total + (losses * weights).sum(), normaliser + float(weights.sum())
    return total / normaliser


def gradients_of(bank: LoRAManager) -> dict[str, Tensor]:
    """Return the gradients that the master weights hold."""
    return {name: parameter.grad for name, parameter
            in zip(bank.export(), bank.parameters(), strict=True) if parameter.grad is not None}


def run_until_optimizer(step: FinetuneStep) -> None:
    while next(iter(step.segments())).kind is not SegmentKind.OPTIMIZER:
        step.run_segment()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor],
                tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < tolerance, f'{worst}: {errors[worst]:.2g}'


# -- ways to do a step's forward ---------------------------------------------------------


def alone(step: FinetuneStep) -> None:
    """Leave it all to the segments."""


def ride(*sizes: int) -> Drive:
    """Ride alone, in chunks of these sizes by turns."""
    def drive(step: FinetuneStep) -> None:
        pool = BlockPool(step.model.kv_blocks, BLOCK_TOKENS)
        step.hold_blocks([pool.allocate(n) for n in step.kv_tokens])
        turn = 0
        while step.piggyback_tokens:
            rows = step.rows(min(sizes[turn % len(sizes)], step.piggyback_tokens))
            step.model.run((), rows)
            step.piggybacked(rows.tokens)
            turn += 1
        step.take_blocks()
    return drive


def ride_among_requests(step: FinetuneStep) -> None:
    """Ride beside prefill chunks and decode rows of requests under other adapters."""
    rng = random.Random(2)
    pool = BlockPool(step.model.kv_blocks, BLOCK_TOKENS)
    rng.shuffle(pool._empty)
    step.hold_blocks([pool.allocate(n) for n in step.kv_tokens])
    texts = [[rng.randrange(VOCABULARY) for _ in range(60)] for _ in range(3)]
    tables, computed = [pool.allocate(60) for _ in texts], [0, 0, 0]
    while step.piggyback_tokens:
        spans = []
        for i, slot in enumerate((BASE_SLOT, FIRST_SERVED_SLOT, FIRST_SERVED_SLOT + 1)):
            tokens = texts[i][computed[i]:computed[i] + rng.choice((1, 1, 9))]
            if tokens:
                spans.append(Span(tokens, computed[i], tables[i], slot, True))
                computed[i] += len(tokens)
        rng.shuffle(spans)
        rows = step.rows(min(rng.choice((1, 7, 15)), step.piggyback_tokens))
        step.model.run(spans, rows)
        step.piggybacked(rows.tokens)
    step.take_blocks()


DRIVES: dict[str, tuple[Drive, bool]] = {
    'alone, graphs kept': (alone, True),
    'alone, recomputed': (alone, False),
    'ridden by 1': (ride(1), True),
    'ridden by 7': (ride(7), True),
    'ridden by 33': (ride(33), True),
    'ridden whole': (ride(1000), True),
    'ridden by 50, 1, 8': (ride(50, 1, 8), False),
    'ridden among requests': (ride_among_requests, True),
}
