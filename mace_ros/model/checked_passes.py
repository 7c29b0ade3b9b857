# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Passes by which a device is checked: random tokens, keys, values and adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
import itertools
from operator import attrgetter
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mace_ros.model.batch_descriptor import BatchDescriptor, Limits
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT, TRAINING_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import BLOCK_TOKENS, PiggybackSpans, Span

TOKENS = 24         # of a chunk
SHARED_BLOCKS = 4   # KV blocks of which long contexts consist, again and again
ADAPTER_STD = 0.05  # of random adapters: the update is a part of the output that no rounding hides

# Computes a pass as PackedModel.run() does, or returns None for one that it does not cover.
Compute: TypeAlias = Callable[[Sequence[Span], PiggybackSpans | None], Tensor | None]


class CheckedPass(NamedTuple):
    """A pass that is computed in two ways."""

    name: str
    spans: list[Span]
    piggyback: PiggybackSpans | None = None

    def results(self, compute: Compute) -> list[Tensor] | None:
        """
        Return the logits, and the layer inputs of fine-tune tokens; copies in fp32 on the CPU.

        Returns None if ``compute`` does not cover the pass.
        """
        hidden: list[Tensor] = [] if self.piggyback is None else list(self.piggyback.hidden)
        for buffer in hidden:
            buffer.zero_()
        logits = compute(self.spans, self.piggyback)
        if logits is None:
            return None
        return [x.to('cpu', torch.float32, copy=True) for x in (logits, *hidden)]


def checked_passes(model: PackedModel, seed: int = 0) -> Iterator[CheckedPass]:
    """
    Yield passes of each kind, in this order, of two sequences; none if memory is short.

    Each reads the keys and values that those before it have written to the first KV blocks.
    """
    count = min(TOKENS, (model.context_length - 2) // 2)
    each = 2 * count // BLOCK_TOKENS + 1
    if count < 2 or model.kv_blocks < 2 * each:
        return
    one, two = range(each), range(each, 2 * each)
    fill_blocks(model, range(2 * each), torch.Generator(model.device).manual_seed(seed))
    ids = random_ids(model, 2 * count + 2, seed)
    yield CheckedPass('prefill', [Span(ids[:count], 0, one, FIRST_SERVED_SLOT, True)])
    yield CheckedPass('chunks', [
        Span(ids[count:2 * count], count, one, FIRST_SERVED_SLOT, True),
        Span(ids[:count], 0, two, BASE_SLOT, True)])
    yield CheckedPass('decode', [
        Span(ids[-2:-1], 2 * count, one, FIRST_SERVED_SLOT, True),
        Span(ids[count:count + 1], count, two, BASE_SLOT, True)])
    yield CheckedPass('decode beside a chunk', [
        Span(ids[-1:], 2 * count + 1, one, FIRST_SERVED_SLOT, True),
        Span(ids[count + 1:2 * count], count + 1, two, BASE_SLOT, True)])


def passes_of_shapes(model: PackedModel, shapes: Iterable[BatchDescriptor], limits: Limits,
                     seed: int) -> Iterator[CheckedPass]:
    """Yield passes of the smallest and of the largest of ``shapes`` of each kind."""
    kinds: dict[tuple[bool, ...], list[BatchDescriptor]] = {}
    for shape in shapes:
        kinds.setdefault(shape.kind, []).append(shape)
    for same in kinds.values():
        same.sort(key=attrgetter('size'))
        for shape in dict.fromkeys((same[0], same[-1])):
            # Padded where that needs the same shape.
            for spare in (1, 0):
                found = pass_of(model, shape, spare, seed)
                if found is not None and BatchDescriptor.of(
                        found.spans, found.piggyback, limits) == shape:
                    yield found
                    break


def pass_of(model: PackedModel, shape: BatchDescriptor, spare: int,
            seed: int) -> CheckedPass | None:
    """
    Return a pass that fills a shape up to ``spare`` rows and ``spare`` tokens of its block.

    The block is half a chunk after a context, and half a new sequence, of fine-tune tokens if the
    shape saves their layer inputs. Returns None if there are too few KV blocks.
    """
    rows, tokens = max(shape.decode - spare, 0), max(shape.block - spare, 0)
    chunk, new = tokens - tokens // 2, tokens // 2
    context = max(min(shape.keys - spare - tokens, model.context_length - chunk), 0)
    ids = iter(random_ids(model, rows + tokens, seed))
    free = itertools.count()
    shared = [next(free) for _ in range(SHARED_BLOCKS)]

    def span(position: int, length: int, slot: int, *, wants_logits: bool = True) -> Span:
        """Return a span after a context in shared blocks; the blocks that it writes are its own."""
        first, last = position // BLOCK_TOKENS, (position + length - 1) // BLOCK_TOKENS
        blocks = [shared[i % SHARED_BLOCKS] for i in range(first)]
        return Span([next(ids) for _ in range(length)], position,
                    blocks + [next(free) for _ in range(first, last + 1)], slot, wants_logits)

    longest = min(shape.blocks * BLOCK_TOKENS, model.context_length)
    spans = [span(max(longest // (row + 1), 1) - 1, 1, (FIRST_SERVED_SLOT, BASE_SLOT)[row % 2])
             for row in range(rows)]
    learned = new if shape.saves else 0
    piggyback: PiggybackSpans | None = None
    if tokens:
        spans.append(span(context, chunk, FIRST_SERVED_SLOT))
        if shape.saves:
            width = model.model.config.get_text_config().hidden_size
            hidden = torch.zeros(len(model.layers) + 1, new, width, dtype=model.dtype,
                                 device=model.device)
            piggyback = PiggybackSpans(
                [span(0, new, TRAINING_SLOT, wants_logits=False)], list(hidden))
        else:
            spans.append(span(0, new, BASE_SLOT))
    used = next(free)
    if used > model.kv_blocks:
        return None
    fill_blocks(model, range(used), torch.Generator(model.device).manual_seed(seed))
    return CheckedPass(
        f'{rows} rows of {shape.blocks} blocks and {tokens} tokens with {shape.keys} keys, '
        f'{learned} of a fine-tune step', spans, piggyback)


def fill_blocks(model: PackedModel, blocks: Sequence[int], generator: torch.Generator) -> None:
    """Write random keys and values to KV blocks; ``generator`` is of the model's device."""
    slots = model.cache_slots(blocks, len(blocks) * BLOCK_TOKENS)
    for cache in (*model.kv_cache.keys, *model.kv_cache.values):
        cache.index_copy_(0, slots, torch.randn(
            len(slots), *cache.shape[1:], generator=generator, device=model.device,
            dtype=cache.dtype))


def random_ids(model: PackedModel, count: int, seed: int) -> list[int]:
    """Return random token ids, the same ones on every device."""
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    ids: list[int] = torch.randint(
        vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


@contextmanager
def random_adapter(model: PackedModel, slot: int) -> Iterator[None]:
    """While open, a slot holds random values: in a fresh one, updates and gradients are 0."""
    generator = torch.Generator(model.device).manual_seed(slot)
    before: list[tuple[Tensor, Tensor]] = []
    for linear in model.linears:
        rows = slice(slot * linear.width, (slot + 1) * linear.width)
        # On a CPU, some products read copies in fp32.
        for x, exact in zip(linear.slot(slot), (linear.exact_a, linear.exact_b), strict=True):
            before.append((x, x.clone()))
            x.normal_(std=ADAPTER_STD, generator=generator)
            if exact.numel():
                before.append((exact[rows], exact[rows].clone()))
                exact[rows] = x
    try:
        yield
    finally:
        for x, values in reversed(before):
            x.copy_(values)
