# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""An engine without learning whose responses have a fixed length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import random
from typing import Any

from bench.common.load import prose
from bench.systems.interactive import InteractiveEngine
from mace_ros.api.events import FinishReason, Query, Response
from mace_ros.api.settings import Settings

WARM_UP = 'Good morning. What can you do for me today?'


class Server(InteractiveEngine):
    """An engine on the CPU that does not learn and ignores end-of-turn tokens."""

    def __init__(self, folder: Path, threads: int, **values: Any) -> None:
        """Load; ``values`` are parameters, with a double underscore for the dot."""
        super().__init__(Settings().updated({
            'model.device': 'cpu', 'model.threads': threads, 'finetune.budget': 0.0,
            **{name.replace('__', '.'): value for name, value in values.items()}}), folder)
        self.engine.chat.end_tokens = frozenset()
        self.ask(WARM_UP)

    def set(self, name: str, value: float | bool) -> None:
        """Change a parameter."""
        self.engine.update(self.engine.settings.updated({name: value}))
        self.engine.step()

    def answer(self, query: Query, each_event: Callable[[], None] = lambda: None) -> Response:
        """Return the whole response; ``each_event`` is called at each event before it."""
        def ended(event: Any) -> bool:
            if isinstance(event, Response) and event.query_id == query.id:
                return True
            each_event()
            return False

        self.engine.submit(query)
        response: Response = self.wait_for(ended)
        if response.finish_reason is not FinishReason.LENGTH:
            raise AssertionError(f'{query.id} ended with {response.finish_reason.name}')
        return response

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens computed so far."""
        return self.engine.status().statistics.prefill_tokens

    def text_of(self, tokens: int, seed: str) -> str:
        """Return chat text from a random position, the shortest of at least ``tokens``."""
        encode = self.engine.chat.tokenizer
        words = prose().split()
        start = random.Random(seed).randrange(len(words))
        words = words[start:] + words[:start]
        low, high = 1, len(words)
        while low < high:
            middle = (low + high) // 2
            if len(encode(' '.join(words[:middle]))['input_ids']) < tokens:
                low = middle + 1
            else:
                high = middle
        return ' '.join(words[:low])
