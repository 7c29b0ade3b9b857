# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Change logits before a token is sampled: biases, penalties, and masks of constraints, in this order.

Only the logits of tokens that a change names are read and written, for all rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mace_ros.model.upload import to_device


@dataclass(frozen=True)
class LogitChanges:
    """
    Biases and penalties of a request; the defaults change nothing.

    The repetition penalty is that of transformers, on tokens of prompt and output; the other two
    are OpenAI's, on tokens of the output.
    """

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()    # of different token ids

    @cached_property
    def bias_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The token ids of the bias, and what is added to each."""
        return (np.array([token for token, _ in self.bias], dtype=np.int64),
                np.array([value for _, value in self.bias], dtype=np.float32))

    @cached_property
    def is_none(self) -> bool:
        """Whether nothing is changed."""
        return not (self.bias or self.penalises)

    @cached_property
    def penalises(self) -> bool:
        """Whether any penalty is in force."""
        return bool(self.repetition_penalty != 1.0 or self.frequency_penalty
                    or self.presence_penalty)


# A row's changes, its token ids so far, how many of them are the prompt's, and its mask.
RowChanges: TypeAlias = tuple[LogitChanges, Sequence[int], int, bytes | None]


def change_logits(logits: Tensor, rows: Sequence[RowChanges]) -> None:
    """Change ``logits`` (``[rows, vocabulary]``) in place; does not wait for the device."""
    _add_biases(logits, rows)
    _penalise(logits, rows)
    _mask(logits, rows)


def places(chosen: Sequence[int], rows: int, device: torch.device) -> Tensor | slice:
    """Return an index of the chosen rows; a list would make torch wait for the device."""
    return slice(None) if len(chosen) == rows else to_device(np.array(chosen), device)


def _add_biases(logits: Tensor, rows: Sequence[RowChanges]) -> None:
    biased = {i: changes.bias_arrays for i, (changes, *_) in enumerate(rows) if changes.bias}
    if biased:
        at = [tokens + i * logits.shape[-1] for i, (tokens, _) in biased.items()]
        logits.view(-1).index_add_(
            0, to_device(np.concatenate(at), logits.device),
            to_device(np.concatenate([values for _, values in biased.values()]), logits.device))


def _penalise(logits: Tensor, rows: Sequence[RowChanges]) -> None:
    penalised = [i for i, (changes, *_) in enumerate(rows) if changes.penalises]
    if not penalised:
        return
    vocabulary = logits.shape[-1]
    # Each token of a row is one place in the flat logits, with the times it is in the output.
    texts = [np.asarray(rows[i][1], dtype=np.int64) + i * vocabulary for i in penalised]
    output = np.concatenate([np.arange(len(text)) >= rows[i][2]
                             for i, text in zip(penalised, texts, strict=True)])
    tokens, index = np.unique(np.concatenate(texts), return_inverse=True)
    counts = np.bincount(index, weights=output, minlength=len(tokens))
    table = np.array([(c.repetition_penalty, c.frequency_penalty, c.presence_penalty)
                      for c, *_ in rows])[tokens // vocabulary]
    lowered = table[:, 1] * counts + table[:, 2] * (counts > 0)
    at = to_device(tokens, logits.device)
    repetition, lowered = to_device(
        np.stack([table[:, 0], lowered]).astype(np.float32), logits.device)
    flat = logits.view(-1)
    values = flat[at]
    flat[at] = torch.where(values > 0, values / repetition, values * repetition) - lowered


def _mask(logits: Tensor, rows: Sequence[RowChanges]) -> None:
    masks = {i: mask for i, (*_, mask) in enumerate(rows) if mask is not None}
    if not masks:
        return
    words = np.frombuffer(b''.join(masks.values()), dtype=np.uint8).reshape(len(masks), -1)
    packed = to_device(words.copy(), logits.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (packed[..., None] >> shifts & 1).view(len(masks), -1)[:, :logits.shape[-1]]
    chosen = places(list(masks), len(rows), logits.device)
    logits[chosen] = logits[chosen].masked_fill(allowed == 0, -torch.inf)
