# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Block bookkeeping and cache tensors together: pruning, fine-tune tokens, a smaller cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mace_ros.engine.active_request import ActiveRequest, RequestKind
from mace_ros.finetune.step import FinetuneStep
from mace_ros.memory.block_pool import BLOCK_TOKENS, BlockPool, OutOfBlocks
from mace_ros.memory.pruning import blocks_to_drop, LONG_TOKENS
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.prefix_kv import PrefixKV
from mace_ros.model.spans import OBSERVATION_TOKENS, PiggybackSpans
from mace_ros.scheduling.kv_cache_manager import KVCacheManager


class PagedKVCache:
    """Applies decisions about blocks, which are integers only, to the cache's tensors."""

    def __init__(self, model: PackedModel, pool: BlockPool, kv_cache: KVCacheManager,
                 prune_share: float) -> None:
        """``prune_share`` is the share of a long prompt's blocks to drop (memory.kv_prune)."""
        self._model, self._pool, self._kv_cache = model, pool, kv_cache
        self._backed = pool.limit       # blocks whose memory may be in use
        self._prune_share = prune_share

    def update(self, prune_share: float) -> None:
        """Set the share to prune of the prompts that are computed from now on."""
        self._prune_share = prune_share

    # -- pruning ---------------------------------------------------------------------

    def attention(self, active: ActiveRequest, tokens: int) -> torch.Tensor | None:
        """
        Return the tensor that accumulates attention in a pass over the next ``tokens`` tokens.

        Shape ``[known tokens]``; None unless the tokens end a long prompt that is to be pruned.
        """
        request, known = active.request, active.request.known_tokens
        if (not self._prune_share or known < LONG_TOKENS or request.is_decoding
                or request.computed_tokens + tokens <= known - OBSERVATION_TOKENS
                or active.kind in (RequestKind.PREFIX, RequestKind.EMBED)):
            return None
        attention = active.attention
        if attention is None or len(attention) != known:
            attention = active.attention = torch.zeros(known, device=self._model.device)
        return attention

    def prune(self, active: ActiveRequest) -> None:
        """Drop the blocks of a prompt that received the least attention, if it was observed."""
        attention, active.attention = active.attention, None
        if attention is None:
            return
        window = self._model.window if self._model.window < len(attention) else 0
        self._kv_cache.drop(active.request, blocks_to_drop(
            [float(x.sum()) for x in attention.cpu().split(BLOCK_TOKENS)],
            self._prune_share, BLOCK_TOKENS, window=window))

    # -- fine-tune tokens -------------------------------------------------------------

    def piggyback(self, step: FinetuneStep, tokens: int) -> PiggybackSpans | None:
        """Return the next fine-tune tokens as spans; None if the cache has no room for them."""
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

    def read_prefix(self, blocks: Sequence[int], tokens: int) -> PrefixKV:
        """Copy the first ``tokens`` tokens of a block table, which begin a sequence."""
        return self._model.kv_cache.read(self._model.cache_slots(blocks, tokens))

    def release(self, step: FinetuneStep) -> None:
        """Release the blocks that a step holds."""
        for blocks in step.take_blocks():
            self._pool.release(blocks)

    # -- a smaller cache -------------------------------------------------------------

    def move(self, step: FinetuneStep | None) -> None:
        """
        Move the blocks beyond the end of a cache that has shrunk, and free their memory.

        If an allocation fails on the way, the content is lost: all running requests are
        preempted, to be computed again, and the error is raised.
        """
        pool = self._pool
        moved = pool.compact()
        if moved:
            # The tables first: they must be right whatever happens to the content.
            self._kv_cache.renumber(moved)
            for table in step.blocks if step is not None else ():
                table[:] = [moved.get(b, b) for b in table]
            try:
                self._model.move_blocks(moved)
            except BaseException:
                self._kv_cache.reset()
                raise
        if pool.limit < self._backed and pool.free_blocks >= 0:
            self._model.drop_blocks(pool.limit)
            self._backed = pool.limit
        self._backed = max(self._backed, pool.limit)
