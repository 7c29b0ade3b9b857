# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Samples, PEFT's loss over them, and ways to run a step's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import copy
import random

from peft import get_peft_model, PeftModel
from peft.utils import set_peft_model_state_dict
from support.families import lora_config, relative_error, VOCABULARY
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.prefix_kv import PrefixKV
from mace_ros.model.spans import Span
from mace_ros.scheduling.plan import SegmentKind

TOLERANCE = 1e-4

Drive = Callable[[FinetuneStep], None]   # runs a step's forward in some way


def samples(seed: int = 0, lengths: Sequence[int] = (40, 9, 2, 61)) -> list[Sample]:
    """Return samples of several lengths: prompt tokens, then tokens of different weights."""
    rng = random.Random(seed)
    result = []
    for length in lengths:
        prompt = length // 3
        weights = [0.0] * prompt + [rng.choice((0.5, 1.0, 2.0)) for _ in range(length - prompt)]
        result.append(Sample(tuple(rng.randrange(VOCABULARY) for _ in range(length)),
                             tuple(weights)))
    return result


INVOCATION = (5, 3)     # tokens from which activated LoRA acts


def samples_with_prefixes() -> list[Sample]:
    """Return samples after one of two prefixes or none, which begin with the invocation."""
    rng = random.Random(7)
    long, short = (tuple(rng.randrange(6, VOCABULARY) for _ in range(n)) for n in (19, 7))
    return [Sample((*prefix, *INVOCATION, *s.tokens),
                   (*(0.0 for _ in (*prefix, *INVOCATION)), *s.weights), adapted_from=len(prefix))
            for prefix, s in zip((long, short, long, (), long),
                                 samples(lengths=(30, 9, 2, 41, 2)), strict=True)]


def prefixes_of(model: PackedModel, batch: Sequence[Sample]) -> dict[tuple[int, ...], PrefixKV]:
    """Compute the prefixes of samples under the base model, in the first KV blocks."""
    result = {}
    for ids in {s.prefix for s in batch if s.prefix}:
        blocks = range(-(-len(ids) // BLOCK_TOKENS))
        model.run([Span(ids, 0, blocks, BASE_SLOT, True)])
        result[ids] = model.kv_cache.read(model.cache_slots(blocks, len(ids)))
    return result


def as_peft(reference: PreTrainedModel, lora: LoRAManager, tensors: dict[str, Tensor],
            ) -> PeftModel:
    """Return PEFT's model with the same adapter, ready for training."""
    peft = get_peft_model(copy.deepcopy(reference), lora_config(lora))
    loaded = set_peft_model_state_dict(peft, tensors)
    assert not loaded.unexpected_keys
    return peft


def loss_of(peft: PeftModel, batch: Sequence[Sample]) -> Tensor:
    """Return the weighted mean cross-entropy, one sample at a time."""
    total, normaliser = torch.zeros(()), 0.0
    activated = peft.peft_config['default'].alora_invocation_tokens is not None
    for sample in batch:
        logits = (peft(input_ids=torch.tensor([sample.tokens])).logits[0].float()
                  if activated or not sample.prefix else _after_base_prefix(peft, sample))
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(sample.tokens[1:]), reduction='none')
        weights = torch.tensor(sample.weights[1:])
        total, normaliser = total + (losses * weights).sum(), normaliser + float(weights.sum())
    return total / normaliser


def _after_base_prefix(peft: PeftModel, sample: Sample) -> Tensor:
    """Return the logits if plain LoRA is off for the prefix, whose logits are left at 0."""
    with torch.no_grad(), peft.disable_adapter():
        past = peft(input_ids=torch.tensor([sample.prefix]), use_cache=True)
    own = peft(input_ids=torch.tensor([sample.tokens[sample.adapted_from:]]),
               past_key_values=past.past_key_values, use_cache=True).logits[0].float()
    return torch.cat([torch.zeros(sample.adapted_from, own.shape[1]), own])


def gradients_of(lora: LoRAManager) -> dict[str, Tensor]:
    """Return the gradients of the master weights."""
    return {name: parameter.grad for name, parameter
            in zip(lora.export(), lora.parameters(), strict=True) if parameter.grad is not None}


def run_until_optimizer(step: FinetuneStep) -> None:
    while next(iter(step.segments())).kind is not SegmentKind.OPTIMIZER:
        step.run_segment()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor],
                tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < tolerance, f'{worst}: {errors[worst]:.2g}'


# -- ways to run a step's forward --------------------------------------------------------


def alone(step: FinetuneStep) -> None:
    """Leave the forward to the segments."""


def scattered_tables(rng: random.Random, model: PackedModel,
                     lengths: Sequence[int]) -> list[list[int]]:
    """Return block tables for sequences of these lengths, with blocks in random order."""
    blocks = list(range(model.kv_blocks))
    rng.shuffle(blocks)
    return [[blocks.pop() for _ in range(-(-n // BLOCK_TOKENS))] for n in lengths]


def piggyback(*sizes: int) -> Drive:
    """Piggyback on passes without requests, in chunks of these sizes in turn."""
    def drive(step: FinetuneStep) -> None:
        step.hold_blocks(scattered_tables(random.Random(3), step.model, step.kv_tokens))
        turn = 0
        while step.piggyback_tokens:
            spans = step.piggyback_spans(min(sizes[turn % len(sizes)], step.piggyback_tokens))
            step.model.run((), spans)
            step.piggybacked(spans.tokens)
            turn += 1
        step.take_blocks()
    return drive


def piggyback_on_requests(step: FinetuneStep) -> None:
    """Piggyback on prefill chunks and decode rows of requests under other adapters."""
    rng = random.Random(2)
    tables = scattered_tables(rng, step.model, [*step.kv_tokens, 60, 60, 60])
    step.hold_blocks(tables[:-3])
    tables = tables[-3:]
    texts = [[rng.randrange(VOCABULARY) for _ in range(60)] for _ in range(3)]
    computed = [0, 0, 0]
    while step.piggyback_tokens:
        spans = []
        for i, slot in enumerate((BASE_SLOT, FIRST_SERVED_SLOT, FIRST_SERVED_SLOT + 1)):
            tokens = texts[i][computed[i]:computed[i] + rng.choice((1, 1, 9))]
            if tokens:
                spans.append(Span(tokens, computed[i], tables[i], slot, True))
                computed[i] += len(tokens)
        rng.shuffle(spans)
        finetune = step.piggyback_spans(min(rng.choice((1, 7, 15)), step.piggyback_tokens))
        step.model.run(spans, finetune)
        step.piggybacked(finetune.tokens)
    step.take_blocks()


DRIVES: dict[str, tuple[Drive, bool]] = {
    'alone, graphs kept': (alone, True),
    'alone, recomputed': (alone, False),
    'piggybacked by 1': (piggyback(1), True),
    'piggybacked by 7': (piggyback(7), True),
    'piggybacked by 33': (piggyback(33), True),
    'piggybacked whole': (piggyback(1000), True),
    'piggybacked by 50, 1, 8': (piggyback(50, 1, 8), False),
    'piggybacked on requests': (piggyback_on_requests, True),
}
