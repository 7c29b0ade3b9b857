# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What the documentation claims about GPUs, and what this benchmark has found about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.common.results import check, percentile, Table
from bench.gpu.checks import (
    host_share,
    largest_shape,
    MAX_ERROR,
    median_ms,
    median_segment_ms,
    used,
)

Samples = Mapping[str, Any]
Measured = Callable[[Samples], float | None]


@dataclass(frozen=True)
class Claim:
    """
    A claim as a page words it, and the measured value that decides it.

    ``measured`` returns None, or a value that is not finite, if its part was not run. Without a
    ``target`` no part touches the claim.
    """

    page: str                       # below docs/
    text: str
    what: str = ''                  # the measured value
    target: str = ''                # as in check()
    measured: Measured = lambda samples: None


def _passes(above: tuple[str, str], below: tuple[str, str]) -> Measured:
    """Return the ratio of two passes of the largest shape, each of a precision and a kind."""
    def measured(samples: Samples) -> float:
        shape = largest_shape(samples)
        over, under = (median_ms(samples, f'{shape} {weights}', what)
                       for weights, what in (above, below))
        return over / under
    return measured


def _learning(samples: Samples) -> float:
    """Return how much more time the backward of a layer takes with 4 bits, of the largest shape."""
    shape = largest_shape(samples)
    int4, bfloat16 = (median_segment_ms(samples, f'{shape} {weights}', 'BACKWARD')
                      for weights in ('int4', 'bfloat16'))
    return int4 / bfloat16


def _error(path: str) -> Measured:
    """Return the largest error of the fast paths whose name begins with ``path``."""
    return lambda samples: percentile(
        [e['error'] for e in samples['errors'] if e['path'].startswith(path)], 100)


def _captured(kind: str, worst: float) -> Measured:
    """Return a percentile of a number of all captures."""
    return lambda samples: percentile([c[kind] for c in samples['captures']], worst)


def _int4_bytes(samples: Samples) -> float:
    return percentile([w['bytes'] / w['parameters'] for w in samples['weights']
                       if w['shape'].endswith('int4')], 100)


def _memory(value: Callable[[Mapping[str, float]], float], shape: str = '') -> Measured:
    """Return a value of the engine's memory, for any shape or only for one."""
    return lambda samples: percentile(
        [value(m) for m in samples['memory'] if shape in ('', m['shape'])], 100)


HYBRID, PRECISIONS = 'explanation/hybrid-pass.md', 'explanation/precisions.md'
MEMORY, PRODUCTION, JETSON = 'explanation/memory.md', 'guides/production.md', 'start/jetson.md'

CLAIMS = (
    Claim(HYBRID, 'so that fine-tune tokens in it are nearly free',
          'pass of a decode row and 128 fine-tune tokens / of the row', '<= 1.3',
          _passes(('bfloat16', 'fused'), ('bfloat16', 'decode'))),
    Claim(HYBRID, 'decode rows read keys and values where they are',
          'error of paged attention', f'<= {MAX_ERROR}', _error('paged attention')),
    Claim(HYBRID, 'passes are padded to a few shapes and replayed as CUDA graphs',
          'captured shapes, fewest', '>= 1', _captured('passes', 0)),
    Claim(HYBRID, 'so are the layers of fine-tune steps',
          'captured sizes of steps, fewest', '>= 1', _captured('steps', 0)),
    Claim(HYBRID, 'logits under graphs are compared with eager ones',
          'error of passes under graphs', f'<= {MAX_ERROR}', _error('graphs')),
    Claim(HYBRID, 'messages are published and the next pass is planned while the device works',
          'time that the device waits for the host', '<= 0.05',
          lambda samples: host_share(samples) if samples['beside'] else None),
    Claim(HYBRID, 'a decode layer of a Llama takes at most 21 kernels'),
    Claim(HYBRID, 'the memory does not grow with the longest row of the pass'),
    Claim(PRECISIONS, 'decoding should be faster than with `auto`',
          'decode, int4 / bfloat16', '<= 1',
          _passes(('int4', 'decode'), ('bfloat16', 'decode'))),
    Claim(PRECISIONS, 'prefill and learning slower',
          'prefill of 128 tokens, int4 / bfloat16', '>= 1',
          _passes(('int4', 'prefill'), ('bfloat16', 'prefill'))),
    Claim(PRECISIONS, 'prefill and learning slower',
          'backward of a layer, int4 / bfloat16', '>= 1', _learning),
    Claim(PRODUCTION, '0.63 bytes per parameter of the linear layers on CUDA',
          'bytes per parameter', '0.62 to 0.64', _int4_bytes),
    Claim(PRODUCTION, 'with half of the budget at most', 'KV cache / budget', '<= 0.5',
          _memory(lambda m: m['kv_cache_bytes'] / m['budget_bytes'])),
    Claim(MEMORY, 'The budget counts CUDA graphs, too', 'peak beside the weights / budget', '<= 1',
          _memory(lambda m: used(m) / m['budget_bytes'])),
    Claim(MEMORY, 'On CUDA the cache keeps its size'),
    Claim('start/questions.md', '1.2 billion parameters on a GPU, expect about 5 GB',
          'memory on the device, GB', '<= 5', _memory(
              lambda m: (used(m) + m['weights_bytes']) / 1e9, '1b')),
    Claim('reference/parameters.md', 'at the start, which takes up to a minute',
          'seconds to capture, most', '<= 60', _captured('seconds', 100)),
    Claim('guides/latency.md', 'A token takes at least the time of reading all weights',
          'decode / reading the weights', '>= 1',
          _passes(('bfloat16', 'decode'), ('bfloat16', 'floor'))),
    Claim(JETSON, 'about 12 ms for 1.2 billion parameters in bfloat16'),
    Claim(JETSON, "The kernels were compiled for the Orin's GPU (sm_87)"),
    Claim('evidence/performance.md', 'after a capture that fails, at any shape, the model serves'),
)


def verdicts(samples: Samples, *, on_gpu: bool) -> Table:
    """Return whether each claim is confirmed, refuted, or not touched, as on another device."""
    rows = []
    for claim in CLAIMS:
        found = check(claim.what, claim.measured(samples), claim.target) if (
            claim.target and on_gpu) else None
        known = found is not None and found.value is not None
        verdict = 'not touched' if found is None or not known else (
            'confirmed' if found.holds else 'refuted')
        rows.append([verdict, claim.page, claim.text, claim.what,
                     found.value if found is not None else None, claim.target])
    return Table('Claims of the documentation about GPUs',
                 ['', 'page', 'claim', 'measured', 'value', 'target'], rows)
