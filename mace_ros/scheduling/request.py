# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A request as the scheduler sees it: numbers only, no text and no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import auto, Enum

from mace_ros.memory.block_hashes import BlockHashes


class RequestState(Enum):
    """Where a request is on its way."""

    WAITING = auto()   # no KV blocks yet
    RUNNING = auto()   # holds KV blocks; prefills, then decodes
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """
    One query on its way through the engine.

    Lengths are in tokens, times in seconds on the scheduler's clock. Of the
    ``prompt_tokens + output_tokens`` tokens that are known, ``computed_tokens`` have
    their keys and values in the cache; the rest is what a pass may compute next. While it
    waits, they are those that would be shared if it were admitted, and ``shared_blocks`` is
    how many of their blocks others hold. One that was preempted waits again, with its
    output.

    What every plan reads of every request lies together, in two lines of a processor's cache:
    after a pass nothing of it is left there.
    """

    id: str
    arrival: float
    prompt_tokens: int
    max_tokens: int
    ttft_slo: float
    tpot_slo: float
    priority: int = 0
    state: RequestState = RequestState.WAITING
    computed_tokens: int = 0
    output_tokens: int = 0
    dropped_tokens: int = 0         # of those computed; its blocks are the others'
    blocks: list[int] = field(default_factory=list)
    first_token_at: float | None = None
    last_token_at: float | None = None
    started_at: float | None = None       # first prefill
    shared_blocks: int = 0
    block_hashes: BlockHashes | None = None    # names of its blocks; without, it shares none
    adapter_slot: int = 0

    @property
    def most_tokens(self) -> int:
        """Tokens that it may come to."""
        return self.prompt_tokens + self.max_tokens

    @property
    def known_tokens(self) -> int:
        """Tokens of prompt and output so far."""
        return self.prompt_tokens + self.output_tokens

    @property
    def remaining_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 for a decode row."""
        return self.known_tokens - self.computed_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are in its blocks."""
        return self.computed_tokens - self.dropped_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether the next pass needs only its newest token."""
        return self.output_tokens > 0 and self.remaining_tokens == 1

    @property
    def deadline(self) -> float:
        """When its next token is due."""
        if self.first_token_at is None:
            return self.arrival + self.ttft_slo
        return self.first_token_at + self.output_tokens * self.tpot_slo

    @property
    def slo_met(self) -> bool:
        """Whether the tokens so far came in time (TPOT as a mean over the answer)."""
        if self.first_token_at is None or self.last_token_at is None:
            return False
        spent = self.last_token_at - self.first_token_at
        return (self.first_token_at - self.arrival <= self.ttft_slo
                and spent <= self.tpot_slo * max(self.output_tokens - 1, 0))
