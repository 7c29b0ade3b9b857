# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Embeddings are the mean of the model's last hidden states, whatever else a pass computes."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
import time

import pytest
from support.robot import Robot, robot_with
import torch
from transformers import AutoModel, AutoTokenizer

from mace_ros.api.events import Query, ResponseChunk
from mace_ros.api.settings import Settings
from mace_ros.engine.embeddings import Embedding, InvalidText, MAX_TEXTS

TEXTS = ['A red apple.', 'The docking station is in the hall. ' * 9, 'Ein roter Apfel.']


def result(robot: Robot, done: Future[list[Embedding]]) -> list[Embedding]:
    """Step until an embedding is there."""
    end = time.monotonic() + 200.0
    while not done.done():
        assert time.monotonic() < end
        robot.events += robot.engine.step().events
    return done.result()


def expected(folder: Path, text: str) -> torch.Tensor:
    """Return the embedding of a text as transformers computes it."""
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors='pt')
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder, dtype=torch.float32)(**ids).last_hidden_state
    return torch.nn.functional.normalize(states[0].mean(0), dim=0)


def test_embeddings_are_those_of_transformers(robot: Robot, model_folder: Path) -> None:
    for text, (numbers, tokens) in zip(
            TEXTS, result(robot, robot.engine.embed(TEXTS)), strict=True):
        assert torch.tensor(numbers).allclose(expected(model_folder, text), atol=1e-4)
        assert tokens == len(AutoTokenizer.from_pretrained(model_folder)(text)['input_ids'])


def test_answers_and_earlier_texts_change_nothing(
        settings: Settings, tmp_path: Path, model_folder: Path) -> None:
    """In small chunks, beside an answer, and with all of the text in the prefix cache."""
    with robot_with(settings, tmp_path, scheduler__max_batch_tokens=16) as robot:
        alone = robot.ask('Who are you?', max_tokens=30).text
        robot.engine.submit(Query('Who are you?', id='beside', max_tokens=30))
        robot.until(lambda e: isinstance(e, ResponseChunk))
        done = [robot.engine.embed([TEXTS[1]]) for _ in range(2)]
        for each in done:
            [(numbers, _)] = result(robot, each)
            assert torch.tensor(numbers).allclose(expected(model_folder, TEXTS[1]), atol=1e-4)
        assert robot.response('beside').text == alone
        assert not any(getattr(e, 'query_id', '').startswith('\n') for e in robot.events)


@pytest.mark.parametrize(('texts', 'reason'), [
    ([], 'texts: 0 given'), (['Hi'] * (MAX_TEXTS + 1), 'texts: 65 given'),
    (['Hi', ' '], r'texts\[1\]: empty'), (['Hi ' * 20000], r'texts\[0\]: .* tokens, and at most'),
    (['\ud800'], r'texts\[0\]: is not valid Unicode')])
def test_invalid_texts_are_refused_with_a_reason(
        robot: Robot, texts: list[str], reason: str) -> None:
    with pytest.raises(InvalidText, match=reason):
        result(robot, robot.engine.embed(texts))
    assert robot.ask('Hi', max_tokens=2).output_tokens


def test_a_deactivation_ends_the_call(robot: Robot) -> None:
    done = robot.engine.embed(TEXTS)
    robot.engine.pause()
    with pytest.raises(InvalidText, match='deactivated'):
        done.result(1.0)
