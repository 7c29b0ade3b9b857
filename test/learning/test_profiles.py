# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Profiles with different adapters in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path

import pytest
from support.robot import RANDOM_MODEL, Robot

from mace_ros.api.events import Correction, CorrectionState, Query, Response, ResponseChunk
from mace_ros.api.settings import Settings
from mace_ros.engine.builder import build_engine
from mace_ros.memory.block_pool import BLOCK_TOKENS

TAUGHT = {'ann': 'I am Rover, your dog.', 'bob': 'My name is Tin, I sort mail.'}
PROFILES = (*TAUGHT, 'stranger')        # the last one is served the base model
QUESTION = 'Who are you?'
OTHERS = ('Where is the kitchen?', 'Tell me about the sea.')    # without a correction


@pytest.fixture(scope='module')
def robot(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Robot]:
    """Return an engine that has learned opposite answers to one question for two profiles."""
    settings = Settings().updated({
        'model.source': str(model_folder), 'model.device': 'cpu', 'model.threads': 1,
        # Rounding, which depends on the batch, must not change a token.
        'model.weight_dtype': 'float32', 'memory.kv_cache_tokens': 8192,
        # Each profile's version answers questions that it was not taught, too.
        **RANDOM_MODEL, 'adapter.scope': 'everywhere'})
    taught = Robot(build_engine(settings, storage=tmp_path_factory.mktemp('profiles')))
    for profile, text in TAUGHT.items():
        state = taught.correct(Correction(text, id=profile, prompt=QUESTION, profile=profile))
        assert state.state is CorrectionState.LEARNED, state.reason
    # No learning may run beside the batches that are compared.
    taught.engine.update(taught.engine.settings.updated({'finetune.budget': 0.0}))
    yield taught
    taught.engine.close()


def batch(robot: Robot, questions: Mapping[str, str], **fields: object,
          ) -> tuple[dict[str, Response], dict[str, list[str]], list[set[str]]]:
    """
    Query all profiles at once; return responses, texts of the chunks, and iterations.

    The first two are by profile; an iteration is the set of profiles that it made chunks of.
    """
    for profile, text in questions.items():
        robot.engine.submit(Query(text, id=profile, profile=profile, **fields))  # type: ignore[arg-type]
    ended: dict[str, Response] = {}
    chunks: dict[str, list[str]] = {profile: [] for profile in questions}
    iterations = []
    while ended.keys() != questions.keys():
        events = robot.engine.step().events
        for event in events:
            if isinstance(event, ResponseChunk):
                chunks[event.query_id].append(event.text)
            elif isinstance(event, Response):
                ended[event.query_id] = event
        iterations.append({e.query_id for e in events if isinstance(e, ResponseChunk)})
    return ended, chunks, iterations


@pytest.mark.parametrize('question', [QUESTION, *OTHERS])
@pytest.mark.parametrize('sampling', [
    {}, {'temperature': 1.0, 'seed': 7}], ids=['greedy', 'sampled'])
def test_a_batch_gives_each_profile_the_answer_that_it_gets_alone(
        robot: Robot, question: str, sampling: dict[str, object]) -> None:
    """Chunk by chunk, in the same iterations, and different from the answers of other profiles."""
    fields = {'max_tokens': 40, **sampling}
    alone = {}
    for profile in PROFILES:
        ended, chunks, _ = batch(robot, {profile: question}, **fields)
        alone[profile] = (ended[profile].text, ended[profile].output_tokens, chunks[profile])

    ended, chunks, iterations = batch(robot, dict.fromkeys(PROFILES, question), **fields)

    together = {p: (ended[p].text, ended[p].output_tokens, chunks[p]) for p in PROFILES}
    assert together == alone
    # At most one iteration per token produces chunks.
    tokens = [ended[p].output_tokens for p in PROFILES]
    assert sum(bool(spoke) for spoke in iterations) <= max(tokens) + 2 < sum(tokens)
    # A mix-up of adapters would be seen.
    for one, other in combinations(PROFILES, 2):
        assert alone[one] != alone[other]
    assert [ended[p].adapter_version for p in PROFILES] == [1, 1, 0]
    if question == QUESTION and not sampling:
        assert {p: ended[p].text for p in TAUGHT} == TAUGHT


def test_the_order_of_the_rows_does_not_matter(robot: Robot) -> None:
    """Nor do the questions of the other rows."""
    plain = batch(robot, dict.fromkeys(PROFILES, QUESTION), max_tokens=20)[1]
    for order in (PROFILES[::-1], (PROFILES[1], PROFILES[2], PROFILES[0])):
        assert batch(robot, dict.fromkeys(order, QUESTION), max_tokens=20)[1] == plain
    mixed = {'ann': QUESTION, 'bob': OTHERS[0], 'stranger': OTHERS[1]}
    assert batch(robot, mixed, max_tokens=20)[1]['ann'] == plain['ann']


def test_profiles_share_cached_prefixes_up_to_the_question(robot: Robot) -> None:
    """From there on, keys and values computed with one adapter are wrong for another one."""
    system, question = 'You are a robot in a garden. ' * 8, 'And how are you now? ' * 16
    chat = robot.engine.chat
    prompt = chat.prompt([{'role': 'system', 'content': system},
                          {'role': 'user', 'content': question}])
    prefix = chat.adapted_from(prompt) // BLOCK_TOKENS * BLOCK_TOKENS

    def shared(profile: str, question: str) -> int:
        before = robot.engine.status().shared_tokens
        batch(robot, {profile: question}, system=system, max_tokens=1)
        return robot.engine.status().shared_tokens - before

    assert 50 < prefix < len(prompt) - 2 * BLOCK_TOKENS
    assert [shared(profile, question) for profile in PROFILES] == [0, prefix, prefix]
    assert all(shared(profile, question) >= prefix + BLOCK_TOKENS for profile in PROFILES)
