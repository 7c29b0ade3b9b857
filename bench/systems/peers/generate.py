# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""HF ``generate`` with a PEFT adapter attached, first come first served."""

from __future__ import annotations

from collections.abc import Sequence
import time
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from bench.load import Answered, Arrival
from bench.peers.loading import load


class Stamps(BaseStreamer):
    """Notes when each token comes out of ``generate``."""

    def __init__(self) -> None:
        """Begin without a token."""
        self.prompt_seen = False
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the next token; the prompt comes first."""
        if self.prompt_seen:
            self.times.append(time.monotonic())
        self.prompt_seen = True

    def end(self) -> None:
        """Take note that the answer has ended."""


class HfGenerate:
    """A server: one request after another, in order of arrival."""

    def __init__(self, model: str, adapter: str, dtype: str) -> None:
        """Load ``model`` with the PEFT ``adapter`` attached."""
        self.model = load(model, adapter, dtype).eval()
        # Answers don't end before their longest length.
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(self, ids: Sequence[int], max_tokens: int) -> list[float]:
        """Return when the tokens of an answer came out."""
        stamps = Stamps()
        prompt = torch.tensor([list(ids)])
        self.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=max_tokens, streamer=stamps)
        return stamps.times

    def threads(self, count: int) -> None:
        """Compute with so many threads from now on."""
        torch.set_num_threads(count)

    def run_block(self, begun: float, arrivals: Sequence[Arrival],
                  max_tokens: int) -> tuple[list[Answered], float]:
        """Serve ``arrivals``; return what became of them, and the seconds spent on it."""
        return first_come_first_served(self, begun, arrivals, max_tokens)


def first_come_first_served(server: Any, begun: float, arrivals: Sequence[Arrival],
                            max_tokens: int) -> tuple[list[Answered], float]:
    """Answer one request after the other by ``server.generate(ids, max_tokens)``."""
    answers, busy = [], 0.0
    for arrival in arrivals:
        due = begun + arrival.at
        time.sleep(max(due - time.monotonic(), 0.0))
        started = time.monotonic()
        times = server.generate(arrival.ids, max_tokens)
        busy += time.monotonic() - started
        if len(times) != max_tokens:
            raise AssertionError(f'{len(times)} tokens came instead of {max_tokens}')
        answers.append(Answered(due, started, times[0], times[-1], len(times)))
    return answers, busy
