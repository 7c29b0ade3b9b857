# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The inference half of an iteration, the same for every policy.

Decode rows come first, then prefill chunks by least slack, as large as the slack of the
running decodes allows; waiting requests are admitted on the way.

KV blocks are given for what is computed, not for what an answer may come to. When the next
tokens of those that run don't fit, whoever can best afford it gives up its blocks and waits
again.
"""

from __future__ import annotations

from itertools import starmap
import math
from typing import NamedTuple

from mace_ros.api.settings import Settings
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.plan import EMPTY, PassShape, PrefillChunk, Rejection, State
from mace_ros.scheduling.request import Request
from mace_ros.scheduling.waiting_queue import is_impatient, Place, Queue

# Blocks beyond its prompt that must be free for a request to be admitted, so that it is not
# soon preempted. Those that run keep one each, for their next tokens.
AHEAD_BLOCKS = 4

# The least worth computing of a prompt at once, unless less is left of it.
LEAST_CHUNK = 16


class Batch(NamedTuple):
    """
    What one pass does for the requests.

    ``due`` is the first deadline of its decode rows, ``next_due`` that of the tokens after
    those. ``waits`` says whether anybody waits beside them: for a first token, or for a
    turn to decode. ``free_tokens`` are those of the KV cache that nobody needs soon, after
    the admissions. ``lacks_memory`` says that somebody could do more with more of it.
    """

    decode: tuple[Request, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    preempted: tuple[Request, ...] = ()
    lacks_memory: bool = False
    shape: PassShape = EMPTY
    seconds: float = 0.0
    due: float = math.inf
    next_due: float = math.inf
    waits: bool = False
    free_tokens: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self.decode or self.prefill)


class Batcher:
    """Chooses decode rows, prefill chunks and admissions within the limits of one pass."""

    def __init__(self, settings: Settings, cost: CostModel) -> None:
        """Take limits and objectives from ``settings``, which may be replaced at any time."""
        self.settings = settings
        self._cost = cost

    def batch(self, state: State, now: float) -> Batch:
        """Return the pass to run now; empty if no request can go on."""
        limits = self.settings.scheduler
        rows: list[Request] = []
        deadlines: list[float] = []     # of the rows
        started: list[Request] = []
        context = lacking = unfinished = 0
        due = next_due = math.inf
        running, preempted = state.running, self._too_many(state, now)
        if preempted:
            running = [r for r in running if r not in preempted]
        for request in running:
            # Request.is_decoding, .deadline, _growth and _lacks, inlined: there may be many.
            output = request.output_tokens
            known = request.prompt_tokens + output
            if not output or known - request.computed_tokens != 1:
                started.append(request)
                unfinished += max(known // BLOCK_TOKENS + 1 - len(request.blocks), 0)
                continue
            rows.append(request)
            cached = known - request.dropped_tokens     # with its newest token
            context += cached
            if cached % BLOCK_TOKENS == 1 and cached > len(request.blocks) * BLOCK_TOKENS:
                lacking += 1
            tpot = request.tpot_slo
            deadline = (request.first_token_at or 0.0) + output * tpot
            deadlines.append(deadline)
            if deadline < due:
                due = deadline
            if deadline + tpot < next_due:
                next_due = deadline + tpot
        most_rows = min(limits.max_requests, limits.max_batch_tokens)
        crowded = len(rows) > most_rows
        if crowded:
            rows.sort(key=_turn)
            del rows[most_rows:]
            deadlines = [row.deadline for row in rows]
            context = sum([row.cached_tokens + 1 for row in rows])
            lacking = sum([_lacks(row) for row in rows])
        shape = PassShape(len(rows), context)
        alone_s = self._cost.pass_s(*shape)
        free = state.free_tokens // BLOCK_TOKENS - lacking
        if preempted:
            free += sum([state.frees(r) for r in preempted])
        # Kept back: for the next tokens of the rows, and for the rest of the prompts begun.
        unclaimed = free - len(rows) - unfinished
        if not (started or state.waiting):
            return Batch(decode=tuple(rows), shape=shape, seconds=alone_s, due=due,
                         next_due=next_due, waits=crowded or bool(preempted), preempted=preempted,
                         lacks_memory=bool(preempted), free_tokens=_tokens(unclaimed))
        batch = _Pass(self._cost, shape, alone_s, _limit_s(rows, deadlines, due, alone_s, now),
                      limits.max_batch_tokens, now)
        queue = Queue(started, state.waiting, state.get_computed_blocks, batch.prefill_s, now)
        queued = queue.left
        rejected: dict[Request, str] = {}
        capacity = (self.settings.memory.kv_cache_tokens if state.capacity_tokens is None
                    else state.capacity_tokens)
        if self.settings.slo.admission == 'reject':
            rejected = self._unreachable(queue.places(), state, unclaimed, batch, now)
        too_large: list[Rejection] = []
        slots = limits.max_requests - len(running)
        lacks_memory = bool(preempted)
        # Nobody is admitted while others must leave, nor overtakes one that can't wait any
        # longer and lacks memory.
        held = bool(preempted)
        while not batch.is_full and (
                place := queue.pop(admits=slots > 0 and not held)) is not None:
            _, latest, _, request, waits = place
            need = 0
            if waits:
                if request in rejected:
                    continue
                if request.prompt_tokens + request.max_tokens > capacity:
                    too_large.append(Rejection(
                        request, f'{kv_tokens(request)} tokens of KV cache needed, {capacity} is '
                        'all there is (memory.kv_cache_tokens, memory.budget_mb)', too_large=True))
                    continue
                need = admission_blocks(request)
                if need > unclaimed:
                    lacks_memory = True
                    held = latest < now
                    continue
                room = capacity
            else:
                room = _tokens(len(request.blocks) + free) - request.computed_tokens
                if room <= 0:
                    lacks_memory = True
                    continue
            tokens = batch.add(request, latest, queue.left + 1, room)
            if tokens and waits:
                slots -= 1
                unclaimed -= need
            if tokens:
                free -= _growth(request, request.computed_tokens + tokens)
        rejections = too_large
        if rejected:
            rejections = [*starmap(Rejection, rejected.items()), *too_large]
        if not (rows or batch.chunks or preempted) and started and lacks_memory:
            # Prompts begun hold all the memory: one of them must let the others go on.
            preempted = (max(started, key=lambda r: self._rank(r, now)),)
        return Batch(
            decode=tuple(rows), prefill=tuple(batch.chunks), rejected=tuple(rejections),
            preempted=preempted, lacks_memory=lacks_memory,
            shape=batch.shape, seconds=batch.seconds, due=due,
            next_due=next_due, waits=crowded or bool(preempted) or queued > len(rejections),
            free_tokens=_tokens(unclaimed))

    def _too_many(self, state: State, now: float) -> tuple[Request, ...]:
        """Return who must give up its blocks for the next tokens of the others to fit."""
        free = state.free_tokens // BLOCK_TOKENS
        if free >= len(state.running):
            return ()     # enough for a block each
        leaving: list[Request] = []
        staying = sorted(state.running, key=lambda r: self._rank(r, now))
        need = sum([r.is_decoding and _lacks(r) for r in staying])
        while need > free and staying:
            last = staying.pop()
            leaving.append(last)
            free += state.frees(last)
            need -= last.is_decoding and _lacks(last)
        return tuple(leaving)

    def _rank(self, request: Request, now: float) -> tuple[float, float, float]:
        """
        Return the key by which requests keep their blocks, the first ones first.

        What is preempted is computed again. Of those that have the time for it, the one leaves
        first that holds the most, so that few have to; then the one that will be late by least.
        """
        if is_impatient(request, now):
            return -math.inf, request.arrival, 0.0
        known = request.known_tokens
        slack = request.deadline - now - self._cost.pass_s(
            prefill_tokens=known, prefill_context=known * known // 2)
        return -request.priority, min(slack, 0.0), known

    def _unreachable(
        self, queue: list[Place], state: State, free: int, batch: _Pass, now: float,
    ) -> dict[Request, str]:
        """Return who would get its first token too late, and the reason to tell."""
        found: dict[Request, str] = {}
        slots = self.settings.scheduler.max_requests - len(state.running)
        # A place is free again when an answer ends, at the latest at its longest.
        step_s = batch.seconds
        ends = sorted([(r.max_tokens - r.output_tokens) * step_s for r in state.running])
        ahead = late = 0
        for _, _, _, request, waits in queue:
            ahead += request.remaining_tokens
            predicted = batch.prefill_s(ahead)
            if not waits:
                continue
            need = admission_blocks(request)
            fits = slots > 0 and need <= free
            if not fits and late < len(ends):
                predicted = max(predicted, ends[late] + batch.prefill_s(request.prompt_tokens))
            predicted += now - request.arrival
            if request.first_token_at is None and predicted > request.ttft_slo:
                found[request] = (
                    f'predicted time to first token {predicted * 1e3:.0f} ms, objective '
                    f'{request.ttft_slo * 1e3:.0f} ms')
                ahead -= request.remaining_tokens
            elif fits:
                slots -= 1
                free -= need
            else:
                late += 1
        return found


def kv_tokens(request: Request) -> int:
    """Return the tokens of KV cache that a request may come to hold, in whole blocks."""
    return _tokens(-(-request.most_tokens // BLOCK_TOKENS))


def _tokens(blocks: int) -> int:
    return max(blocks, 0) * BLOCK_TOKENS


def _growth(request: Request, tokens: int) -> int:
    """Return the blocks that a request takes to have so many of its tokens computed."""
    return max(-(-tokens // BLOCK_TOKENS) - (len(request.blocks) or request.shared_blocks), 0)


def _lacks(row: Request) -> bool:
    """Whether a decode row needs a block for its next token."""
    return row.cached_tokens >= len(row.blocks) * BLOCK_TOKENS


def admission_blocks(request: Request) -> int:
    """Return the blocks that must be free for a request to begin."""
    known = request.prompt_tokens + request.output_tokens
    return _growth(request, min(
        known + AHEAD_BLOCKS * BLOCK_TOKENS, request.prompt_tokens + request.max_tokens))


def _turn(row: Request) -> float:
    """
    Return the key by which decode rows take turns when there are too many for one pass.

    By deadline; but the deadlines of a row that is late stay in the past however often
    it runs, so that it would keep others out for ever: it queues up behind its last token.
    """
    return max(row.deadline, row.last_token_at or row.arrival)


def _limit_s(rows: list[Request], deadlines: list[float], due: float, alone_s: float,
             now: float) -> float:
    """
    Return how long a pass may take by the deadlines of its rows, the first of them ``due``.

    Alone they take ``alone_s``. A row that will be late in any case asks for its time per
    token; if the device can't give that, it shares the device evenly with the prompts.
    """
    if due - now >= alone_s:
        return due - now
    in_time = now + alone_s
    limit = math.inf
    for row, deadline in zip(rows, deadlines, strict=True):
        if deadline >= in_time:
            slack = deadline - now
        else:
            slack = row.tpot_slo
            if slack <= alone_s:
                slack = 2.0 * alone_s
        if slack < limit:
            limit = slack
    return limit


class _Pass:
    """A pass while it is being filled with prefill chunks."""

    __slots__ = ('_cost', '_ending', '_limit_s', '_line', '_now', '_tokens_left', 'chunks',
                 'is_full', 'seconds', 'shape')

    def __init__(self, cost: CostModel, rows: PassShape, seconds: float, limit_s: float,
                 max_tokens: int, now: float) -> None:
        """Begin with the decode rows: they take so long, and by their deadlines ``limit_s``."""
        self._cost = cost
        self._now = now
        self._limit_s = limit_s
        self.shape, self.seconds = rows, seconds
        self.chunks: list[PrefillChunk] = []
        self._ending = 0   # chunks that end their prompt: a first token hangs on the pass
        self._tokens_left = max_tokens - rows.decode_rows
        self.is_full = self._tokens_left <= 0
        # A line through the cost of a small and of a full prefill beside these rows.
        chunk = max(self._tokens_left, 1)
        chunk_s = cost.pass_s(rows.decode_rows, rows.decode_context, 1)
        full_s = cost.pass_s(rows.decode_rows, rows.decode_context, chunk)
        # Tokens of a full one, seconds of each, seconds of each token.
        self._line = chunk, chunk_s, max((full_s - chunk_s) / chunk, 0.0)

    def prefill_s(self, tokens: int) -> float:
        """Return about how long prompts of so many tokens take in passes like this one."""
        chunk, chunk_s, token_s = self._line
        return -(-tokens // chunk) * chunk_s + tokens * token_s

    def add(self, request: Request, due: float, queued: int, room: int) -> int:
        """
        Put the next chunk of ``request`` into the pass if there is time for it.

        It had to start at ``due``; with it, ``queued`` requests are waiting. There is memory
        for ``room`` tokens. Returns the tokens of the chunk, or 0.
        """
        remaining = request.prompt_tokens + request.output_tokens - request.computed_tokens
        tokens = most = min(remaining, self._tokens_left, room)
        shape = self._with(request, tokens)
        seconds = self._cost.pass_s(*shape)
        if self._cost.upper_s(seconds) > self._limit_s:    # mostly all of it fits
            least = min(LEAST_CHUNK, most)
            tokens = self._most_within(self._limit_s, request, most)
            if tokens < least:
                self.is_full = True
                if self.chunks or self._now - due < request.ttft_slo:
                    return 0
                # So late that it must not wait for the rows any longer: they share the device.
                tokens = max(self._most_within(2.0 * self.seconds, request, most), least)
            shape = self._with(request, tokens)
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
            self._ending += 1
            slack = request.deadline - self._now
            if self._cost.upper_s(self.seconds) <= slack:
                self._limit_s = min(self._limit_s, slack)
        return tokens

    def _with(self, request: Request, tokens: int) -> PassShape:
        rows, context, prefill, attended, _ = self.shape
        attended += tokens * request.computed_tokens + tokens * (tokens + 1) // 2
        return PassShape(rows, context, prefill + tokens, attended)

    def _most_within(self, seconds: float, request: Request, most: int) -> int:
        """Return the most tokens (0 to ``most``) with which the pass stays in time."""
        rows, context, prefill, attended, _ = self.shape
        computed = request.computed_tokens

        def spare(tokens: int) -> float:
            return seconds - self._cost.pass_s(
                rows, context, prefill + tokens,
                attended + tokens * computed + tokens * (tokens + 1) // 2, upper=True)

        over = spare(most)      # mostly all of it fits
        if over >= 0.0:
            return most
        left = spare(0)
        if left < 0.0:
            return 0
        low, high = 0, most     # low fits, high does not
        halve = False
        while high - low > 1:
            # The time is nearly a line: where it crosses; then the middle, lest it creep.
            middle = (low + high) // 2 if halve else low + min(
                max(int((high - low) * left / (left - over)), 1), high - low - 1)
            halve = not halve
            found = spare(middle)
            if found >= 0.0:
                low, left = middle, found
            else:
                high, over = middle, found
        return low

    def _is_worth_joining(self, request: Request, tokens: int, seconds: float,
                          queued: int) -> bool:
        """
        Return whether sharing the pass saves those who wait more than it costs those in it.

        It would take ``seconds``. On a device that is busy with few tokens, two prompts one
        after the other give the first one its answer earlier and the second hardly later.
        """
        rows, context, _, _, _ = self.shape
        longer_s = seconds - self.seconds
        own_s = self._cost.pass_s(rows, context, tokens, tokens * request.computed_tokens)
        return self._ending * longer_s <= queued * (own_s - longer_s)
