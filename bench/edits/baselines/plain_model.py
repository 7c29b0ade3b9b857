# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The base model in plain transformers: greedy answers, and batches to train on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import os
import time
from typing import Any, TypeAlias

import torch
from torch import nn, Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from bench.edits.edit_set import Edit
from bench.edits.edited_model import Reply
from bench.edits.scoring import MAX_TOKENS
from mace_ros.api.settings import Settings
from mace_ros.model.chat import ChatTokenizer
from mace_ros.model.loading import load_model

IGNORED = -100          # label of a token without a loss
BATCH = 16              # conversations that are answered at once
LEARNED_LOSS = 1e-2     # below it a batch is not trained, as in LocFT and EasyEdit

Conversation: TypeAlias = Sequence[Mapping[str, str]]   # without the system prompt


def user_turn(text: str) -> Mapping[str, str]:
    """Return a turn of the user."""
    return {'role': 'user', 'content': text}


class PlainModel:
    """
    The model of the node in float32, with the same prompts and the same decoding.

    ``trained_tokens`` counts the tokens of all training batches, padding left out.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        """Load the model; ``seed`` makes a run of a baseline repeatable."""
        torch.manual_seed(seed)
        # As the engine does on a CPU.
        torch.set_num_threads(settings.model.threads or len(os.sched_getaffinity(0)))
        loaded = load_model(settings.model.source, device=settings.model.device, dtype='float32',
                            cache=settings.storage.model_cache)
        self.model: Any = loaded.model.eval().requires_grad_(False)
        self.chat = ChatTokenizer(loaded.tokenizer, loaded.model.generation_config.eos_token_id)
        self.trained_tokens = 0
        self._system = settings.generation.system
        # An own configuration: a model's may sample, or penalise repetitions.
        self._greedy = GenerationConfig(
            max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=sorted(self.chat.end_tokens),
            pad_token_id=min(self.chat.end_tokens))

    def ask(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """Return the answers to the last turns of conversations."""
        batches = [conversations[i:i + BATCH] for i in range(0, len(conversations), BATCH)]
        return [Reply(text) for batch in batches for text in self._answers(batch)]

    @torch.inference_mode()
    def _answers(self, conversations: Iterable[Conversation]) -> list[str]:
        prompts = [torch.tensor(self._prompt(turns)) for turns in conversations]
        ids, mask = (pad_sequence(rows, batch_first=True, padding_side='left')
                     for rows in (prompts, [torch.ones_like(row) for row in prompts]))
        device = self.model.device
        output = self.model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device),
            generation_config=self._greedy)
        return [self.chat.decode(row) for row in output[:, ids.shape[1]:].tolist()]

    def loss(self, edits: Iterable[Edit]) -> Tensor:
        """Return the mean over edits of the loss per token of the new answer."""
        sequences = [self._sequence(edit) for edit in edits]
        ids, labels = (
            pad_sequence([s[i] for s in sequences], batch_first=True, padding_value=padding)
            for i, padding in ((0, 0), (1, IGNORED)))
        mask = pad_sequence([torch.ones_like(s) for s, _ in sequences], batch_first=True)
        self.trained_tokens += int(mask.sum())
        device = self.model.device
        logits = self.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        each = nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), labels[:, 1:].to(device),
            ignore_index=IGNORED, reduction='none')
        taught = (labels[:, 1:] != IGNORED).to(device)
        return (each.sum(1) / taught.sum(1)).mean()

    def step(self, optimizer: torch.optim.Optimizer, edits: Sequence[Edit]) -> float:
        """Train a batch unless it is learned; return the loss before."""
        loss = self.loss(edits)
        if loss.item() >= LEARNED_LOSS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    def _prompt(self, turns: Conversation) -> list[int]:
        system = [{'role': 'system', 'content': self._system}] if self._system else []
        return self.chat.prompt([*system, *turns])

    def _sequence(self, edit: Edit) -> tuple[Tensor, Tensor]:
        """Return the token ids of prompt and new answer, and their labels."""
        prompt, answer = self._prompt([user_turn(edit.prompt)]), self.chat.answer(edit.target)
        return (torch.tensor([*prompt, *answer]),
                torch.tensor([IGNORED] * len(prompt) + answer))


class Stopwatch:
    """Seconds and trained tokens since it was made."""

    def __init__(self, model: PlainModel) -> None:
        self._model = model
        self._began, self._tokens = time.monotonic(), model.trained_tokens

    def read(self) -> tuple[float, int]:
        """Return seconds and tokens."""
        return time.monotonic() - self._began, self._model.trained_tokens - self._tokens
