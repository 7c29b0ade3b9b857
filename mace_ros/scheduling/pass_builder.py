# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Fills one pass with prefill chunks, as far as time allows."""

from __future__ import annotations

from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import PassShape, PrefillChunk
from mace_ros.scheduling.request import Request

# Minimum prefill chunk, in tokens, if deadlines limit it. A chunk that the end of its prompt, the
# size of the pass or the KV cache limits may be smaller.
MIN_PREFILL_CHUNK = 16


class PassBuilder:
    """A pass that starts with its decode rows; :meth:`add` appends prefill chunks."""

    __slots__ = ('_cost', '_first_tokens', '_limit_s', '_line', '_now', '_tokens_left', 'chunks',
                 'is_full', 'seconds', 'shape')

    def __init__(self, cost: CostModel, rows: PassShape, seconds: float, limit_s: float,
                 max_tokens: int, now: float) -> None:
        """
        Start with the decode rows, which are predicted to take ``seconds``.

        The pass may take ``limit_s`` by the deadlines of its rows, and hold ``max_tokens``.
        """
        self._cost = cost
        self._now = now
        self._limit_s = limit_s
        self.shape, self.seconds = rows, seconds
        self.chunks: list[PrefillChunk] = []
        self._first_tokens = 0   # chunks that complete a prompt, so that a first token follows
        self._tokens_left = max_tokens - rows.decode_rows
        self.is_full = self._tokens_left <= 0
        # Prefill time is taken to be linear: seconds of each full chunk, and of each token.
        chunk = max(self._tokens_left, 1)
        chunk_s = cost.pass_s(rows.decode_rows, rows.decode_context, 1)
        full_s = cost.pass_s(rows.decode_rows, rows.decode_context, chunk)
        self._line = chunk, chunk_s, max((full_s - chunk_s) / chunk, 0.0)

    def prefill_s(self, tokens: int) -> float:
        """Predict the seconds of prefilling ``tokens`` tokens in passes like this one."""
        chunk, chunk_s, token_s = self._line
        return -(-tokens // chunk) * chunk_s + tokens * token_s

    def add(self, request: Request, latest_start: float, queued: int, room: int) -> int:
        """
        Append the next chunk of ``request`` if there is time for it; return its tokens, or 0.

        The request's prefill should start by ``latest_start``. ``queued`` requests wait to
        prefill, this one included. The KV cache has room for ``room`` tokens.
        """
        computed = request.computed_tokens
        remaining = request.prompt_tokens + request.output_tokens - computed
        tokens = limit = min(remaining, self._tokens_left, room)
        for end in request.pass_ends:
            if computed < end < computed + limit:
                tokens = limit = end - computed
        shape = self._shape_with(request, tokens)
        seconds = self._cost.pass_s(*shape)
        upper_s = self._cost.upper_s(seconds)
        if upper_s > self._limit_s:
            within_s, minimum = self._limit_s, min(MIN_PREFILL_CHUNK, limit)
            if minimum == limit or self._cost.upper_s(
                    self._cost.pass_s(*self._shape_with(request, minimum))) > within_s:
                self.is_full = True
                if self.chunks or self._now - latest_start < request.ttft_slo:
                    return 0
                # It is late by its whole TTFT objective: let the pass take twice the time.
                within_s = 2.0 * self.seconds
            tokens = max(self._max_tokens_within(within_s, request, limit, upper_s), minimum)
            shape = self._shape_with(request, tokens)
            seconds = self._cost.pass_s(*shape)
        if self.chunks and not self._is_worth_joining(request, tokens, seconds, queued):
            self.is_full = True
            return 0
        self.shape, self.seconds = shape, seconds
        self.chunks.append(PrefillChunk(request, tokens))
        self._tokens_left -= tokens
        if self._tokens_left <= 0:
            self.is_full = True
        if tokens == remaining:
            self._first_tokens += 1
            slack = request.deadline - self._now
            if self._cost.upper_s(self.seconds) <= slack:
                self._limit_s = min(self._limit_s, slack)
        return tokens

    def _shape_with(self, request: Request, tokens: int) -> PassShape:
        rows, context, prefill, attended, _ = self.shape
        attended += tokens * request.computed_tokens + tokens * (tokens + 1) // 2
        return PassShape(rows, context, prefill + tokens, attended)

    def _max_tokens_within(self, within_s: float, request: Request, limit: int,
                           limit_s: float) -> int:
        """
        Return the most tokens (0 to ``limit``) with which the pass ends within ``within_s``.

        With ``limit`` tokens it takes up to ``limit_s``.
        """
        high_slack = within_s - limit_s
        if high_slack >= 0.0:
            return limit
        low_slack = within_s - self._cost.upper_s(self.seconds)
        if low_slack < 0.0:
            return 0
        rows, context, prefill, attended, _ = self.shape
        computed = request.computed_tokens
        low, high = 0, limit     # low fits, high does not
        bisect = False
        while high - low > 1:
            # Time is nearly linear in the tokens: interpolate. Every other step bisects, since
            # interpolation alone may converge slowly.
            middle = (low + high) // 2 if bisect else low + min(
                max(int((high - low) * low_slack / (low_slack - high_slack)), 1), high - low - 1)
            bisect = not bisect
            middle_slack = within_s - self._cost.pass_s(
                rows, context, prefill + middle,
                attended + middle * computed + middle * (middle + 1) // 2, upper=True)
            if middle_slack >= 0.0:
                low, low_slack = middle, middle_slack
            else:
                high, high_slack = middle, middle_slack
        return low

    def _is_worth_joining(self, request: Request, tokens: int, seconds: float,
                          queued: int) -> bool:
        """
        Return whether joining saves the queued requests more time than it costs others.

        The others are the requests whose first token this pass yields: they wait for the longer
        pass, which would take ``seconds``. Where a few tokens keep the device busy, two prompts one
        after the other are better: the first is answered earlier, and the second hardly later.
        """
        rows, context, _, _, _ = self.shape
        longer_s = seconds - self.seconds
        own_s = self._cost.pass_s(rows, context, tokens, tokens * request.computed_tokens)
        return self._first_tokens * longer_s <= queued * (own_s - longer_s)
