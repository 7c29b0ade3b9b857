# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Embeddings, and corrections that are early or imperfect, through a running node."""

from __future__ import annotations

from collections.abc import Iterator
import time

from mace_ros.msg import CorrectionStatus
from mace_ros.srv import Embed
import numpy as np
import pytest
from support.ros_graph import call, NodeProcess

from mace_ros.ros.client import MaceClient

START_S = 100.0
ANSWER_S = 60.0
PATIENT = {'ttft_slo_ms': 6e5, 'tpot_slo_ms': 6e5}

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope='module')
def client(tiny_node: NodeProcess) -> Iterator[MaceClient]:
    with MaceClient() as made:
        made.wait_until_ready(START_S)
        yield made


def test_embeddings_of_similar_texts_are_close(client: MaceClient) -> None:
    reply = call(client, Embed, '/mace/embed', timeout_s=ANSWER_S,
                 texts=['A red apple.', 'A red apple!', 'Turn left at the dock.'])
    assert reply.success, reply.message
    rows = np.array(reply.values).reshape(3, reply.dimensions)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-3)
    assert len(reply.tokens) == 3 and min(reply.tokens) > 2
    assert rows[0] @ rows[1] > rows[0] @ rows[2]
    refused = call(client, Embed, '/mace/embed', texts=[''])
    assert (refused.success, refused.message) == (False, 'texts[0]: empty')


def test_a_correction_during_its_answer_is_accepted(client: MaceClient) -> None:
    answer = client.ask('Tell me a tale.', max_tokens=2000, **PATIENT)
    next(answer.stream(ANSWER_S))
    correction = client.correct('Once upon a time.', query_id=answer.id)
    time.sleep(0.2)
    assert not correction.statuses and not answer.is_complete()
    answer.cancel()
    assert correction.wait(CorrectionStatus.ACCEPTED, ANSWER_S).state == CorrectionStatus.ACCEPTED
    assert correction.wait(timeout_s=ANSWER_S).state == CorrectionStatus.LEARNED
    after = client.ask('Tell me a tale.', max_tokens=24).result(ANSWER_S)
    assert after.text == 'Once upon a time.'


def test_a_thumbs_down_is_recorded(client: MaceClient) -> None:
    answered = client.ask('Is it late?', max_tokens=4).result(ANSWER_S)
    status = client.correct(query_id=answered.query_id).wait(timeout_s=ANSWER_S)
    assert (status.state, status.reason) == (CorrectionStatus.RECORDED, '')


def test_a_hint_leads_to_a_proposal_or_a_reason(client: MaceClient) -> None:
    """A random model rarely ends an answer, which can't be learned then."""
    answered = client.ask('Is it far?', max_tokens=4).result(ANSWER_S)
    correction = client.correct(query_id=answered.query_id, hint='Say yes or no.')
    status = correction.wait(CorrectionStatus.PROPOSED, ANSWER_S)
    assert correction.statuses[0].state == CorrectionStatus.ACCEPTED
    if status.state == CorrectionStatus.PROPOSED:
        assert status.corrected
    else:
        assert status.state == CorrectionStatus.FAILED and status.reason.startswith('hint: ')
