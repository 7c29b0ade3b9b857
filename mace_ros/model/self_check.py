# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The check at load that packed passes compute what the model's own forward computes.

A model family may need more of its attention or its layers than packed passes provide. Refusing
it by name is better than serving responses that are slightly wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mace_ros.model.architectures import UnsupportedModel
from mace_ros.model.attention import whole_sequences
from mace_ros.model.lora_mapping import BASE_SLOT
from mace_ros.model.model_shell import run_layer
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import Span

# Samples have TOKENS tokens, of which PREFIX are computed in an earlier pass. Attention windows
# are shortened to at most WINDOW, so that the samples cross them.
TOKENS, PREFIX, WINDOW = 12, 5, 4
KV_BLOCKS = 2       # used by the check: one for each of two sequences


@contextmanager
def short_windows(model: PreTrainedModel, context: int) -> Iterator[None]:
    """While open, shorten the attention windows that are shorter than ``context``."""
    windows = [(holder, holder.sliding_window)
               for holder in (model.config.get_text_config(), *model.modules())
               if isinstance(getattr(holder, 'sliding_window', None), int)]
    for holder, window in windows:
        if window < context:
            holder.sliding_window = min(window, WINDOW)
    try:
        yield
    finally:
        for holder, window in windows:
            holder.sliding_window = window


def random_samples(model: PreTrainedModel, context: int) -> list[list[int]]:
    """Return samples of random token ids, the same ones for each vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shape = (1 if model.dtype == torch.float32 else 3, min(TOKENS, context))
    return torch.randint(
        vocabulary, shape, generator=torch.Generator().manual_seed(0)).tolist()


def reference_logits(model: PreTrainedModel, samples: list[list[int]]) -> Tensor:
    """Return ``[samples, tokens, vocabulary]`` from transformers' own attention code."""
    model.set_attn_implementation('eager')
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=torch.tensor(samples, device=model.device), use_cache=False).logits
    return logits.float()


@contextmanager
def failing_by_name(kind: str) -> Iterator[None]:
    """Turn every exception but lack of memory into an :class:`UnsupportedModel`."""
    try:
        yield
    except (UnsupportedModel, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModel(
            f'{kind}: packed passes fail with {type(error).__name__}: {error}') from error


def compare(model: PackedModel, samples: list[list[int]], reference: Tensor) -> None:
    """
    Check that every path computes the logits ``reference``, ``[samples, tokens, vocabulary]``.

    Each path must agree on one sample: rounding may route a token to another expert, but not
    in every sample. Raises :class:`UnsupportedModel`. Uses the first :data:`KV_BLOCKS` blocks.
    """
    kind = model.model.config.model_type
    limit = 1e-3 if model.dtype == torch.float32 else 0.1
    best: list[float] = []
    with failing_by_name(kind):
        for ids, logits in zip(samples, reference, strict=True):
            errors = _serving_errors(model, ids, logits) + _training_errors(model, ids, logits)
            best = [*map(min, errors, best)] if best else errors
            if max(best) < limit:
                return
    raise UnsupportedModel(
        f'{kind}: packed passes do not compute its logits: they are off by '
        f'{max(best):.2g} (relative; rounding explains at most {limit:.2g})')


def _serving_errors(model: PackedModel, ids: list[int], reference: Tensor) -> list[float]:
    """Return the errors of whole and chunked prefill, and of a decode row after them."""
    last = len(ids) - 1
    prefix = min(PREFIX, last)
    one, two = (0,), (1,)
    first = model.run([Span(ids[:last], 0, one, BASE_SLOT, True),
                      Span(ids[:prefix], 0, two, BASE_SLOT, True)])
    second = model.run([Span(ids[last:], last, one, BASE_SLOT, True),
                       Span(ids[prefix:], prefix, two, BASE_SLOT, True)])
    rows = model.tensor([last - 1, prefix - 1, last, last])
    return row_errors(torch.cat([first, second]), reference[rows])


def _training_errors(model: PackedModel, ids: list[int], reference: Tensor) -> list[float]:
    """Return the errors of two training sequences whose layers are called one by one."""
    prefix = min(PREFIX, len(ids) - 1)
    metadata = whole_sequences((prefix, len(ids)), model.device)
    positions = [*range(prefix), *range(len(ids))]
    with torch.no_grad(), model.training(metadata):
        hidden, calls = model.shell.call_layers(
            model.tensor([[*ids[:prefix], *ids]]), model.tensor([positions]))
        before = _container_sizes(calls)
        for layer, call in zip(model.layers, calls, strict=True):
            hidden = run_layer(layer, hidden, call)
        if _container_sizes(calls) != before:
            raise UnsupportedModel(
                f'{model.model.config.model_type}: its layers pass each other more than the '
                'hidden states, so that they cannot be trained one by one')
        logits = model.shell.logits(hidden[0, [prefix - 1, prefix + len(ids) - 1]])
    return row_errors(logits.float(), reference[[prefix - 1, len(ids) - 1]])


def _container_sizes(calls: Sequence[dict[str, Any]]) -> list[int]:
    """Return the sizes of mutable containers among the arguments; a layer may fill them."""
    return [len(v) for call in calls for v in (*call['args'], *call['kwargs'].values())
            if isinstance(v, MutableMapping | MutableSequence)]


def row_errors(ours: Tensor, theirs: Tensor) -> list[float]:
    """Return the relative error of each row, without a constant offset of all logits."""
    ours, theirs = (x - x.mean(-1, keepdim=True) for x in (ours, theirs))
    errors = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-30)
    return errors.nan_to_num(nan=float('inf')).tolist()
