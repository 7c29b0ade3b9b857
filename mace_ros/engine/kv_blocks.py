# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""KV blocks between bookkeeping and tensors: rows that ride, pruned prompts, a smaller cache."""

from __future__ import annotations

import torch

from mace_ros.engine.active_request import ActiveRequest
from mace_ros.finetune.step import FinetuneStep
from mace_ros.memory.block_pool import BLOCK_TOKENS, BlockPool, OutOfBlocks
from mace_ros.memory.pruning import blocks_to_drop, LONG_TOKENS
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.spans import OBSERVATION_TOKENS, PiggybackSpans
from mace_ros.scheduling.kv_cache_manager import KVCacheManager


class KvBlocks:
    """Brings the bookkeeping of blocks, which knows no tensors, and the cache together."""

    def __init__(self, model: PackedModel, pool: BlockPool, kv_cache: KVCacheManager) -> None:
        """Begin with an empty cache."""
        self._model, self._pool, self._kv_cache = model, pool, kv_cache
        self._backed = pool.limit       # blocks whose memory may be in use
        self.prune_share = 0.0          # of a long prompt's blocks: memory.kv_prune

    def attention(self, answering: ActiveRequest, tokens: int) -> torch.Tensor | None:
        """Return where to note attention if it is to be noted in the next ``tokens`` tokens."""
        request, known = answering.request, answering.request.known_tokens
        if (not self.prune_share or known < LONG_TOKENS or request.is_decoding
                or request.computed_tokens + tokens <= known - OBSERVATION_TOKENS):
            return None
        noted = answering.attention
        if noted is None or len(noted) != known:
            noted = answering.attention = torch.zeros(known, device=self._model.device)
        return noted

    def prune(self, answering: ActiveRequest) -> None:
        """Drop what an answer can do without of its prompt, if its attention was noted."""
        noted, answering.attention = answering.attention, None
        if noted is None:
            return
        window = self._model.window if self._model.window < len(noted) else 0
        self._kv_cache.drop(answering.request, blocks_to_drop(
            [float(x.sum()) for x in noted.cpu().split(BLOCK_TOKENS)],
            self.prune_share, BLOCK_TOKENS, window=window))

    def ride(self, step: FinetuneStep, tokens: int) -> PiggybackSpans | None:
        """Return the next fine-tune rows; None if there is no room for their keys and values."""
        tokens = min(tokens, step.piggyback_tokens)
        if tokens == 0:
            return None
        if not step.holds_blocks:
            held: list[list[int]] = []
            try:
                for length in step.kv_tokens:
                    held.append(self._pool.allocate(length))
            except OutOfBlocks:
                for blocks in held:
                    self._pool.release(blocks)
                return None
            step.hold_blocks(held)
        return step.piggyback_spans(tokens)

    def release(self, step: FinetuneStep) -> None:
        """Take the blocks of a step that does not ride any more."""
        for blocks in step.take_blocks():
            self._pool.release(blocks)

    def move(self, step: FinetuneStep | None) -> None:
        """
        After the KV cache shrank: move what lies beyond its end, and give that back.

        If there is no memory for that, what it holds is lost: who runs waits again, to be
        computed anew, and the error goes on.
        """
        pool = self._pool
        moved = pool.compact()
        if moved:
            # The tables first: they must be right, whatever becomes of the content.
            self._kv_cache.move(moved)
            for table in step.blocks if step is not None else ():
                table[:] = [moved.get(b, b) for b in table]
            try:
                self._model.move_blocks(moved)
            except BaseException:
                self._kv_cache.start_over()
                raise
        if pool.limit < self._backed and pool.free_blocks >= 0:
            self._model.drop_blocks(pool.limit)
            self._backed = pool.limit
        self._backed = max(self._backed, pool.limit)
