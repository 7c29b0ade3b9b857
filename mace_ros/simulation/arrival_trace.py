# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Arrivals of requests: from a recorded trace, or from a generator.

The format is that of the Azure LLM inference traces (Patel et al., Splitwise, ISCA 2024):
CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens.
"""

from __future__ import annotations

from collections.abc import Sequence
import csv
from dataclasses import dataclass, replace
from datetime import datetime
import math
from pathlib import Path
import random

COLUMNS = ('TIMESTAMP', 'ContextTokens', 'GeneratedTokens')

# Lengths of generated requests: log-normal, by median and spread of the logarithm, as in the
# Azure conversation trace of 2023 (median prompt 1,020 tokens, median answer 129).
PROMPT, ANSWER = (1020.0, 0.9), (129.0, 0.9)
LONGEST = 4096

# A bursty process has bursts of this mean length and silence between them. Bursts fill a quarter
# of the time, so that requests arrive at four times the mean rate in them.
BURST_S, BURST_SHARE = 30.0, 0.25


class InvalidArrivals(ValueError):
    """A trace cannot be read; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that arrives ``at`` seconds after the start, and the length of its answer."""

    at: float
    prompt_tokens: int
    output_tokens: int


def read(path: Path) -> list[Arrival]:
    """Read a trace; raises :class:`InvalidArrivals`, or ``OSError``."""
    found: list[tuple[float, int, int]] = []
    with path.open(newline='') as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
        if missing:
            raise InvalidArrivals(f'{path}: no column {", ".join(missing)}')
        for line, row in enumerate(reader, start=2):
            try:
                found.append((_seconds(row[COLUMNS[0]]),
                              int(row[COLUMNS[1]]), int(row[COLUMNS[2]])))
            except (TypeError, ValueError) as error:
                raise InvalidArrivals(f'{path}, line {line}: {error}') from None
    # Some requests of a trace have no answer, and so nothing to serve.
    found = sorted(row for row in found if row[1] > 0 and row[2] > 0)
    if not found:
        raise InvalidArrivals(f'{path}: no request with a prompt and an answer')
    begin = found[0][0]
    return [Arrival(at - begin, prompt, output) for at, prompt, output in found]


def _seconds(timestamp: str) -> float:
    """Return a timestamp (UTC, with up to 100 ns resolution) in seconds."""
    whole, _, fraction = timestamp.strip().partition('.')
    moment = datetime.fromisoformat(whole)
    return (moment - datetime(1970, 1, 1)).total_seconds() + float(f'0.{fraction or 0}')


def thinned(arrivals: Sequence[Arrival], scale: float, count: int, seed: int) -> list[Arrival]:
    """
    Return ``count`` requests at ``scale`` times the rate of a trace.

    Up to a scale of 1, each request is kept with that probability, which preserves the shape of
    the load. Above, the trace is played faster. A trace that is too short is repeated.
    """
    dice = random.Random(f'{seed}/thinned')
    keep, pace = min(scale, 1.0), max(scale, 1.0)
    # A repetition starts one mean interval after the last request.
    length = arrivals[-1].at * (1.0 + 1.0 / len(arrivals))
    found: list[Arrival] = []
    offset = 0.0
    while len(found) < count:
        for each in arrivals:
            if dice.random() < keep:
                found.append(replace(each, at=(offset + each.at) / pace))
                if len(found) == count:
                    break
        offset += max(length, 1e-3)
    return _from_zero(found)


def poisson(rate: float, count: int, seed: int) -> list[Arrival]:
    """Return ``count`` arrivals of a Poisson process with ``rate`` per second."""
    dice = random.Random(f'{seed}/poisson')
    at, found = 0.0, []
    for _ in range(count):
        at += dice.expovariate(rate)
        found.append(Arrival(at, *_lengths(dice)))
    return _from_zero(found)


def bursty(rate: float, count: int, seed: int) -> list[Arrival]:
    """Return ``count`` arrivals in bursts, at a mean of ``rate`` per second."""
    dice = random.Random(f'{seed}/bursty')
    found: list[Arrival] = []
    at = 0.0
    while len(found) < count:
        ends = at + dice.expovariate(1.0 / BURST_S)
        while len(found) < count:
            at += dice.expovariate(rate / BURST_SHARE)
            if at > ends:
                break
            found.append(Arrival(at, *_lengths(dice)))
        at = ends + dice.expovariate(BURST_SHARE / (1.0 - BURST_SHARE) / BURST_S)
    return _from_zero(found)


def _lengths(dice: random.Random) -> tuple[int, int]:
    def draw(median: float, spread: float) -> int:
        return min(max(round(median * math.exp(dice.gauss(0.0, spread))), 1), LONGEST)
    return draw(*PROMPT), draw(*ANSWER)


def _from_zero(arrivals: list[Arrival]) -> list[Arrival]:
    first = arrivals[0].at if arrivals else 0.0
    return [replace(each, at=each.at - first) for each in arrivals]


def rate_of(arrivals: Sequence[Arrival]) -> float:
    """Return the mean number of requests per second."""
    span = arrivals[-1].at - arrivals[0].at
    return (len(arrivals) - 1) / span if span > 0.0 else 0.0
