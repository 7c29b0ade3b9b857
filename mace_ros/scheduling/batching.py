# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The inference part of an iteration, which is the same for every policy.

A pass takes all decode rows first. Prefill chunks follow by least slack, as large as the slack of
the decode rows allows, and waiting requests are admitted on the way.

KV blocks are allocated for the tokens that a pass computes, not for the longest possible output.
When the next tokens of the running requests do not fit, some requests are preempted: they lose
their blocks and wait again.
"""

from __future__ import annotations

from itertools import starmap
import math
from typing import NamedTuple

from mace_ros.api.settings import Settings
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.pass_builder import PassBuilder
from mace_ros.scheduling.plan import EMPTY_SHAPE, PassShape, PrefillChunk, Rejection, State
from mace_ros.scheduling.prefill_queue import PrefillCandidate, PrefillQueue
from mace_ros.scheduling.request import Request
from mace_ros.scheduling.waiting_queue import is_impatient

# Blocks beyond its known tokens that must be free to admit a request, so that it is not soon
# preempted. One block is reserved for each running request's next tokens.
LOOKAHEAD_BLOCKS = 4


class Batch(NamedTuple):
    """
    What one pass computes for the requests.

    ``due`` is the first deadline of the decode rows, ``next_due`` the first deadline of the
    tokens after those. ``has_waiting`` says whether any other request waits for its first token
    or for its turn to decode. ``free_tokens`` of the KV cache remain after reservations and
    admissions. ``lacks_memory`` says that more KV blocks would allow more work.
    """

    decode: tuple[Request, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    preempted: tuple[Request, ...] = ()
    lacks_memory: bool = False
    shape: PassShape = EMPTY_SHAPE
    seconds: float = 0.0
    due: float = math.inf
    next_due: float = math.inf
    has_waiting: bool = False
    free_tokens: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self.decode or self.prefill)


class _DecodeRows(NamedTuple):
    """The decode rows of a pass, and their deadlines in the same order."""

    rows: list[Request]
    deadlines: list[float]
    due: float                # the first deadline
    next_due: float           # the first deadline of the tokens after those
    crowded: bool             # there are more rows than a pass may have
    shape: PassShape
    seconds: float            # of a pass of these rows alone


class Batcher:
    """Selects decode rows, prefill chunks and admissions within the limits of one pass."""

    def __init__(self, settings: Settings, cost: CostModel) -> None:
        """Read limits and objectives from ``settings``."""
        self._settings = settings
        self._cost = cost

    def update(self, settings: Settings) -> None:
        """Apply new settings."""
        self._settings = settings

    def batch(self, state: State, now: float) -> Batch:
        """Return the pass to run at ``now``; empty if no request can proceed."""
        free = state.cache.free_tokens // BLOCK_TOKENS
        running = state.running
        if not (running or state.waiting):
            return Batch(free_tokens=_tokens(free))
        preempted: tuple[Request, ...] = ()
        if free < len(running):     # not enough for a block each
            preempted = self._preemptions(state, free, now)
        if preempted:
            running = [r for r in running if r not in preempted]
            free += sum([state.cache.blocks_freed_by(r) for r in preempted])
        rows: list[Request] = []
        deadlines: list[float] = []
        prefilling: list[Request] = []
        context = missing = unfinished = 0
        due = next_due = math.inf
        for request in running:
            # Request.is_decoding and .deadline, and _needs_block() are inlined: many may run.
            output = request.output_tokens
            known = request.prompt_tokens + output
            if not output or known - request.computed_tokens != 1:
                prefilling.append(request)
                unfinished += max(known // BLOCK_TOKENS + 1 - len(request.blocks), 0)
                continue
            rows.append(request)
            attended = known - request.dropped_tokens     # including the newest token
            context += attended
            if attended % BLOCK_TOKENS == 1 and attended > len(request.blocks) * BLOCK_TOKENS:
                missing += 1
            tpot = request.tpot_slo
            deadline = (request.first_token_at or 0.0) + output * tpot
            deadlines.append(deadline)
            if deadline < due:
                due = deadline
            if deadline + tpot < next_due:
                next_due = deadline + tpot
        limits = self._settings.scheduler
        max_rows = min(limits.max_requests, limits.max_batch_tokens)
        crowded = len(rows) > max_rows
        if crowded:
            rows.sort(key=_turn)
            del rows[max_rows:]
            deadlines = [row.deadline for row in rows]
            context = sum([row.cached_tokens + 1 for row in rows])
            missing = sum([_needs_block(row) for row in rows])
        shape = PassShape(len(rows), context)
        seconds = self._cost.pass_s(*shape)
        free -= missing
        # Reserved: a block for each row's next tokens, and the rest of the unfinished prompts.
        unclaimed = free - len(rows) - unfinished
        if prefilling or state.waiting:
            decode = _DecodeRows(rows, deadlines, due, next_due, crowded, shape, seconds)
            return self._with_prefills(
                decode, prefilling, state, free, unclaimed, preempted, now)
        return Batch(
            decode=tuple(rows), shape=shape, seconds=seconds, due=due, next_due=next_due,
            has_waiting=crowded or bool(preempted), preempted=preempted,
            lacks_memory=bool(preempted), free_tokens=_tokens(unclaimed))

    def _with_prefills(self, decode: _DecodeRows, prefilling: list[Request], state: State,
                       free: int, unclaimed: int, preempted: tuple[Request, ...],
                       now: float) -> Batch:
        """
        Fill the pass with prefill chunks of the running requests and of newly admitted ones.

        The decode rows leave ``free`` blocks, of which ``unclaimed`` are not reserved.
        """
        limits = self._settings.scheduler
        builder = PassBuilder(
            self._cost, decode.shape, decode.seconds, _limit_s(decode, now),
            limits.max_batch_tokens, now)
        queue = PrefillQueue(prefilling, state.waiting, state.cache, builder.prefill_s, now)
        queued = queue.remaining
        rejected: dict[Request, str] = {}
        if self._settings.slo.admission == 'reject':
            rejected = self._unreachable(queue.candidates(), state, unclaimed, builder, now)
        capacity = state.cache.capacity_tokens
        too_large: list[Rejection] = []
        slots = limits.max_requests - len(state.running) + len(preempted)
        lacks_memory = bool(preempted)
        # Nothing is admitted while requests are preempted, nor ahead of a request that is
        # already late and lacks memory.
        blocked = bool(preempted)
        while not builder.is_full and (
                candidate := queue.pop(admit=slots > 0 and not blocked)) is not None:
            _, latest_start, _, request, waits = candidate
            needed = 0
            if waits:
                if request in rejected:
                    continue
                if request.prompt_tokens + request.max_tokens > capacity:
                    too_large.append(_too_large(request, capacity))
                    continue
                needed = admission_blocks(request)
                if needed > unclaimed:
                    lacks_memory = True
                    blocked = latest_start < now
                    continue
                room = capacity
            else:
                room = _tokens(len(request.blocks) + free) - request.computed_tokens
                if room <= 0:
                    lacks_memory = True
                    continue
            tokens = builder.add(request, latest_start, queue.remaining + 1, room)
            if tokens:
                free -= _growth(request, request.computed_tokens + tokens)
                if waits:
                    slots -= 1
                    unclaimed -= needed
        rejections = too_large
        if rejected:
            rejections = [*starmap(Rejection, rejected.items()), *too_large]
        if not (decode.rows or builder.chunks or preempted) and prefilling and lacks_memory:
            # Unfinished prompts hold all the memory: one of them must let the others proceed.
            preempted = (max(prefilling, key=lambda r: self._rank(r, now)),)
        return Batch(
            decode=tuple(decode.rows), prefill=tuple(builder.chunks), rejected=tuple(rejections),
            preempted=preempted, lacks_memory=lacks_memory,
            shape=builder.shape, seconds=builder.seconds, due=decode.due, next_due=decode.next_due,
            has_waiting=decode.crowded or bool(preempted) or queued > len(rejections),
            free_tokens=_tokens(unclaimed))

    def _preemptions(self, state: State, free: int, now: float) -> tuple[Request, ...]:
        """Return the requests to preempt so that the next tokens of the others fit."""
        preempted: list[Request] = []
        staying = sorted(state.running, key=lambda r: self._rank(r, now))
        needed = sum([r.is_decoding and _needs_block(r) for r in staying])
        while needed > free and staying:
            last = staying.pop()
            preempted.append(last)
            free += state.cache.blocks_freed_by(last)
            needed -= last.is_decoding and _needs_block(last)
        return tuple(preempted)

    def _rank(self, request: Request, now: float) -> tuple[float, float, float]:
        """
        Return the sort key by which requests keep their blocks; the last one is preempted first.

        A preempted request is computed again. Preempt by priority; then requests that have the
        time for it, the largest first, so that few are preempted; then by how late they become.
        """
        if is_impatient(request, now):
            return -math.inf, request.arrival, 0.0
        known = request.known_tokens
        slack = request.deadline - now - self._cost.pass_s(
            prefill_tokens=known, prefill_context=known * known // 2)
        return -request.priority, min(slack, 0.0), known

    def _unreachable(
        self, queue: list[PrefillCandidate], state: State, free: int, builder: PassBuilder,
        now: float,
    ) -> dict[Request, str]:
        """Return the waiting requests that would miss their TTFT objective, with the reason."""
        found: dict[Request, str] = {}
        slots = self._settings.scheduler.max_requests - len(state.running)
        # A slot becomes free when an answer ends, at the latest at its maximum length.
        step_s = builder.seconds
        ends = sorted([(r.max_tokens - r.output_tokens) * step_s for r in state.running])
        tokens_ahead = waiting_for_slot = 0
        for _, _, _, request, waits in queue:
            tokens_ahead += request.remaining_tokens
            predicted = builder.prefill_s(tokens_ahead)
            if not waits:
                continue
            needed = admission_blocks(request)
            fits = slots > 0 and needed <= free
            if not fits and waiting_for_slot < len(ends):
                predicted = max(predicted, ends[waiting_for_slot]
                                + builder.prefill_s(request.prompt_tokens))
            predicted += now - request.arrival
            if request.first_token_at is None and predicted > request.ttft_slo:
                found[request] = (
                    f'predicted time to first token {predicted * 1e3:.0f} ms, objective '
                    f'{request.ttft_slo * 1e3:.0f} ms')
                tokens_ahead -= request.remaining_tokens
            elif fits:
                slots -= 1
                free -= needed
            else:
                waiting_for_slot += 1
        return found


def admission_blocks(request: Request) -> int:
    """Return how many blocks must be free to admit a request."""
    known = request.prompt_tokens + request.output_tokens
    return _growth(request, min(
        known + LOOKAHEAD_BLOCKS * BLOCK_TOKENS, request.prompt_tokens + request.max_tokens))


def _tokens(blocks: int) -> int:
    return max(blocks, 0) * BLOCK_TOKENS


def _growth(request: Request, tokens: int) -> int:
    """Return how many blocks a request still needs to hold ``tokens`` computed tokens."""
    return max(-(-tokens // BLOCK_TOKENS) - (len(request.blocks) or request.shared_blocks), 0)


def _needs_block(row: Request) -> bool:
    """Return whether a decode row needs another block for its next token."""
    return row.cached_tokens >= len(row.blocks) * BLOCK_TOKENS


def _too_large(request: Request, capacity: int) -> Rejection:
    needed = _tokens(-(-request.max_total_tokens // BLOCK_TOKENS))
    return Rejection(
        request, f'{needed} tokens of KV cache needed, the cache holds {capacity} '
        '(memory.kv_cache_tokens, memory.budget_mb)', too_large=True)


def _turn(row: Request) -> float:
    """
    Return the sort key by which decode rows take turns when one pass cannot hold all of them.

    That is the deadline, but at the earliest the row's last token: a late row's deadline stays
    in the past however often it runs, and would starve the other rows.
    """
    return max(row.deadline, row.last_token_at or row.arrival)


def _limit_s(decode: _DecodeRows, now: float) -> float:
    """
    Return how many seconds a pass may take by the deadlines of its decode rows.

    A row that cannot meet its deadline is allotted its TPOT objective; if the device is too slow
    for that, it shares the device evenly with prefills.
    """
    alone_s = decode.seconds
    if decode.due - now >= alone_s:
        return decode.due - now
    ends = now + alone_s
    limit = math.inf
    for row, deadline in zip(decode.rows, decode.deadlines, strict=True):
        if deadline >= ends:
            slack = deadline - now
        else:
            slack = row.tpot_slo
            if slack <= alone_s:
                slack = 2.0 * alone_s
        if slack < limit:
            limit = slack
    return limit
