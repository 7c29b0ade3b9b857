# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""HF ``generate`` with a PEFT adapter attached, one request after another."""

from __future__ import annotations

from collections.abc import Sequence
import time
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from bench.common.load import Arrival, RequestTimes
from bench.systems.peers.loading import load


class TokenTimes(BaseStreamer):
    """Records when ``generate`` returns each token."""

    def __init__(self) -> None:
        """Start without tokens."""
        self.prompt_seen = False
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Record a token; the first call passes the prompt."""
        if self.prompt_seen:
            self.times.append(time.monotonic())
        self.prompt_seen = True

    def end(self) -> None:
        """Ignore the end of the response."""


class HfGenerate:
    """A server: one request after another, in order of arrival."""

    def __init__(self, model: str, adapter: str, dtype: str) -> None:
        """Load ``model`` with the PEFT ``adapter`` attached."""
        self.model = load(model, adapter, dtype).eval()
        # All responses have the requested length.
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(self, ids: Sequence[int], max_tokens: int) -> list[float]:
        """Return the times of the tokens of a response."""
        streamer = TokenTimes()
        prompt = torch.tensor([list(ids)])
        self.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=max_tokens, streamer=streamer)
        return streamer.times

    def threads(self, count: int) -> None:
        """Set the number of compute threads."""
        torch.set_num_threads(count)

    def run_block(self, begun: float, arrivals: Sequence[Arrival],
                  max_tokens: int) -> tuple[list[RequestTimes], float]:
        """Serve ``arrivals``; return their times and the seconds spent on them."""
        return first_come_first_served(self, begun, arrivals, max_tokens)


def first_come_first_served(server: Any, begun: float, arrivals: Sequence[Arrival],
                            max_tokens: int) -> tuple[list[RequestTimes], float]:
    """Serve requests in order of arrival by ``server.generate(ids, max_tokens)``."""
    served, busy = [], 0.0
    for arrival in arrivals:
        due = begun + arrival.at
        time.sleep(max(due - time.monotonic(), 0.0))
        started = time.monotonic()
        times = server.generate(arrival.ids, max_tokens)
        busy += time.monotonic() - started
        if len(times) != max_tokens:
            raise AssertionError(f'{len(times)} tokens instead of {max_tokens}')
        served.append(RequestTimes(due, started, times[0], times[-1], len(times)))
    return served, busy
