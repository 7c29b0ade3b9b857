# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The prefix cache in the engine: shared beginnings are computed once, under all versions."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.robot import RANDOM_MODEL, Robot, robot_with, SYSTEM

from mace_ros.api.events import ChatMessage, Correction, CorrectionState
from mace_ros.api.settings import Settings
from mace_ros.memory.block_pool import BLOCK_TOKENS
from mace_ros.scheduling.plan import Plan
from mace_ros.telemetry.observer import IterationObserver


class Chunks(IterationObserver):
    """Collects where the prefill chunks begin and end."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def planned(self, plan: Plan, in_flight: int) -> None:
        self.found += [(chunk.request.computed_tokens,
                        chunk.request.computed_tokens + chunk.tokens) for chunk in plan.prefill]


@pytest.fixture(scope='module')
def settings(tiny_settings: Settings) -> Settings:
    """Return settings without learning."""
    return tiny_settings.updated({'finetune.budget': 0.0})


@pytest.fixture(scope='module')
def learning(tiny_settings: Settings) -> Settings:
    """Return settings with which the tiny model learns quickly."""
    return tiny_settings.updated(RANDOM_MODEL)


def test_a_conversations_prefix_is_computed_once(settings: Settings, tmp_path: Path) -> None:
    """The prefix cache holds the system prompt and earlier turns, if sharing is on."""
    computed, texts = {}, {}
    for sharing in (True, False):
        with robot_with(settings, tmp_path / str(sharing), memory__prefix_sharing=sharing) as one:
            before = one.engine.status().statistics.prefill_tokens
            texts[sharing] = [
                one.ask(f'Question {n}?', conversation_id='c', system=SYSTEM, max_tokens=20).text
                for n in range(5)]
            status = one.engine.status()
            computed[sharing] = status.statistics.prefill_tokens - before
            assert (status.shared_tokens > 0) == sharing
    assert texts[True] == texts[False]
    assert computed[True] <= 0.3 * computed[False]


def test_a_long_conversation_drops_many_turns_at_once(settings: Settings, tmp_path: Path) -> None:
    """If turns were dropped one by one, no prompt would share a prefix with the one before."""
    with robot_with(settings, tmp_path, conversation__max_turns=6) as one:
        prompts, computed = [], []
        for n in range(20):
            before = one.engine.status().statistics.prefill_tokens
            prompts.append(one.ask(
                f'Question {n}?', conversation_id='c', max_tokens=20).prompt_tokens)
            computed.append(one.engine.status().statistics.prefill_tokens - before)
    assert max(prompts[7:]) < 1.1 * max(prompts[:7])    # up to the limit
    assert 2 * sum(computed[7:]) < sum(prompts[7:])


def test_a_short_question_takes_the_same_pass_each_time(settings: Settings, tmp_path: Path) -> None:
    """A pass of another length may round in another way, and then the answer may change."""
    with robot_with(settings, tmp_path) as one:
        def computed(question: str) -> int:
            before = one.engine.status().statistics.prefill_tokens
            one.ask(question, system=SYSTEM, max_tokens=1)
            return one.engine.status().statistics.prefill_tokens - before

        computed('Hm?')     # the system prompt, too
        lengths = [computed('What is the colour of the sky?') for _ in range(3)]
        assert lengths == [lengths[0]] * 3
        assert computed('What is the colour of the sea?') == lengths[0]
        long = 'What is the colour of the sky? ' * 10
        assert computed(long) > computed(long)


@pytest.mark.parametrize('turns', [('Hm?',), ('And how are you ? ' * 9,), ('Hm?', 'Oh.', 'Why?')],
                         ids=['short', 'long', 'conversation'])
def test_a_system_prompt_takes_the_same_pass_whatever_follows(
        turns: tuple[str, ...], settings: Settings, tmp_path: Path) -> None:
    """Its keys and values are shared: the first question may not decide how they are rounded."""
    with robot_with(settings, tmp_path) as one:
        chat, chunks = one.engine.chat, Chunks()
        one.engine.observe(chunks)
        roles = ('user', 'assistant', 'user')
        messages = [{'role': 'system', 'content': SYSTEM},
                    *({'role': r, 'content': t} for r, t in zip(roles, turns, strict=False))]
        answer = one.ask('', messages=tuple(ChatMessage(**m) for m in messages), max_tokens=1)
        assert not answer.error
        prompt = chat.prompt(messages)
        last = chat.adapted_from(prompt) // BLOCK_TOKENS * BLOCK_TOKENS
        system = chat.adapted_from(chat.prompt(messages[:2])) // BLOCK_TOKENS * BLOCK_TOKENS
        assert 0 < system <= last
        ends = list(dict.fromkeys((system, last, len(prompt))))
        assert chunks.found == list(zip((0, *ends), ends, strict=False))
        # A prompt is computed in as many passes as it has parts that are not in the cache.
        chunks.found.clear()
        one.ask('Well?', system=SYSTEM, max_tokens=1)
        assert [begin for begin, _ in chunks.found] == [system]


def test_a_prompt_that_shares_nothing_takes_one_pass(settings: Settings, tmp_path: Path) -> None:
    with robot_with(settings, tmp_path, memory__prefix_sharing=False) as one:
        chunks = Chunks()
        one.engine.observe(chunks)
        for _ in range(2):
            one.ask('Hm?', system=SYSTEM, max_tokens=1)
        [first, second] = chunks.found
        assert first == second
        assert first[0] == 0


def test_prefix_sharing_can_be_switched_while_serving(settings: Settings, tmp_path: Path) -> None:
    """A change of the parameter is in force at the next query."""
    with robot_with(settings, tmp_path) as one:
        def shared() -> int:
            before = one.engine.status().shared_tokens
            one.ask('Hm?', system=SYSTEM, max_tokens=1)
            return one.engine.status().shared_tokens - before

        assert shared() == 0 and shared() > 80
        one.engine.update(one.engine.settings.updated({'memory.prefix_sharing': False}))
        assert shared() == 0 and shared() == 0
        assert one.engine.status().kv_cached == 0.0
        one.engine.update(one.engine.settings.updated({'memory.prefix_sharing': True}))
        assert shared() == 0 and shared() > 80


def test_a_publication_leaves_the_prefix_cache_warm(learning: Settings, tmp_path: Path) -> None:
    """What comes before the last user turn is the base model's under every version."""
    with robot_with(learning, tmp_path) as one:
        wrong = one.ask('Who are you?', system=SYSTEM)
        learned = one.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
        assert learned.state is CorrectionState.LEARNED
        before = one.engine.status()
        answered = one.ask('Who are you?', system=SYSTEM)
        after = one.engine.status()
        assert answered.adapter_version == learned.adapter_version == 1
        assert answered.text == 'I am Rover.'
        assert after.shared_tokens - before.shared_tokens > 80


def learned_conversation(one: Robot) -> None:
    """Correct an answer, and ask in other words, which the base model has never computed."""
    question = f'Who are you, {"my dear " * 40}robot?'
    wrong = one.ask(question, system=SYSTEM, conversation_id='c')
    learned = one.correct(Correction('I am Rover.', id='k', query_id=wrong.query_id))
    assert learned.state is CorrectionState.LEARNED
    one.ask('Hm?', conversation_id='d')     # ends the idle time
    again = one.ask(f'Please say. {question}', system=SYSTEM, conversation_id='c',
                    reset_conversation=True)
    assert again.adapter_version == 1 and again.matched_correction_id == 'k'


def test_history_that_an_adapter_wrote_is_computed_again_in_idle_time(
        learning: Settings, tmp_path: Path) -> None:
    with robot_with(learning, tmp_path) as one:
        learned_conversation(one)
        while one.engine.step().wake_at is not None:
            pass
        before = one.engine.status()
        followed = one.ask('And you?', conversation_id='c', max_tokens=1)
        shared = one.engine.status().shared_tokens - before.shared_tokens
        assert followed.prompt_tokens - shared < 48      # the last turn and a partial block


def test_a_query_interrupts_the_computing_of_history(learning: Settings, tmp_path: Path) -> None:
    """The request is cancelled at once, and starts again when the engine is idle."""
    with robot_with(learning, tmp_path) as one:
        engine = one.engine
        learned_conversation(one)
        engine.step()
        assert engine.status().queue_depth == 0
        computed = engine.status().statistics.prefill_tokens
        asked = one.ask('Hm?', max_tokens=1)
        assert engine.status().statistics.prefill_tokens - computed <= asked.prompt_tokens
        while engine.step().wake_at is not None:
            pass
        before = engine.status().shared_tokens
        followed = one.ask('And you?', conversation_id='c', max_tokens=1)
        assert followed.prompt_tokens - (engine.status().shared_tokens - before) < 48
