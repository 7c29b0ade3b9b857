# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Decode rows on a CPU, in one compiled function for the whole pass.

A model's own code runs some two thousand operations for each token. The weights evict their code
from the caches, so that each takes several times as long as in a loop of its own. Here, a whole
pass of a model of Llama's form is one function (:mod:`mace_ros.model.cpu_kernels`). Other passes
and other forms run the model's own code, but for norms and rotations
(:mod:`mace_ros.model.cpu_layers`). Import this module only where Numba is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn, Tensor

from mace_ros.model import cpu_kernels
from mace_ros.model.cpu_matmul import SMALL_BATCH
from mace_ros.model.cpu_records import ModelRecords, OtherForm
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import BLOCK_TOKENS, is_decode, PiggybackSpans, Span


class CpuDecode:
    """Computes passes of decode rows only, on a CPU, for models of Llama's form."""

    def __init__(self, model: PackedModel) -> None:
        """
        Take the weights, adapter slots and KV cache of ``model``, which must stay where they are.

        Raises :class:`OtherForm` if its layers have another form than Llama's, and ``OtherLayout``
        if the kernels can't read its weights.
        """
        decoder = model.model.get_decoder()
        try:
            embedding, self._rotary, _ = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        except AttributeError:
            raise OtherForm from None
        if type(embedding) is not nn.Embedding:
            raise OtherForm
        self._embeddings = array(embedding.weight)      # [vocabulary, width]
        self._like = embedding.weight.new_empty(0)
        self.best_tokens: Tensor | None = None
        self._threads = torch.get_num_threads()
        self._records = ModelRecords(model, self._threads)
        self._vocabulary = self._records.model['head']['outputs'][0]
        self._executor = ThreadPoolExecutor(max(self._threads - 1, 1), 'decode')

    @classmethod
    def of(cls, model: PackedModel) -> CpuDecode | None:
        """Return the passes of a model; None if it has another form than Llama's."""
        try:
            return cls(model)
        except OtherForm:
            return None

    @torch.no_grad()
    def run(self, spans: Sequence[Span], piggyback: PiggybackSpans | None) -> Tensor | None:
        """Compute a pass as the model does; return None if it is not of a few decode rows."""
        if (piggyback is not None or not 0 < len(spans) <= SMALL_BATCH
                or not all(map(is_decode, spans))):
            return None
        hidden = self._embeddings[[s.tokens[0] for s in spans]]
        cos, sin = self._rotary(self._like, torch.tensor([[s.position for s in spans]]))
        blocks = [s.blocks[:s.cache_position // BLOCK_TOKENS + 1] for s in spans]
        tables = np.zeros((len(spans), max(map(len, blocks))), np.int64)
        for table, own in zip(tables, blocks, strict=True):
            table[:len(own)] = own
        logits = np.empty((len(spans), self._vocabulary), np.float32)
        records = self._records
        buffers = tuple(np.empty((len(spans), width), hidden.dtype) for width in records.widths)
        self._run_in_threads(
            logits, hidden, buffers, array(cos[0]), array(sin[0]), tables,
            np.array([s.cache_position + 1 for s in spans]),
            np.array([s.adapter_slots[0] for s in spans]), records.layers, records.model,
            np.zeros((2, cpu_kernels.stages(len(records.layers))), np.int64))
        wanted = [i for i, s in enumerate(spans) if s.wants_logits]
        if len(wanted) < len(spans):
            logits = logits[wanted]
        self.best_tokens = torch.from_numpy(logits.argmax(1))
        return torch.from_numpy(logits)

    def _run_in_threads(self, *arguments: Any) -> None:
        """Run a pass in this thread, with the help of the others that begin in time."""
        threads = min(self._threads, torch.get_num_threads())
        helpers = [self._executor.submit(cpu_kernels.run_pass, *arguments)
                   for _ in range(threads - 1)]
        cpu_kernels.run_pass(*arguments)
        for helper in helpers:
            helper.cancel()     # if it has not begun: nothing is left to do


def array(tensor: Tensor) -> np.ndarray:
    """Return the memory of a tensor; bfloat16 as ``uint16``, which NumPy knows."""
    found: np.ndarray = (
        tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found
