# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""llama.cpp, where ``llama_cpp`` is installed, one request after another."""

from __future__ import annotations

from collections.abc import Sequence
import time

from bench.common.load import Arrival, RequestTimes
from bench.systems.peers.generate import first_come_first_served

CONTEXT_TOKENS = 1024


class LlamaCpp:
    """A server: one request after another, in order of arrival."""

    def __init__(self, model: str, adapter: str, threads: int) -> None:
        """Load GGUF files; ``adapter`` may be empty."""
        from llama_cpp import Llama  # optional: the other peers do not need it

        self._llama = Llama(
            model_path=model, lora_path=adapter or None, n_ctx=CONTEXT_TOKENS, n_threads=threads,
            n_threads_batch=threads, verbose=False)

    def generate(self, ids: Sequence[int], max_tokens: int) -> list[float]:
        """Return the times of the tokens of a response."""
        times: list[float] = []
        self._llama.reset()     # otherwise the last prompt would serve as a cached prefix
        for _ in self._llama.generate(list(ids), temp=0.0, repeat_penalty=1.0):
            times.append(time.monotonic())
            if len(times) == max_tokens:
                break
        return times

    def run_block(self, begun: float, arrivals: Sequence[Arrival],
                  max_tokens: int) -> tuple[list[RequestTimes], float]:
        """Serve ``arrivals``; return their times and the seconds spent on them."""
        return first_come_first_served(self, begun, arrivals, max_tokens)
