# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Sources of fine-tune work.

Either corrections that arrive as a robot makes mistakes, more of them while the world drifts, or
fine-tuning that is always pending, to load a device fully. Corrections are learned as in
:mod:`mace_ros.learning.learner`: in jobs of a few corrections, scored before and after some
optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
import math
import random
from typing import Protocol

from mace_ros.memory.budget import MIN_CHUNK_TOKENS
from mace_ros.scheduling.plan import Segment, SegmentKind
from mace_ros.simulation.arrival_trace import Arrival

HEAD_TOKENS = 16      # of a HEAD segment, as on the device
JOB_CORRECTIONS = 4   # at most, as in the learner
GUARDED_TOKENS = 768  # scored before and after a job: about 32 short answers
SCORED_TOKENS = 256   # of one scoring step, as in the gate
ANCHOR_TOKENS = 24    # of one replayed answer
MAX_STEP_TOKENS = 4096


class VirtualStep:
    """
    A fine-tune step whose forward is piggybacked, or runs layer by layer.

    Implements :class:`mace_ros.scheduling.plan.FinetuneWork`. Of ``tokens``, ``learned`` have a
    loss. A step with ``learns`` False ends with the scores of its forward.
    """

    def __init__(self, layers: int, tokens: int, *, learned: int | None = None,
                 oldest_correction_at: float = 0.0, may_piggyback: bool = True,
                 keep_graphs: bool = True, learns: bool = True, whole: int | None = None,
                 chunk_tokens: int | None = None) -> None:
        """
        Start with nothing computed.

        If a step accumulates gradients over several parts, the last part has the tokens of the
        ``whole``, and the others have 0. A step of more than ``chunk_tokens`` computes each
        layer in chunks.
        """
        self.tokens = tokens
        self.oldest_correction_at = oldest_correction_at
        self.piggybacked_so_far = 0     # forward tokens
        self.done: list[Segment] = []
        count = -(-tokens // (chunk_tokens or tokens))
        sizes = [tokens * (i + 1) // count - tokens * i // count for i in range(count)]
        self._may_piggyback = may_piggyback and learns and count == 1
        heads, rest = divmod(tokens if learned is None else learned, HEAD_TOKENS)
        self.left = [Segment(SegmentKind.FORWARD, n) for n in sizes] * layers
        self.left += [Segment(SegmentKind.HEAD, HEAD_TOKENS)] * heads
        self.left += [Segment(SegmentKind.HEAD, rest)] * (rest > 0)
        if learns:
            kind = (SegmentKind.BACKWARD if keep_graphs and count == 1
                    else SegmentKind.BACKWARD_RECOMPUTED)
            self.left += [Segment(kind, n) for n in reversed(sizes)] * layers
            if whole != 0:
                self.left.append(Segment(SegmentKind.OPTIMIZER, whole or tokens))
        self._count = len(self.left)

    @property
    def piggyback_tokens(self) -> int:
        """Forward tokens that can still be piggybacked on inference passes."""
        if self.done or not self._may_piggyback:
            return 0
        return self.tokens - self.piggybacked_so_far

    @property
    def is_piggybacking(self) -> bool:
        """Whether the forward began piggybacked and must be finished that way."""
        return 0 < self.piggybacked_so_far < self.tokens

    @property
    def progress(self) -> float:
        """Completed share of the step's segments."""
        return len(self.done) / self._count

    def segments(self) -> Iterator[Segment]:
        """Return the remaining segments; none while the forward is piggybacked."""
        return iter(() if self.is_piggybacking else self.left)

    def piggybacked(self, tokens: int) -> None:
        """Record that a pass computed the next ``tokens`` forward tokens."""
        if not 0 < tokens <= self.piggyback_tokens:
            raise ValueError(
                f'{tokens} tokens were piggybacked, but only {self.piggyback_tokens} can be')
        self.piggybacked_so_far += tokens
        if self.piggybacked_so_far == self.tokens:
            again = Segment(SegmentKind.BACKWARD_RECOMPUTED, self.tokens)
            self.left = [again if s.kind is SegmentKind.BACKWARD else s for s in self.left
                         if s.kind is not SegmentKind.FORWARD]
            self._count = len(self.left)

    def stop_piggybacking(self) -> None:
        """Discard an unfinished piggybacked forward, and run it in segments instead."""
        if self.is_piggybacking:
            self.piggybacked_so_far, self._may_piggyback = 0, False

    def run(self) -> Segment:
        """Run the next segment and return it."""
        if self.is_piggybacking:
            raise ValueError('a piggybacked forward must be finished before the segments')
        segment = self.left.pop(0)
        self.done.append(segment)
        return segment


class LearningSource(Protocol):
    """A source of fine-tune steps."""

    @property
    def step(self) -> VirtualStep | None:
        """The step that can run now."""

    @property
    def next_at(self) -> float:
        """When the next correction arrives; infinity if none does."""

    def advance(self, now: float) -> None:
        """Take in the corrections up to ``now``; replace a completed step by the next one."""


class NoLearning:
    """A source without work."""

    step: VirtualStep | None = None
    next_at = math.inf

    def advance(self, now: float) -> None:
        """Do nothing."""


class AlwaysPending:
    """One step after another, to load a device fully."""

    next_at = math.inf

    def __init__(self, make: Callable[[float], VirtualStep]) -> None:
        """``make`` returns the next step, given the time."""
        self._make = make
        self.steps: list[VirtualStep] = []

    @property
    def step(self) -> VirtualStep | None:
        """The step that can run now."""
        return self.steps[-1] if self.steps else None

    def advance(self, now: float) -> None:
        """Make the next step if the current one is complete."""
        if not self.steps or not self.steps[-1].left:
            self.steps.append(self._make(now))


@dataclass(frozen=True, slots=True)
class VirtualCorrection:
    """A correction that arrives at the time ``at``."""

    at: float
    tokens: int      # of prompt and corrected answer
    learned: int     # tokens of the corrected answer
    steps: int       # optimizer steps until it is learned


@dataclass(frozen=True)
class Mistakes:
    """
    How often answers are corrected, and how many steps learning takes; all numbers are assumed.

    A ``share`` of the answers is corrected, ``after_s`` after the question on average. While the
    world drifts, ``drift`` times as many are: for ``drift_s`` after every ``calm_s`` on average.
    """

    share: float = 0.05
    after_s: float = 20.0
    drift: float = 4.0
    drift_s: float = 300.0
    calm_s: float = 1500.0
    steps: tuple[int, int] = (3, 10)    # minimum and maximum that SmolLM2-135M needed
    longest: int = 512                  # finetune.max_sample_tokens

    def corrections(self, arrivals: Sequence[Arrival], seed: int) -> list[VirtualCorrection]:
        """Return the corrections of the answers to ``arrivals``, by time."""
        dice = random.Random(f'{seed}/corrections')
        drifts, changes = False, dice.expovariate(1.0 / self.calm_s)
        found = []
        for each in arrivals:
            while each.at > changes:
                drifts = not drifts
                changes += dice.expovariate(1.0 / (self.drift_s if drifts else self.calm_s))
            if dice.random() < min(self.share * (self.drift if drifts else 1.0), 1.0):
                learned = min(each.output_tokens, self.longest // 2)
                tokens = min(each.prompt_tokens + learned, self.longest)
                found.append(VirtualCorrection(
                    each.at + dice.expovariate(1.0 / self.after_s),
                    tokens, learned, dice.randint(*self.steps)))
        return sorted(found, key=lambda c: c.at)


@dataclass(frozen=True, slots=True)
class Learned:
    """A correction, and when a version with it went live; infinity if none did."""

    correction: VirtualCorrection
    live_at: float = math.inf


@dataclass
class _Job:
    corrections: list[VirtualCorrection]
    steps: Iterator[VirtualStep]


class CorrectionLearning:
    """Learns corrections in jobs, the oldest first."""

    def __init__(self, corrections: Iterable[VirtualCorrection], *, layers: int,
                 tokens_within: Callable[[], int], replay_samples: int = 8,
                 recompute: str = 'auto') -> None:
        """``tokens_within`` returns how many tokens a step with short enough segments may have."""
        self._arriving = list(corrections)
        self._waiting: list[VirtualCorrection] = []
        self._layers, self._tokens_within = layers, tokens_within
        self._replay_tokens = replay_samples * ANCHOR_TOKENS
        self._recompute = recompute
        self._job: _Job | None = None
        self.step: VirtualStep | None = None
        self.learned: list[Learned] = []

    @property
    def next_at(self) -> float:
        """When the next correction arrives."""
        return self._arriving[0].at if self._arriving else math.inf

    @property
    def unlearned(self) -> list[VirtualCorrection]:
        """Corrections that have arrived and are not in the live version."""
        return [*(self._job.corrections if self._job else ()), *self._waiting]

    def advance(self, now: float) -> None:
        """Take in corrections; continue with the job, or begin the next one."""
        while self._arriving and self._arriving[0].at <= now:
            self._waiting.append(self._arriving.pop(0))
        if self.step is not None and self.step.left:
            return
        if self._job is not None:
            self.step = next(self._job.steps, None)
            if self.step is not None:
                return
            self.learned += [Learned(c, now) for c in self._job.corrections]
            self._job = None
        if self._waiting:
            self._job = self._begin()
            self.step = next(self._job.steps)

    def _begin(self) -> _Job:
        chosen = self._waiting[:JOB_CORRECTIONS]
        most = self._tokens_within()
        while len(chosen) > 1 and sum(c.tokens for c in chosen) > most:
            chosen.pop()
        del self._waiting[:len(chosen)]
        return _Job(chosen, self._steps(chosen, most))

    def _steps(self, chosen: list[VirtualCorrection], most: int) -> Iterator[VirtualStep]:
        """Yield the steps of a job: scoring, training, scoring."""
        oldest = min(c.at for c in chosen)
        corrected = sum(c.tokens for c in chosen)
        learned = sum(c.learned for c in chosen)
        # Replayed samples that do not fit beside the corrections follow in further parts.
        beside = min(self._replay_tokens, max(most - corrected, 0))
        left = self._replay_tokens - beside
        parts = [(corrected + beside, learned + beside // 2), *(
            (tokens, tokens // 2) for tokens in
            (min(left - i, most) for i in range(0, left, max(most, 1))) if most)]
        yield from self._scores(oldest)
        for _ in range(max(c.steps for c in chosen)):
            for k, (tokens, with_loss) in enumerate(parts):
                yield VirtualStep(
                    self._layers, tokens, learned=with_loss, oldest_correction_at=oldest,
                    may_piggyback=self._recompute != 'never',
                    keep_graphs=self._recompute != 'always',
                    whole=sum(n for n, _ in parts) if k == len(parts) - 1 else 0,
                    chunk_tokens=max(most, MIN_CHUNK_TOKENS))
        yield from self._scores(oldest)

    def _scores(self, oldest: float) -> Iterator[VirtualStep]:
        for _ in range(GUARDED_TOKENS // SCORED_TOKENS):
            yield VirtualStep(self._layers, SCORED_TOKENS, learned=SCORED_TOKENS // 2,
                              oldest_correction_at=oldest, learns=False)
