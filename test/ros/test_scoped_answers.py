# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A running node answers by scope: a profile's version, the robot's, or the base model."""

from __future__ import annotations

from mace_ros.msg import CorrectionStatus, Response
import pytest
from support.ros_graph import set_parameters

from mace_ros.ros.client import MaceClient

ANSWER_S = 60.0
NAME, COLOUR, SEA = 'What is your name?', 'Which colour is the door?', 'Tell me about the sea.'


def ask(client: MaceClient, text: str, **fields: object) -> Response:
    """Return the response to a short query."""
    return client.ask(text, max_tokens=8, **fields).result(ANSWER_S)


def told(client: MaceClient, text: str, **fields: object) -> tuple[str, int, str]:
    """Return the answer, its version, and the correction that explains it."""
    response = ask(client, text, **fields)
    return response.text, response.adapter_version, response.matched_correction_id


def test_profile_then_robot_then_base_model(client: MaceClient) -> None:
    """Every response says which version answered, and whose correction it drew on."""
    before = ask(client, SEA)
    assert (before.adapter_version, before.matched_correction_id, before.similarity) == (0, '', 0)
    for text, about, name, profile in (
            ('Bella.', NAME, 'of ann', 'ann'), ('Green.', COLOUR, 'of all', '')):
        learning = client.correct(text, prompt=about, correction_id=name, profile=profile)
        assert learning.wait(timeout_s=ANSWER_S).state == CorrectionStatus.LEARNED
        client.wait_for_version(1, profile, timeout_s=ANSWER_S)

    assert told(client, NAME, profile='ann') == ('Bella.', 1, 'of ann')
    assert told(client, COLOUR, profile='ann') == ('Green.', 1, 'of all')
    assert told(client, SEA, profile='ann') == (before.text, 0, '')
    assert told(client, COLOUR) == ('Green.', 1, 'of all')
    assert told(client, NAME)[1:] == (0, '')
    assert ask(client, NAME, profile='ann').similarity == pytest.approx(1.0)


def test_the_scope_of_a_node_and_of_a_correction(client: MaceClient) -> None:
    """The parameter is live; a correction of its own scope needs no parameter."""
    assert told(client, SEA)[1] == 0
    assert set_parameters(client, {'adapter.scope': 'everywhere'}) == [(True, '')]
    assert told(client, SEA)[1] == 0        # no version was trained for it
    assert set_parameters(client, {'adapter.scope': 'similar'}) == [(True, '')]
    refused = client.correct('Arr!', prompt='Talk like a pirate.', scope='nearby')
    assert 'similar, everywhere' in refused.wait(timeout_s=ANSWER_S).reason
    style = client.correct('Arr!', prompt='Talk like a pirate.', scope='everywhere')
    learned = style.wait(timeout_s=ANSWER_S)
    assert learned.state == CorrectionStatus.LEARNED
    assert told(client, SEA)[1:] == (learned.adapter_version, '')
