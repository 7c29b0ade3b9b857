# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Continuous batching of transformers, with a PEFT adapter attached."""

from __future__ import annotations

from collections.abc import Sequence
import time
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.common.load import Arrival, RequestTimes
from bench.systems.peers.loading import load

TIMEOUT_S = 600.0


class ContinuousBatching:
    """A server: submits each request to the manager of transformers when it arrives."""

    def __init__(self, model: str, adapter: str, dtype: str) -> None:
        """Load ``model`` with the PEFT ``adapter`` and start the manager's thread."""
        # The manager needs the transformers model; its layers have LoRA attached.
        self._model: Any = load(model, adapter, dtype).eval().base_model.model
        # Sized for this load: by default the cache takes all memory of the machine.
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=16, num_blocks=1024, max_batch_tokens=256, max_requests_per_batch=64))
        self._manager.start()
        self._submitted = 0

    def threads(self, count: int) -> None:
        """Set the number of compute threads."""
        torch.set_num_threads(count)

    def run_block(self, begun: float, arrivals: Sequence[Arrival],
                  max_tokens: int) -> tuple[list[RequestTimes], float]:
        """
        Serve ``arrivals``; return their times and the seconds with a request in flight.

        One thread submits requests and receives tokens: between arrivals it waits for tokens.
        """
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        due: dict[str, float] = {}
        waiting, left = list(arrivals), len(arrivals)
        busy, busy_since = 0.0, 0.0
        deadline = time.monotonic() + TIMEOUT_S
        while left:
            now = time.monotonic()
            if now > deadline:
                raise TimeoutError(f'{left} requests did not end within {TIMEOUT_S:g} s')
            while waiting and begun + waiting[0].at <= now:
                arrival = waiting.pop(0)
                name = f'r{self._submitted}'
                self._submitted += 1
                if len(due) == len(last):
                    busy_since = now
                due[name] = begun + arrival.at
                self._manager.add_request(
                    list(arrival.ids), request_id=name, max_new_tokens=max_tokens, streaming=True)
            until = begun + waiting[0].at if waiting else now + 1.0
            output = self._manager.get_result(timeout=max(until - now, 1e-4))
            if output is None:
                continue
            if output.error:
                raise RuntimeError(output.error)
            now = time.monotonic()
            first.setdefault(output.request_id, now)
            if output.is_finished():
                if len(output.generated_tokens) != max_tokens:
                    raise AssertionError(
                        f'{len(output.generated_tokens)} tokens instead of {max_tokens}')
                last[output.request_id] = now
                left -= 1
                if len(due) == len(last):
                    busy += now - busy_since
        # The manager does not report when a request starts: TTFT includes its queueing.
        return [RequestTimes(due[n], due[n], first[n], last[n], max_tokens) for n in due], busy
