# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The comparison at load of the packed pass with the model's own forward.

A family may need more of its attention or its layers than the packed pass gives; better a
refusal by name than answers that are a little wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
from typing import Any, TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mace_ros.model.architectures import UnsupportedModel
from mace_ros.model.attention import whole_sequences
from mace_ros.model.lora import BASE_SLOT
from mace_ros.model.model_shell import run_layer
from mace_ros.model.spans import Span

if TYPE_CHECKING:
    from mace_ros.model.packed_model import PackedModel

# The comparison at load with the model's own forward: a sequence of TOKENS of which
# PREFIX come in an earlier pass, under windows of at most WINDOW.
TOKENS, PREFIX, WINDOW = 12, 5, 4


@contextmanager
def short_windows(model: PreTrainedModel, context: int) -> Iterator[None]:
    """While open, windows shorter than ``context`` are so short that a few tokens cross them."""
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


def check_tokens(model: PreTrainedModel, context: int) -> list[list[int]]:
    """Return samples of random token ids, always the same for a vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shape = (1 if model.dtype == torch.float32 else 3, min(TOKENS, context))
    return torch.randint(
        vocabulary, shape, generator=torch.Generator().manual_seed(0)).tolist()


def own_logits(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    """Return ``[samples, tokens, vocabulary]`` by transformers' own attention code."""
    model.set_attn_implementation('eager')
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=torch.tensor(ids, device=model.device), use_cache=False).logits
    return logits.float()


@contextmanager
def failing_by_name(kind: str) -> Iterator[None]:
    """Turn whatever fails inside, but for memory, into an :class:`UnsupportedModel`."""
    try:
        yield
    except (UnsupportedModel, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModel(
            f'{kind}: the packed pass fails with {type(error).__name__}: {error}') from error


def compare(model: PackedModel, samples: list[list[int]], reference: Tensor) -> None:
    """
    Raise :class:`UnsupportedModel` unless the model's own logits come out of every path.

    ``reference`` is ``[samples, tokens, vocabulary]``. Each path must agree on one
    sample: rounding may lead some token to another expert, but not always. Uses the first two
    KV blocks.
    """
    kind = model.model.config.model_type
    limit = 1e-3 if model.dtype == torch.float32 else 0.1
    best: list[float] = []
    with failing_by_name(kind):
        for ids, logits in zip(samples, reference, strict=True):
            errors = _served_errors(model, ids, logits) + _trained_errors(model, ids, logits)
            best = [*map(min, errors, best)] if best else errors
            if max(best) < limit:
                return
    raise UnsupportedModel(
        f'{kind}: the packed pass does not compute its logits: they are off by '
        f'{max(best):.2g} (relative; up to {limit:.2g} could be rounding)')


def _served_errors(model: PackedModel, ids: list[int], reference: Tensor) -> list[float]:
    """Compare whole and chunked prefill and a decode row of two sequences with ``ids``."""
    last = len(ids) - 1
    prefix = min(PREFIX, last)
    one, two = (0,), (1,)
    first = model.run([Span(ids[:last], 0, one, BASE_SLOT, True),
                      Span(ids[:prefix], 0, two, BASE_SLOT, True)])
    second = model.run([Span(ids[last:], last, one, BASE_SLOT, True),
                       Span(ids[prefix:], prefix, two, BASE_SLOT, True)])
    rows = model.tensor([last - 1, prefix - 1, last, last])
    return _relative_errors(torch.cat([first, second]), reference[rows])


def _trained_errors(model: PackedModel, ids: list[int], reference: Tensor) -> list[float]:
    """Compare what the layers, called one by one, make of two training sequences."""
    prefix = min(PREFIX, len(ids) - 1)
    row = whole_sequences((prefix, len(ids)), model.device)
    positions = [*range(prefix), *range(len(ids))]
    with torch.no_grad(), model.training(row):
        hidden, calls = model.skeleton.call_layers(
            model.tensor([[*ids[:prefix], *ids]]), model.tensor([positions]))
        exchanged = _sizes(calls)
        for layer, call in zip(model.layers, calls, strict=True):
            hidden = run_layer(layer, hidden, call)
        if _sizes(calls) != exchanged:
            raise UnsupportedModel(
                f'{model.model.config.model_type}: its layers hand each other more than the '
                'hidden states, so that none can be trained by itself')
        logits = model.skeleton.logits(hidden[0, [prefix - 1, prefix + len(ids) - 1]])
    return _relative_errors(logits.float(), reference[[prefix - 1, len(ids) - 1]])


def _sizes(calls: Sequence[dict[str, Any]]) -> list[int]:
    """Return the sizes of the containers among the arguments, which a layer may fill."""
    return [len(v) for call in calls for v in (*call['args'], *call['kwargs'].values())
            if isinstance(v, MutableMapping | MutableSequence)]


def _relative_errors(ours: Tensor, theirs: Tensor) -> list[float]:
    """Compare row by row, leaving out what is the same for the whole vocabulary."""
    ours, theirs = (x - x.mean(-1, keepdim=True) for x in (ours, theirs))
    errors = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-30)
    return errors.nan_to_num(nan=float('inf')).tolist()
