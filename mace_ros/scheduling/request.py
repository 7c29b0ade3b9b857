# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A request as the scheduler sees it: numbers only, no text and no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import auto, Enum

from mace_ros.memory.block_hashes import BlockHashes


class RequestState(Enum):
    """The life cycle of a request."""

    WAITING = auto()   # holds no KV blocks
    RUNNING = auto()   # holds KV blocks; prefills, then decodes
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """
    One query on its way through the engine.

    Lengths are in tokens, times in seconds on the scheduler's clock. A request has
    ``prompt_tokens + output_tokens`` known tokens. The keys and values of the first
    ``computed_tokens`` of them are in the KV cache; the rest is what a pass may compute next.

    For a waiting request, ``computed_tokens`` is how many tokens the prefix cache would provide
    on admission, and ``shared_blocks`` how many of their blocks other requests hold. A preempted
    request waits again and keeps its output.

    The fields that every plan reads of every request come first: they fit into two cache lines,
    and a plan starts with a cold processor cache, since a pass has just run.
    """

    id: str
    arrival: float
    prompt_tokens: int
    max_tokens: int                 # of output
    ttft_slo: float
    tpot_slo: float
    priority: int = 0
    state: RequestState = RequestState.WAITING
    computed_tokens: int = 0
    output_tokens: int = 0
    dropped_tokens: int = 0         # computed tokens whose blocks were pruned
    blocks: list[int] = field(default_factory=list)
    first_token_at: float | None = None
    last_token_at: float | None = None
    started_at: float | None = None         # first prefill
    shared_blocks: int = 0
    block_hashes: BlockHashes | None = None    # None: shares no blocks
    shareable_tokens: int | None = None     # the most that the prefix cache may provide
    # Positions at which a pass ends: the tokens before them take the same passes whatever follows.
    pass_ends: tuple[int, ...] = ()
    adapter_slot: int = 0

    @property
    def max_total_tokens(self) -> int:
        """Largest number of tokens that prompt and output may reach."""
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
        """Tokens whose keys and values are in the request's blocks."""
        return self.computed_tokens - self.dropped_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether the next pass needs only the newest token."""
        return self.output_tokens > 0 and self.remaining_tokens == 1

    @property
    def deadline(self) -> float:
        """When the next token is due."""
        if self.first_token_at is None:
            return self.arrival + self.ttft_slo
        return self.first_token_at + self.output_tokens * self.tpot_slo

    @property
    def slo_met(self) -> bool:
        """Whether all tokens so far met the SLOs (TPOT as the mean over the output)."""
        if self.first_token_at is None or self.last_token_at is None:
            return False
        spent = self.last_token_at - self.first_token_at
        return (self.first_token_at - self.arrival <= self.ttft_slo
                and spent <= self.tpot_slo * max(self.output_tokens - 1, 0))
